"""Values for the fuzz: at the edges of every type, and, for fields that it knows, sensible ones.

Strings are bytes, so that they may be no UTF-8. A sensible value (TAME) gets an input past the
first check, to where the second one is.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from random import Random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from tests.support.fuzz_beside import BESIDE_TAME
from tests.support.fuzz_constraints import choices, grammar, json_schema, parameters, regex

VOCAB_SIZE = 49152
MODEL = "smollm2"
WORDS = (
    b"the river was wide and slow and nobody knew where it began so they asked an old man who sat "
    b"by the water he said that it came from the mountains and went to the sea as rivers do"
).split()

FLOATS = (
    *(0.0, -0.0, 1.0, -1.0, 0.5, 2.0, -2.0, 1e-5, 9.9e-6, 1e-45, 1.1754944e-38, 3.4028235e38),
    *(-3.4028235e38, float("inf"), float("-inf"), float("nan"), 1e-3, 1e3, 1.0000001, 100.0),
)
DOUBLES = (*FLOATS, 5e-324, 1.7976931348623157e308, 1e9, 1e9 + 1)
UNSIGNED = (0, 1, 2, 15, 16, 17, 127, 128, 255, 256, 65535, VOCAB_SIZE - 1, VOCAB_SIZE, 2**31 - 1)
UINT32 = (*UNSIGNED, 2**31, 2**32 - 1, 2**32, 2**35, 2**64 - 1)  # the last ones do not fit
INT32 = (0, 1, -1, 2**31 - 1, -(2**31), 2**31, 2**63 - 1, -(2**63))
UINT64 = (*UNSIGNED, 2**32, 2**63, 2**64 - 1)

STRINGS = (
    b"",
    b"a",
    b" ",
    b"\n",
    b"\x00",
    b"a\x00b",
    b"hello world",
    MODEL.encode(),
    b"gpt-5",
    b"<|im_start|>system\nno<|im_end|>\n<|im_start|>assistant\n",
    b"<|endoftext|>" * 3,
    b"<|im_end|>",
    "שלום \u202eعالم\u202c مرحبا".encode(),
    "e\u0301\u0302\u0303".encode() * 40,
    "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f1e9\U0001f1ea".encode(),
    "\ufeff\ufffe\uffff\U0010ffff".encode(),
    "\u2028\u2029\x85\x0b".encode(),
    b"\x1b[31mred\x1b[0m\r\x07",
    b"%s%n%x {0} {__class__} ${jndi:x} `id` '; --",
    b"{{ 7 * 7 }}{% for m in messages %}{{ m }}{% endfor %}",
    b'{"type": "object", "properties": {"a": {"$ref": "#"}}}',
    b"(a+)+$",
    b"../../../../etc/passwd",
    b"\xed\xa0\x80",  # a lone surrogate
    b"\xed\xa0\xbd\xed\xb8\x80",  # a pair of them
    b"\xff\xfe",
    b"\xc0\x80",  # NUL, too long
    b"\xf4\x90\x80\x80",  # above U+10FFFF
    b"ab\xe2\x82",  # cut in the middle of a character
)
ROLES = (b"system", b"user", b"assistant", b"tool", b"user")

TOOLS = (
    b'[{"type": "function", "function": {"name": "look_up", "description": "a word",'
    b' "parameters": {"type": "object", "properties": {"word": {"type": "string"}}}}}]'
)

Tame = Callable[[Random], Any]


def text(random: Random, num_words: int) -> bytes:
    """Words, as a person may write them."""
    return b" ".join(random.choices(WORDS, k=num_words))


def _tokens(random: Random) -> list[int]:
    return [random.randrange(VOCAB_SIZE) for _ in range(random.choice((1, 2, 15, 16, 17, 33, 60)))]


def _few_tokens(random: Random) -> list[int]:
    return [random.randrange(VOCAB_SIZE) for _ in range(random.randrange(4))]


# By message and field; None: left out, for it is not offered or ends the request at once.
TAME: dict[str, Tame | None] = {
    "request_id": lambda r: f"fuzz-{r.randrange(10**9)}".encode(),
    "model": lambda r: MODEL.encode(),
    "text": lambda r: text(r, r.randrange(1, 60)),
    "content": lambda r: text(r, r.randrange(0, 20)),
    "role": lambda r: r.choice(ROLES),
    "TokenIds.ids": _tokens,
    "DetokenizeRequest.token_ids": _tokens,
    "Resume.index": lambda r: 0,
    "Resume.token_ids": lambda r: _few_tokens(r) if r.random() < 0.3 else [],
    "temperature": lambda r: r.choice((0.0, 0.3, 1.0, 1.5)),
    "top_p": lambda r: r.choice((0.1, 0.9, 1.0)),
    "top_k": lambda r: r.choice((0, 1, 40)),
    "min_p": lambda r: r.choice((0.0, 0.05, 1.0)),
    "frequency_penalty": lambda r: r.uniform(-2, 2),
    "presence_penalty": lambda r: r.uniform(-2, 2),
    "repetition_penalty": lambda r: r.uniform(0.5, 2),
    "seed": lambda r: r.getrandbits(64),
    "logit_bias": lambda r: [(r.randrange(VOCAB_SIZE), r.uniform(-100, 100)) for _ in range(3)],
    "max_tokens": lambda r: r.randrange(1, 25),
    "min_tokens": lambda r: r.choice((0, 0, 1)),
    "stop": lambda r: [r.choice(WORDS) for _ in range(r.randrange(4))],
    "stop_token_ids": _few_tokens,
    "priority": lambda r: r.randrange(-3, 4),
    "cache_salt": lambda r: b"salt",
    "worker_id": lambda r: b"unknown-7",  # never one that is there: it would be drained
    "deadline_s": lambda r: r.choice((0.0, 1.0, 30.0)),
    "n": lambda r: r.choice((1, 1, 1, 2, 3)),
    "logprobs": lambda r: r.randrange(6),
    "prompt_logprobs": lambda r: r.randrange(3),
    "echo": lambda r: r.randrange(2),
    "name": lambda r: b"look_up",
    "arguments": lambda r: b'{"word": "river"}',
    "tools_json": lambda r: TOOLS if r.random() < 0.8 else parameters(r),
    "template_kwargs_json": lambda r: r.choice((b"", b"{}", b'{"enable_thinking": false}')),
    "mode": lambda r: r.choice((0, 0, 1, 1, 2, 3)),
    "ToolCall.id": lambda r: b"call-1",
    "tool_call_id": lambda r: b"call-1",
    "Constraint.json_schema": json_schema,
    "Constraint.regex": regex,
    "Constraint.grammar": grammar,
    "Choices.choices": choices,
    **BESIDE_TAME,
}
# Sensible requests have these.
NEEDED = frozenset(
    (
        *("messages", "role", "content", "prompt", "input", "TokenIds.ids"),
        *("kind", "Choices.choices", "ToolCall.name"),
        *("ModelInferRequest.model_name", "ModelInferRequest.inputs", "TokenizedInput.input_ids"),
        *("parameter_choice", "ChoiceConstraint.choices"),
    )
)


def edge(random: Random, field: FieldDescriptor) -> Any:
    """A value at an edge of a scalar field's type, or any of it; strings are short ones."""
    kind = field.type
    if kind in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES):
        return _string(random)
    if kind == FieldDescriptor.TYPE_FLOAT:
        return random.choice((*FLOATS, _any_float(random), random.uniform(-3, 3)))
    if kind == FieldDescriptor.TYPE_DOUBLE:
        return random.choice((*DOUBLES, random.uniform(-1e3, 1e3)))
    if kind == FieldDescriptor.TYPE_BOOL:
        return random.choice((0, 1, 2, 2**64 - 1))
    if kind in (FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_INT64):
        return random.choice((*INT32, random.randrange(-(2**31), 2**31)))
    if kind == FieldDescriptor.TYPE_UINT64:
        return random.choice((*UINT64, random.getrandbits(64)))
    return random.choice((*UINT32, random.getrandbits(32), random.randrange(VOCAB_SIZE)))


def _any_float(random: Random) -> float:
    (value,) = struct.unpack("<f", random.randbytes(4))
    return float(value)


def long_string(random: Random) -> bytes:
    """A hundred thousand characters or more."""
    return random.choice((b"a", "é".encode(), b"word ", b"<|im_start|>", b"\x00")) * 100_000


def _string(random: Random) -> bytes:
    drawn = random.random()
    if drawn < 0.1:
        return random.choice(STRINGS) * random.choice((2, 17, 128, 129, 1024, 1025))
    if drawn < 0.2:
        return random.randbytes(random.choice((1, 3, 100)))
    if drawn < 0.3:
        return "".join(chr(random.choice((0x41, 0xE9, 0x4E2D, 0x1F600))) for _ in range(9)).encode()
    return random.choice(STRINGS)
