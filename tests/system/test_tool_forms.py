"""Calls that are required, in forms whose markers the default model does not know: on a real stack
the grammar leads it to a call that the parser reads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.stack import Stack

pytestmark = pytest.mark.timeout(120)
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Oslo", "Bergen"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
BODY: dict[str, Any] = {
    "model": "smollm2",
    "messages": [{"role": "user", "content": "How is the weather in Oslo for 3 days?"}],
    "tools": [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}],
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "max_tokens": 200,
    "temperature": 0,
}


@pytest.mark.parametrize("form", ["qwen3_coder", "harmony"])
def test_a_required_call(tmp_path: Path, form: str) -> None:
    with Stack(tmp_path, "--tool-format", form) as stack:
        url = f"http://{stack.http_address}/v1/chat/completions"
        whole = httpx.post(url, json=BODY, timeout=60).json()["choices"][0]
        assert whole["finish_reason"] == "tool_calls"
        (call,) = whole["message"]["tool_calls"]
        arguments = json.loads(call["function"]["arguments"])
        assert call["function"]["name"] == "weather" and set(arguments) == {"city", "days"}
        assert arguments["city"] in ("Oslo", "Bergen") and arguments["days"] in range(1, 10)
        assert not whole["message"]["content"]
        streamed = httpx.post(url, json=BODY | {"stream": True}, timeout=60).text
        assert json.dumps(call["function"]["arguments"]) in streamed
        stack.assert_at_rest()
