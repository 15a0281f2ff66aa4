"""The attacks of the suite: each one request, or the few that make it, against unrelated answers.

One more is one more `Scenario` in `SCENARIOS`: a name, how it is sent, and how it may end. `send`
runs in a process of its own; what is large is made before it is sent, by `prepare`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import grpc

from engine.checkpoint.packaged import packaged_file
from engine.pb.diptych.v1 import inference_pb2 as pb
from tests.faults.isolation.attack import (
    DEADLINE_S,
    OPTIONS,
    SERVICE,
    End,
    Send,
    Target,
    begin_post,
    call,
    end_post,
    post,
    together,
    unfinished_message,
)
from tests.support.stack import metrics_of, until

MIB = 1024 * 1024
_TEMPLATE_KEY, _ALIGNMENT = b"tokenizer.chat_template", 32  # of GGUF files
MODEL = "smollm2"
VOCAB_SIZE, CONTEXT = 49152, 8192
LOOPING = "never ends"  # a message that the suite's chat template loops on
PROMPT = [2000 + i for i in range(40)]
INVALID, EXHAUSTED, OK = "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "OK"
Ends = frozenset[tuple[str, str]]


def ends(*pairs: tuple[str, str]) -> Ends:
    """(code, field), any of which is a documented end."""
    return frozenset(pairs)


@dataclass(frozen=True, slots=True)
class Scenario:
    """One attack, and what may come of it."""

    name: str
    send: Send
    ends: Ends
    # The shortened form runs those of a group in turn, as one; those of none are in the full form
    # alone. A group is compared or not as a whole.
    group: str = ""
    # The same load without what makes it an attack: it runs in the undisturbed windows too, where
    # to share a batch or a core with that load is no harm.
    control: Send | None = None
    process_mib: int = 256  # that the coordinator, or a worker beside its pool, may grow by
    helpers_mib: int = 384  # that the processes may in which constraints are compiled, together
    compared: bool = True  # whether p99 between tokens is; else only that answers come


# -- requests --------------------------------------------------------------------------------------


def _request(max_tokens: int = 64, **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        request_id=f"attack-{time.monotonic_ns()}",
        token_ids=pb.TokenIds(ids=PROMPT),
        cache_salt=f"attack-{time.monotonic_ns()}",
        stop=pb.Stop(max_tokens=max_tokens),
        **fields,
    )


def constrained_by(target: Target, kind: str, source: str) -> list[End]:
    """An answer held to `source`."""
    request = _request(max_tokens=200, constraint=pb.Constraint(**{kind: source}))
    return [call(target, "Generate", request)]


def _constrained(target: Target, kind: str, source: Callable[[str], str]) -> list[End]:
    return constrained_by(target, kind, source(_salt()))


def constrained(kind: str, source: Callable[[str], str]) -> Send:
    """An answer held to this; `source` makes another one of each salt: what is known costs less."""
    return partial(_constrained, kind=kind, source=source)


def _salt() -> str:
    return "".join(chr(ord("a") + int(digit)) for digit in str(time.monotonic_ns()))


def _schema(salt: str, value: object) -> str:
    return json.dumps({"type": "object", "properties": {salt: value}, "required": [salt]})


def all_of_patterns(salt: str) -> str:
    """A string that has to fit 26 patterns at once: their product has 2**26 states."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    patterns = [{"type": "string", "pattern": f"[a-z]*{c}"} for c in letters]
    return _schema(salt, {"allOf": patterns})


def nested_ranges(salt: str) -> str:
    """A pattern of 1.2 KB that a backtracking scanner reads in cubic time."""
    return _schema(salt, {"type": "string", "pattern": "[a-" * 400})


def nested_ranges_closed(salt: str) -> str:
    """The same as a pattern that can be used."""
    return _schema(salt, {"type": "string", "pattern": "[a-" * 400 + "z" + "]" * 400})


def nested_classes(salt: str) -> str:
    """A regular expression in which each class begins another."""
    return salt + "[^" * 8000


def nested_classes_closed(salt: str) -> str:
    """The same as one that can be used."""
    return salt + "[^" * 60 + "a" + "]" * 60


def quotes(salt: str) -> str:
    """A grammar of nothing but quotes."""
    return f"// {salt}\nstart: " + '"' * 60_001


def ambiguous(salt: str) -> str:
    """A grammar in which an answer of n letters has more derivations than n has digits."""
    return f'// {salt}\nstart: s\ns: s s | "a" | s s s'


