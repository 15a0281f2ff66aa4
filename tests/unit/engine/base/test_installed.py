"""A worker without its packages ends with one sentence and status 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from engine.base import installed
from engine.base.errors import ConfigError
from engine.base.installed import REMEDY, require_worker_packages, unusable
from tests.support.paths import ROOT
from worker.cli import decode, prefill

WITHOUT = """
import importlib.util, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in {names!r} else real(name, *rest)
from {module} import main
sys.exit(main({arguments!r}))
"""


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "find_spec", lambda name: None if name == "torch" else "a spec")


def test_all_missing_packages_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    require_worker_packages("workers")
    monkeypatch.setattr(installed, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as raised:
        require_worker_packages("workers", "; or elsewhere")
    assert raised.value.message == (
        f"workers need torch and nixl, which are not installed: {REMEDY}; or elsewhere"
    )


@pytest.mark.usefixtures("without_torch")
@pytest.mark.parametrize(("main", "role"), [(prefill, "prefill"), (decode, "decode")])
def test_a_worker_alone(main, role, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    assert main(["start"]) == 2
    said = capsys.readouterr().err
    assert said == f"{role}: {role} workers need torch, which is not installed: {REMEDY}\n"


@pytest.mark.parametrize("names", [("torch",), ("nixl",), ("torch", "nixl")])
def test_a_coordinator_does_not_start_workers_without_packages(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    arguments = ["start", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]
    script = WITHOUT.format(names=names, module="coordinator.cli", arguments=arguments)
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "DIPTYCH_CACHE_DIR": str(tmp_path),
            "DIPTYCH_STATE_DIR": str(tmp_path),
        },
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert " and ".join(names) in line
    assert REMEDY in line
    assert "--workers external" in line
    assert list(tmp_path.iterdir()) == [], "before anything is converted, compiled or started"


def test_the_cause_of_a_failed_import() -> None:
    missing = ModuleNotFoundError("No module named 'x'", name="x")
    assert unusable(missing).message == f"the package x is not installed: {REMEDY}"
    broken = OSError("libcudart.so.13: cannot open shared object file")
    assert "libcudart.so.13" in unusable(broken).message


class _Fails(ModuleType):
    error: BaseException

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise self.error


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ImportError("libtorch_cpu.so: file too short"), 2, "libtorch_cpu.so: file too short"),
        (OSError("libcudart.so.13: no such file"), 2, "libcudart.so.13"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_an_interrupted_start_has_no_traceback(
    error: BaseException,
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = _Fails("engine.step.build")
    module.error = error
    monkeypatch.setitem(sys.modules, "engine.step.build", module)
    monkeypatch.setattr("engine.telemetry.log.configure_logging", lambda *args, **fields: None)
    monkeypatch.setattr("worker.cli.disable_collections", lambda: None)
    assert prefill(["start"]) == status
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (1 if said else 0)
    assert not said or said in lines[0]
