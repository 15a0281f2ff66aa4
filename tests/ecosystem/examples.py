"""The examples of docs/api.md about gRPC, run as they stand there, but for addresses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.ecosystem import grpcurl, smg, tritonclient
from tests.ecosystem.client import Client, Target
from tests.ecosystem.environments import Environment, Failed
from tests.ecosystem.runner import main
from tests.integration.stack import ROOT, free_port, until

DOCUMENT = ROOT / "docs" / "api.md"
TIMEOUT_S = 120.0
# Section -> whose environment its examples need; None: the project's own.
SECTIONS: dict[str, Client | None] = {
    "grpcurl": grpcurl.CLIENT,
    "Python (gRPC)": None,
    "tritonclient": tritonclient.CLIENT,
    "gateways": smg.CLIENT,
}


def examples(section: str) -> list[tuple[str, str]]:
    """(language, text) of the code blocks under a heading."""
    found = re.search(
        rf"^## {re.escape(section)}$(.*?)(?=^## |\Z)", DOCUMENT.read_text(), re.M | re.S
    )
    assert found, f"{DOCUMENT.name} has no section {section!r}"
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", found[1], re.M | re.S)
    assert blocks, f"no example in section {section!r}"
    return blocks


def run(language: str, text: str, environment: Environment) -> str:
    """What an example prints. Raises Failed with it where the example fails."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / f"example.{language}"
        script.write_text("set -euo pipefail\n" + text if language == "sh" else text)
        program = "bash" if language == "sh" else str(environment.python)
        done = subprocess.run(
            [program, str(script)],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env=_variables(environment),
            cwd=ROOT,
            check=False,
        )
    if done.returncode != 0 or not done.stdout.strip():
        raise Failed(f"{text}\nended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


@contextmanager
def background(text: str, environment: Environment, url: str) -> Iterator[None]:
    """An example that stays up, until it has found a model."""
    process = subprocess.Popen(
        text.split(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=_variables(environment),
    )

    def ready() -> bool:
        assert process.poll() is None, text
        try:
            return bool(httpx.get(f"{url}/v1/models", timeout=5).json()["data"])
        except (httpx.TransportError, ValueError, KeyError):
            return False

    try:
        until(ready, 60, text, 0.3)
        time.sleep(0.5)
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


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
        if section == "gateways":
            (_, serve), (kind, call) = blocks
            with background(serve, owner, f"http://{gateway}"):
                run(kind, call, owner)
        else:
            for kind, text in blocks:
                run(kind, text, owner)
        count += len(blocks)
    return f"{count} examples of docs/api.md about {', '.join(SECTIONS)}"


CLIENT = Client("examples", "grpcio", check)

if __name__ == "__main__":
    sys.exit(main(only=[CLIENT.name]))