def long_constant(salt: str) -> str:
    """A text of 400,000 characters that the answer has to be."""
    return _schema(salt, {"const": "word " * 80_000})


def counted(salt: str) -> str:
    """Repetitions that are bounded, and large."""
    return salt + "(([a-z]{1,90}[0-9]{1,90}){1,90}x){1,30}"


def counted_items(salt: str) -> str:
    """An array with more items than any answer has."""
    items = {"type": "array", "items": {"enum": [1, 2, 3]}, "minItems": 40_000, "maxItems": 50_000}
    return _schema(salt, items)


def _tools(source: Callable[[str], str]) -> list[dict[str, Any]]:
    parameters = {
        "type": "object",
        "properties": {"a": json.loads(source(_salt()))},
        "required": ["a"],
        "additionalProperties": False,
    }
    function = {"name": "f", "strict": True, "parameters": parameters}
    return [{"type": "function", "function": function}]


def _tools_by_http(target: Target, source: Callable[[str], str]) -> list[End]:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "call it"}],
        "tools": _tools(source),
        "tool_choice": "required",
        "max_tokens": 64,
    }
    return [post(target, "/v1/chat/completions", json.dumps(body).encode())]


def _tools_by_grpc(target: Target, source: Callable[[str], str]) -> list[End]:
    request = pb.ChatRequest(
        request_id=f"attack-{time.monotonic_ns()}",
        messages=[pb.Message(role="user", content="call it")],
        tools_json=json.dumps(_tools(source)),
        tool_choice=pb.ToolChoice(mode=pb.ToolChoice.MODE_REQUIRED),
        stop=pb.Stop(max_tokens=64),
    )
    return [call(target, "Chat", request)]


def _resume(target: Target, num_choices: int, num_tokens: int) -> list[End]:
    request = _request(n=num_choices)
    request.stop.max_tokens = num_tokens + 4
    request.stop.stop.extend("ab" * 500 + chr(ord("a") + i) for i in range(16))
    ids = [1000 + i % 40_000 for i in range(num_tokens)]
    for i in range(num_choices):
        request.resume.add(index=i, token_ids=ids)
    return [call(target, "Generate", request)]


def _choices(target: Target, num_biases: int) -> list[End]:
    request = _request(max_tokens=4, n=64)
    for token in range(num_biases):
        request.sampling.logit_bias[token] = 0.5
    return [call(target, "Generate", request)]


