"""The examples of docs/api.md about gRPC, run as they stand there, but for addresses."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tests.ecosystem import grpcurl, smg, tritonclient
from tests.ecosystem.client import Client, Target
from tests.ecosystem.environments import Environment, Failed
from tests.ecosystem.runner import main
from tests.support.paths import ROOT
from tests.support.stack import free_port

DOCUMENT = ROOT / "docs" / "api.md"
TIMEOUT_S = 120.0
# Section -> whose environment its examples need; None: the project's own.
SECTIONS: dict[str, Client | None] = {
    "grpcurl": grpcurl.CLIENT,
    "Python": None,
    "Open Inference Protocol": tritonclient.CLIENT,
    "Gateways": smg.CLIENT,
}


def examples(section: str) -> list[tuple[str, str]]:
    """(language, text) of the code blocks under a heading."""
    found = re.search(
        rf"^##+ {re.escape(section)}$(.*?)(?=^##+ |\Z)", DOCUMENT.read_text(), re.M | re.S
    )
    assert found, f"{DOCUMENT.name} has no section {section!r}"
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", found[1], re.M | re.S)
    assert blocks, f"no example in section {section!r}"
    return blocks


def run(language: str, text: str, environment: Environment) -> None:
    """Raises Failed with what an example prints where it fails, or prints nothing."""
    with tempfile.TemporaryDirectory() as folder:
        script, log = Path(folder) / f"example.{language}", Path(folder) / "log"
        script.write_text("set -euo pipefail\n" + text if language == "sh" else text)
        program = "bash" if language == "sh" else str(environment.python)
        with log.open("wb") as out:
            process = subprocess.Popen(
                [program, str(script)],
                stdout=out,
                stderr=out,
                env=_variables(environment),
                cwd=ROOT,
                start_new_session=True,
            )
        try:
            status = process.wait(TIMEOUT_S)
        finally:
            with suppress(ProcessLookupError):  # what it left in the background
                os.killpg(process.pid, signal.SIGTERM)
        printed = log.read_text(errors="replace")
    if status != 0 or not printed.strip():
        raise Failed(f"{text}\nended with {status}:\n{printed}")


def _moved(text: str, places: Mapping[str, str]) -> str:
    for before, now in places.items():
        text = text.replace(before, now)
    return text


def _variables(environment: Environment) -> dict[str, str]:
    path = f"{environment.python.parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def check(target: Target, environment: Environment) -> str:
    gateway = f"127.0.0.1:{free_port()}"
    count = 0
    places = {
        "127.0.0.1:50051": target.grpc,
        "127.0.0.1:8000": target.http,
        "127.0.0.1:30000": gateway,
        "--port 30000": f"--port {gateway.rpartition(':')[2]}",
        "smollm2": target.model,
    }
    for section, client in SECTIONS.items():
        owner = client.prepare() if client else environment
        blocks = [(kind, _moved(text, places)) for kind, text in examples(section)]
        for kind, text in blocks:
            run(kind, text, owner)
        count += len(blocks)
    return f"{count} examples of docs/api.md about {', '.join(SECTIONS)}"


CLIENT = Client("examples", "grpcio", check)

if __name__ == "__main__":
    sys.exit(main(only=[CLIENT.name]))
