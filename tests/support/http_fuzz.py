"""Fuzz of the HTTP API: seeded mutations of good bodies, and garbage, wherever one is taken.

    python -m tests.support.http_fuzz --bodies 20000 --seed 1

Each answer must have a documented status and OpenAI's shape; a 500 is a bug, a stream must end with
[DONE], and nothing may be left inside.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import random
from collections import Counter
from typing import Any

from coordinator.api.openai.decisions import CHAT_NEUTRAL, COMPLETION_NEUTRAL, IGNORED, NEUTRAL
from coordinator.api.openai.openapi import description
from engine.base.option_groups import LogOptions
from engine.telemetry.log import configure_logging
from tests.support.http_front import HttpFront, http_front

AT_ONCE = 16
# 429: a list of prompts may fill the queue. There is a quick worker: 503 and 504 would be wrong.
EXPECTED = {200, 400, 404, 413, 415, 429}

TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "d",
        "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
    },
}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": "b"}'}}
GOOD: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "The river", "max_tokens": 3}),
    (
        "/v1/completions",
        {"prompt": ["a", [1, 2]], "max_tokens": 2, "stream": True, "stop": ["x"], "seed": 1},
    ),
    (
        "/v1/completions",
        {"prompt": [5, 6], "logprobs": 1, "echo": True, "max_tokens": 0, "logit_bias": {"5": 1}},
    ),
    (
        "/v1/completions",
        {"prompt": "x", "n": 2, "response_format": {"type": "json_object"}, "max_tokens": 2},
    ),
    (
        "/v1/chat/completions",
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": [{"type": "text", "text": "t"}]},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "r", "tool_call_id": "c"},
            ],
            "tools": [TOOL],
            "tool_choice": "auto",
            "max_completion_tokens": 3,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    ),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "x"}],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": {"type": "object"}},
            },
            "structured_outputs": None,
            "logprobs": True,
            "top_logprobs": 2,
            "max_tokens": 3,
        },
    ),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "x"}],
            "tools": [TOOL],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
            "parallel_tool_calls": False,
            "max_tokens": 3,
        },
    ),
    ("/tokenize", {"prompt": "x", "add_special_tokens": True}),
    ("/tokenize", {"messages": [{"role": "user", "content": "x"}], "tools": [TOOL]}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
]
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 5, 1.5, -0.0, 1e308, 1e999, -1e999, 2**31, 2**32, 2**63,
    2**64, -(2**63) - 1, 10**50, "", "x", "0", "auto", "\x00", "\u00e9\U0001f600", "\ufffe",
    "a" * 300, [], {}, [[]], [None], [1, "x"], {"": None}, {"a": {"b": []}}, [{}], "{", "[]",
    {"type": "object"}, {"type": "text"}, "<|im_start|>", "<tool_call>", "start: /a/", "(((",
]  # fmt: skip


def names() -> list[str]:
    """Every option there is, and some that are not."""
    found = {*IGNORED, *NEUTRAL, *COMPLETION_NEUTRAL, *CHAT_NEUTRAL, "request_id", "nonsense", ""}
    for path in description("0")["paths"].values():
        for operation in path.values():
            if isinstance(operation, dict) and "requestBody" in operation:
                content = operation["requestBody"]["content"]["application/json"]["schema"]
                for schema in content.get("anyOf", [content]):
                    found.update(schema["properties"])
    return sorted(found)


NAMES = names()


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) within `value`."""
    found: list[tuple[Any, Any]] = []
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            found.append((value, key))
            found += places(value[key])
    return found


def _odd(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(ODD))


def mutated(rng: random.Random, body: dict[str, Any]) -> dict[str, Any]:
    """A good body after one to four changes anywhere in it."""
    body = json.loads(json.dumps(body))
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        spots = places(body)
        kind = rng.randrange(6)
        if kind < 2 or not spots:  # an option, known or not, with any value
            body[rng.choice(NAMES)] = _odd(rng)
            continue
        container, key = rng.choice(spots)
        if kind == 2:
            container[key] = _odd(rng)
        elif kind == 3 and isinstance(container, dict):
            del container[key]
        elif kind == 3:
            container.insert(rng.randrange(len(container) + 1), _odd(rng))
        elif kind == 4:
            container[key] = [container[key]] * rng.choice([1, 2, 40])
        else:
            container[key] = {rng.choice(NAMES): container[key]}
    return body


def garbage(rng: random.Random, raw: bytes) -> bytes:
    """Bytes that are mostly no JSON at all."""
    data = bytearray(raw)
    for _ in range(rng.randint(1, 5)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(4):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del data[at : at + rng.randint(1, 9)]
            case 2:
                data[at:at] = rng.choice([b"\\ud800", b"{", b"[" * 200, b'"', b"NaN", b"9" * 5000])
            case _:
                data = data[:at]
    return bytes(data)


def bodies(seed: int, count: int) -> list[tuple[str, bytes]]:
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        path, body = rng.choice(GOOD)
        raw = json.dumps(mutated(rng, body), ensure_ascii=rng.random() < 0.5).encode()
        made.append((path, garbage(rng, raw) if rng.random() < 0.15 else raw))
    return made


async def send(f: HttpFront, path: str, raw: bytes) -> int:
    """The status of one body; fails on what no body may cause."""
    headers = {"content-type": "application/json"}
    got = await f.http.post(path, content=raw, headers=headers)
    status = got.status_code
    assert status in EXPECTED, (status, path, raw[:2000], got.text[:500])
    if got.headers["content-type"].startswith("text/event-stream"):
        assert got.text.endswith("data: [DONE]\n\n")
        assert '"error"' not in got.text.split("\n\n")[-3], (path, raw[:2000], got.text[-500:])
    else:
        assert ("error" in got.json()) == (status != 200)
    return status


async def fuzz(seed: int, num_bodies: int) -> Counter[int]:
    """How many bodies got which status."""
    statuses: Counter[int] = Counter()
    async with http_front(max_model_len=512) as f:
        await f.worker()
        todo = bodies(seed, num_bodies)

        async def work() -> None:
            while todo:
                statuses[await send(f, *todo.pop())] += 1

        async with asyncio.TaskGroup() as tasks:
            for _ in range(AT_ONCE):
                tasks.create_task(work())
        assert (await f.complete(max_tokens=2)).status_code == 200
    return statuses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--bodies", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    configure_logging(LogOptions(log_level="error"))
    found = asyncio.run(fuzz(args.seed, args.bodies))
    print(f"{args.bodies} bodies, seed {args.seed}: {dict(sorted(found.items()))}")