@cache
def _nested_json(num_bytes: int) -> bytes:
    values = "[" + "[]," * (num_bytes // 3) + "[]]"
    return _ignored(values)


def _ignored(values: str) -> bytes:
    head = json.dumps({"model": MODEL, "prompt": "Once", "max_tokens": 1})
    return f'{head[:-1]}, "metadata": {values}}}'.encode()


def _bodies(target: Target, num: int, num_bytes: int) -> list[End]:
    body = _nested_json(num_bytes)
    return together(num, lambda _: post(target, "/v1/completions", body))


def _slow_bodies(target: Target, num: int, num_bytes: int) -> list[End]:
    """All but the last byte of each, and that one when all are there."""
    body = _ignored('"' + "x" * num_bytes + '"')
    begun_s = time.monotonic()

    def begin(_: int) -> Any:
        sock = begin_post(target, "/v1/completions", len(body))
        try:
            sock.sendall(body[:-1])
        except OSError:
            pass  # refused unread; the answer is there
        return sock

    def end(sock: Any) -> End:
        try:
            sock.settimeout(30)
            try:
                sock.sendall(body[-1:])
            except OSError:
                pass
            return end_post(sock, begun_s)
        finally:
            sock.close()

    socks: list[Any] = []
    together(num, lambda i: socks.append(begin(i)) or [])  # type: ignore[func-returns-value]
    time.sleep(1.0)
    return together(num, lambda i: end(socks[i]))


def _unfinished(target: Target, num: int, num_bytes: int) -> list[End]:
    return together(num, lambda _: unfinished_message(target, num_bytes, keep_s=2.0))


def _tokenize(target: Target, num_callers: int, num_calls: int, num_words: int) -> list[End]:
    request = pb.TokenizeRequest(text="unbelievable words " * (num_words // 2))
    return together(
        num_callers, lambda _: [call(target, "Tokenize", request) for _ in range(num_calls)]
    )


def _prompt_logprobs(
    target: Target, num: int, num_tokens: int, num_alternatives: int | None
) -> list[End]:
    def one(i: int) -> End:
        request = _request(max_tokens=1)
        request.token_ids.ids[:] = [1000 + (7 * i + j) % 40_000 for j in range(num_tokens)]
        if num_alternatives is not None:
            request.output.prompt_logprobs = num_alternatives
        return call(target, "Generate", request, timeout_s=180)

    return together(num, one)


def _urgent(target: Target, num_callers: int, num_calls: int) -> list[End]:
    """The lowest priority value, which is served first, and the highest, in turn."""

    def one(i: int) -> list[End]:
        found = []
        for _ in range(num_calls):
            request = _request(max_tokens=8)
            request.priority = -(2**31) if i % 2 else 2**31 - 1
            found.append(call(target, "Generate", request))
        return found

    return together(num_callers, one)


def refused(target: Target, num_places: int, num: int) -> list[End]:
    """The ends of `num` requests in turn while others have all places."""
    options = (*OPTIONS, ("grpc.enable_retries", 0))
    with grpc.insecure_channel(target.address, options=options) as channel:
        generate = channel.unary_stream(SERVICE + "Generate")
        blockers = []
        for _ in range(num_places // 64):
            request = _request(max_tokens=256, n=64)
            request.stop.ignore_eos = True
            blockers.append(generate(request.SerializeToString(), timeout=DEADLINE_S))
        try:
            until(lambda: _num_admitted(target) >= num_places, DEADLINE_S, "all places are taken")
            return [call(target, "Generate", _request()) for _ in range(num)]
        finally:
            for blocker in blockers:
                blocker.cancel()


def _num_admitted(target: Target) -> float:
    """How many answers the coordinator has admitted and not finished."""
    seen = metrics_of(target.http_address)
    return seen["diptych_num_requests_running"] + seen["diptych_num_requests_waiting"]


def _looping_template(target: Target) -> list[End]:
    request = pb.ChatRequest(
        request_id=f"attack-{time.monotonic_ns()}",
        messages=[pb.Message(role="user", content=LOOPING)],
        stop=pb.Stop(max_tokens=4),
    )
    return [call(target, "Chat", request)]


# -- the table -------------------------------------------------------------------------------------

_CONSTRAINT, _TOOL = "constraint", "tools_json[0].function.parameters"
_REFUSED = ends((INVALID, _CONSTRAINT), ("UNAVAILABLE", ""))
_HTTP_OK = ("HTTP 200", "")
_HTTP_BUSY = (("HTTP 429", ""), ("HTTP 503", ""))

SCENARIOS = (
    Scenario(
        "26 patterns under allOf",
        constrained("json_schema", all_of_patterns),
        _REFUSED,
        group="constraints",
    ),
    Scenario(
        "a pattern of nested ranges",
        constrained("json_schema", nested_ranges),
        _REFUSED,
        group="constraints",
    ),
    Scenario(
        "a pattern of nested ranges that are closed",
        constrained("json_schema", nested_ranges_closed),
        _REFUSED | {(OK, "")},
    ),
    Scenario(
        "a regular expression of nested classes",
        constrained("regex", nested_classes),
        _REFUSED,
        group="constraints",
    ),
    Scenario(
        "a regular expression of nested classes that are closed",
        constrained("regex", nested_classes_closed),
        _REFUSED | {(OK, "")},
    ),
    Scenario(
        "a grammar of quotes",
        constrained("grammar", quotes),
        _REFUSED,
        group="constraints",
    ),
    Scenario(
        "an ambiguous grammar",
        constrained("grammar", ambiguous),
        _REFUSED | {(OK, "")},
        group="constraints",
    ),
    Scenario(
        "a constant of 400,000 characters",
        constrained("json_schema", long_constant),
        _REFUSED | {(OK, "")},
        group="constraints",
    ),
    Scenario(
        "large counted repetitions",
        constrained("regex", counted),
        _REFUSED | {(OK, "")},
        group="constraints",
    ),
    Scenario(
        "an array of 40,000 items",
        constrained("json_schema", counted_items),
        _REFUSED | {(OK, "")},
    ),
    Scenario(
        "strict tools by HTTP, 26 patterns",
        partial(_tools_by_http, source=all_of_patterns),
        ends(("HTTP 400", "tools[0].function.parameters"), ("HTTP 503", "")),
        group="constraints",
    ),
    Scenario(
        "strict tools by gRPC, 26 patterns",
        partial(_tools_by_grpc, source=all_of_patterns),
        ends((INVALID, _TOOL), ("UNAVAILABLE", "")),
    ),
    Scenario(
        "strict tools by gRPC, nested ranges",
        partial(_tools_by_grpc, source=nested_ranges),
        ends((INVALID, _TOOL), ("UNAVAILABLE", "")),
        group="constraints",
    ),
    Scenario(
        "resume of 16 choices of 8,000 tokens with 16 stops",
        partial(_resume, num_choices=16, num_tokens=8000),
        ends((INVALID, "resume"), (OK, ""), (EXHAUSTED, ""), ("DEADLINE_EXCEEDED", "")),
    ),
    Scenario(
        "64 choices with 49,152 biases",
        partial(_choices, num_biases=VOCAB_SIZE),
        ends((OK, ""), (INVALID, "sampling.logit_bias")),
        control=partial(_choices, num_biases=0),
        group="choices",
    ),
    Scenario(
        "six bodies of 16 MB of nested JSON in an ignored field",
        partial(_bodies, num=6, num_bytes=15_900_000),
        ends(_HTTP_OK, ("HTTP 400", ""), *_HTTP_BUSY),
        process_mib=512,
        group="bytes",
    ),
    Scenario(
        "40 bodies of 15 MB",
        partial(_slow_bodies, num=40, num_bytes=15_000_000),
        ends(_HTTP_OK, ("HTTP 413", ""), *_HTTP_BUSY),
        process_mib=512,
        group="bytes",
    ),
    Scenario(
        "16 unfinished messages of 60 MB",
        partial(_unfinished, num=16, num_bytes=60 * MIB),
        ends(("cut off", ""), ("kept", "")),
        process_mib=512,
        group="bytes",
    ),
    Scenario(
        "40 unfinished messages of 15 MB",
        partial(_unfinished, num=40, num_bytes=15 * MIB),
        ends(("cut off", ""), ("kept", "")),
        process_mib=512,
    ),
    Scenario(
        "a flood of Tokenize",
        partial(_tokenize, num_callers=16, num_calls=4, num_words=40_000),
        ends((OK, ""), (EXHAUSTED, "")),
        group="calls",
    ),
    Scenario(
        "log-probabilities of prompts of 8,000 tokens",
        partial(_prompt_logprobs, num=2, num_tokens=8000, num_alternatives=20),
        ends((OK, ""), (EXHAUSTED, "")),
        control=partial(_prompt_logprobs, num=2, num_tokens=8000, num_alternatives=None),
    ),
    Scenario(
        "a flood of urgent requests",
        partial(_urgent, num_callers=48, num_calls=4),
        ends((OK, ""), (EXHAUSTED, "")),
        compared=False,
        group="urgent requests",
    ),
    Scenario(
        "a chat template that loops",
        _looping_template,
        ends((INVALID, "messages"), ("DEADLINE_EXCEEDED", "")),
        group="calls",
    ),
)


def rows_of(*, full: bool) -> dict[str, list[Scenario]]:
    """Each alone, or those of a group together."""
    rows: dict[str, list[Scenario]] = {}
    for scenario in SCENARIOS:
        if full or scenario.group:
            rows.setdefault(scenario.name if full else scenario.group, []).append(scenario)
    return rows


SIGTERM_AMID = tuple(
    scenario.send
    for scenario in SCENARIOS
    if scenario.name
    in (
        "26 patterns under allOf",
        "an ambiguous grammar",
        "six bodies of 16 MB of nested JSON in an ignored field",
        "a chat template that loops",
    )
)


def looping_model(path: Path) -> Path:
    """The default model's file with a template that loops on `LOOPING`.

    Spliced in behind its key, by a multiple of the file's alignment: tensors keep their offsets.
    """
    raw = packaged_file("smollm2").read_bytes()
    at = raw.index(_TEMPLATE_KEY) + len(_TEMPLATE_KEY) + 4  # a type, then the text's length
    begin = at + 8
    length = int.from_bytes(raw[at:begin], "little")
    loops = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    more = f"{{% if messages[0].content == '{LOOPING}' %}}{loops}{{% endif %}}".encode()
    more += b"{#" + b" " * (-(len(more) + 4) % _ALIGNMENT) + b"#}"
    length_now = (length + len(more)).to_bytes(8, "little")
    path.write_bytes(raw[:at] + length_now + more + raw[begin:])
    return path
