"""A real gateway, Shepherd Model Gateway, in front of a coordinator as if that were a vLLM engine.

Its answers have to be those of the coordinator's own OpenAI API, streamed or whole.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.ecosystem.client import Client, Target
from tests.ecosystem.environments import Environment, Failed
from tests.ecosystem.runner import main
from tests.support.stack import free_port, until

START_S = 60.0
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "The river was wide and slow, and"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Name three rivers."}]},
}


@contextmanager
def gateway(target: Target, environment: Environment) -> Iterator[str]:
    """Its URL, while it runs. The tokenizer it learns of from the engine."""
    url = f"http://127.0.0.1:{free_port()}"
    argv = [
        *(str(environment.python.parent / "smg"), "launch", "--host", "127.0.0.1"),
        *("--port", url.rpartition(":")[2], "--worker-urls", f"grpc://{target.grpc}"),
        *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())),
    ]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(argv, stdout=out, stderr=out)

        def ready() -> bool:
            if process.poll() is not None:
                raise Failed("the gateway ended: " + log.read_text(errors="replace")[-2000:])
            try:
                models = httpx.get(f"{url}/v1/models", timeout=5)
                return models.status_code == 200 and target.model in models.text
            except httpx.TransportError:
                return False

        try:
            until(ready, START_S, "the gateway has found its engine", 0.3)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def text_of(url: str, body: dict[str, Any]) -> tuple[str, str]:
    """(text, finish reason) of an answer, streamed or whole."""
    if not body.get("stream"):
        response = httpx.post(url, json=body, timeout=120)
        assert response.status_code == 200, response.text
        (choice,) = response.json()["choices"]
        return choice.get("text") or choice["message"]["content"], choice["finish_reason"]
    text, reason = "", ""
    with httpx.stream("POST", url, json=body, timeout=120) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            for choice in json.loads(line[6:])["choices"]:
                text += choice.get("text") or choice.get("delta", {}).get("content") or ""
                reason = choice["finish_reason"] or reason
    return text, reason


def check(target: Target, environment: Environment) -> str:
    with gateway(target, environment) as url:
        for path, body in BODIES.items():
            body = {"model": target.model, "max_tokens": 24, "temperature": 0, **body}
            expected = text_of(target.url + path, body)
            assert expected[0], path
            assert text_of(url + path, body) == expected, path
            assert text_of(url + path, {**body, "stream": True}) == expected, path
    return "completions and chat through the gateway, streamed and whole, equal to our own API's"


CLIENT = Client("smg", "smg", check, ("smg==1.13.0",))

if __name__ == "__main__":
    sys.exit(main(only=[CLIENT.name]))
