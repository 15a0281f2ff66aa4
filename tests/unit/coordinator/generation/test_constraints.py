"""Constraints at the coordinator, over the wire: refused with the reason, or passed on."""

import asyncio
import itertools
import json
import re

import grpc
import pytest
from google.rpc import error_details_pb2
from llguidance import LLParserLimits

from coordinator.text import served_model as model_module
from engine.constraints import Checker, Vocabulary
from engine.constraints import grammar as grammar_module
from engine.constraints.single_flight_cache import SingleFlightCache
from engine.pb.diptych.internal.v1 import worker_pb2
from engine.pb.diptych.v1 import inference_pb2
from tests.support.constrained_front import SCHEMA, TEXT, front
from tests.support.fake_decode import Cue, lost
from tests.support.grpc_front import collect, details_of, error_of, read, stop


@pytest.fixture(scope="module", autouse=True)
def checker(checkpoint):
    """One set of processes for all tests: their start takes a second."""
    found, _, _ = checkpoint
    config = found.config
    made = Checker(Vocabulary(found.folder, config.vocab_size, config.eos_token_ids))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_module, "Checker", lambda vocabulary: made)
        patch.setattr(made, "close", lambda: None)
        yield made
    made.close()


def constraint(**kind):
    return inference_pb2.Constraint(**kind)


def schema(value=SCHEMA):
    return constraint(json_schema=json.dumps(value))


BAD = [
    (constraint(json_schema='{"type":'), "constraint", "not JSON"),
    (schema({"not": {}}), "constraint", 'Unimplemented keys: ["not"]'),
    (constraint(regex="("), "constraint", "unclosed group"),
    (constraint(regex=""), "constraint.regex", "empty"),
    (constraint(grammar="start: b"), "constraint", 'unknown name: "b"'),
    (
        constraint(choice=inference_pb2.Choices(choices=["a", ""])),
        "constraint.choice.choices[1]",
        "empty",
    ),
]


@pytest.mark.parametrize(("asked", "field", "reason"), BAD)
async def test_what_cannot_be_compiled_is_refused_and_reaches_no_worker(
    checkpoint,
    asked,
    field,
    reason,
):
    async with front(checkpoint) as f:
        worker = await f.worker()
        error = await error_of(f.call(constraint=asked))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        (violation,) = details_of(error, error_details_pb2.BadRequest).field_violations
        assert violation.field == field
        assert reason in violation.description
        assert not worker.requests


GOOD = [
    (schema(), worker_pb2.Constraint.KIND_JSON_SCHEMA, json.dumps(SCHEMA)),
    (constraint(json_object=True), worker_pb2.Constraint.KIND_JSON_SCHEMA, '{"type": "object"}'),
    (constraint(regex=r"\{.*\}"), worker_pb2.Constraint.KIND_REGEX, r"\{.*\}"),
    (constraint(grammar="start: /.*/"), worker_pb2.Constraint.KIND_LARK, "start: /.*/"),
    (
        constraint(choice=inference_pb2.Choices(choices=[TEXT, 'a"'])),
        worker_pb2.Constraint.KIND_LARK,
        f"start: {json.dumps(TEXT)} | {json.dumps(chr(97) + chr(34))}",
    ),
]


@pytest.mark.parametrize(("asked", "kind", "source"), GOOD)
async def test_workers_get_the_kind_and_the_source(checkpoint, asked, kind, source):
    async with front(checkpoint) as f:
        worker = await f.worker(ends_by_itself=True)
        text, _, finished = read(await collect(f.call(constraint=asked)))
        assert text == TEXT
        assert finished.finish_reason == inference_pb2.FINISH_REASON_STOP
        assert not finished.HasField("matched_stop")
        (request,) = worker.requests
        assert (request.constraint.kind, request.constraint.source) == (kind, source)


async def test_whether_a_full_answer_has_ended_the_worker_says(checkpoint):
    async with front(checkpoint) as f:
        full = len(f.answer)
        cues = [Cue(full, lost())]  # after the last token, before the finish
        await f.worker("d0", cues=cues, ends_by_itself=True)
        second = await f.worker("d1", ends_by_itself=True)
        fields = {"constraint": schema(), "stop": stop(max_tokens=full)}
        text, ids, finished = read(await collect(f.call(**fields)))
        assert text == TEXT
        assert ids == f.answer
        assert finished.finish_reason == inference_pb2.FINISH_REASON_STOP
        assert list(second.requests[0].output_token_ids) == f.answer
        shorter = {**fields, "stop": stop(max_tokens=full - 1)}
        _, ids, finished = read(await collect(f.call(**shorter)))
        assert ids == f.answer[:-1]
        assert finished.finish_reason == inference_pb2.FINISH_REASON_LENGTH


async def test_what_is_resumed_must_fit(checkpoint):
    async with front(checkpoint) as f:
        worker = await f.worker(ends_by_itself=True)
        resume = [inference_pb2.Resume(token_ids=f.answer[:5])]
        _, ids, _ = read(await collect(f.call(constraint=schema(), resume=resume)))
        assert ids == f.answer[5:]
        wrong = f.coordinator.model.tokenizer.encode("Once upon a time")
        resume = [inference_pb2.Resume(token_ids=wrong)]
        error = await error_of(f.call(constraint=schema(), resume=resume))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        (violation,) = details_of(error, error_details_pb2.BadRequest).field_violations
        assert violation.field == "resume"
        assert "do not fit" in violation.description
        assert len(worker.requests) == 1


async def test_a_large_schema_does_not_hold_others_up(checkpoint):
    """Its compilation takes long; a short answer beside it does not."""
    async with front(checkpoint) as f:
        await f.worker()
        await collect(f.call(constraint=schema(), stop=stop(max_tokens=1)))  # the threads are ready
        names = [f"p{i}" for i in range(2000)]
        large = schema({"properties": {n: {"type": "string"} for n in names}, "required": names})
        loop = asyncio.get_running_loop()
        begun = loop.time()
        slow = asyncio.create_task(collect(f.call(constraint=large, stop=stop(max_tokens=1))))
        longest = 0.0
        while not slow.done():
            before = loop.time()
            await collect(f.call(stop=stop(max_tokens=3)))
            longest = max(longest, loop.time() - before)
        took = loop.time() - begun
        await slow
        assert longest < max(0.5, took / 2), f"{longest:.2f} s of {took:.2f} s"


def tool(name, parameters, strict=False):
    return {
        "type": "function",
        "function": {"name": name, "parameters": parameters, "strict": strict},
    }


def asks(*tools, choice=None, **fields):
    return inference_pb2.ChatRequest(
        messages=[inference_pb2.Message(role="user", content="x")],
        tools_json=json.dumps(tools),
        tool_choice=choice,
        **fields,
    )


def properties(**schemas):
    return {"type": "object", "properties": schemas, "additionalProperties": False}


FINE = tool("good", properties(n={"type": "integer"}), strict=True)
MODES = inference_pb2.ToolChoice
REQUIRED = MODES(mode=MODES.MODE_REQUIRED)
CHOICES = [None, MODES(mode=MODES.MODE_AUTO), REQUIRED, MODES(name="bad")]
# schemas that cannot be compiled, and their reduced forms
LOST = {
    "lookahead": (
        properties(a={"type": "string", "pattern": "^(?=x)y$", "maxLength": 3}),
        properties(a={"type": "string", "maxLength": 3}),
    ),
    "type any": (properties(a={"type": "any"}), properties(a={})),
    "dangling": (
        properties(a={"$ref": "#/$defs/b"}, c={"type": "null"}),
        properties(a={}, c={"type": "null"}),
    ),
    "elsewhere": (properties(a={"$ref": "https://example.com/a"}), properties(a={})),
    "required null": (
        {**properties(a={"type": "null"}), "required": None},
        properties(a={"type": "null"}),
    ),
    "in a definition": (
        {
            **properties(a={"$ref": "#/$defs/b"}, d={"$ref": "#/properties/a"}),
            "$defs": {"b": properties(c={"type": "foo"}, e={"const": 1})},
        },
        {
            **properties(a={"$ref": "#/$defs/part0"}, d={"$ref": "#/$defs/part1"}),
            "$defs": {
                "part0": properties(c={}, e={"const": 1}),
                "part1": {"$ref": "#/$defs/part0"},
            },
        },
    ),
    "a branch": (
        properties(a={"anyOf": [{"type": "null"}, {"type": "object", "properties": None}]}),
        properties(a={"anyOf": [{"type": "null"}, {"type": "object"}]}),
    ),
    "too large": (
        properties(a={"type": "string", "minLength": 1 << 40}),
        properties(a={"type": "string"}),
    ),
}


async def test_a_lax_tool_loses_what_cannot_be_compiled_and_others_keep_theirs(
    checkpoint,
):
    async with front(checkpoint) as f:
        worker = await f.worker()
        for (case, (bad, left)), choice in itertools.product(LOST.items(), CHOICES):
            request = asks(FINE, tool("bad", bad), choice=choice, stop=stop(max_tokens=1))
            await collect(f.stub.Chat(request, timeout=30))
            source = worker.requests[-1].constraint.source
            *others, mine = map(json.loads, re.findall(r"^args_\d: %json (.*)$", source, re.M))
            mine.pop("x-guidance")
            assert mine == left, case
            assert len(others) == (choice is None or not choice.name)
            for other in others:
                assert other["properties"] == {"n": {"type": "integer"}}


async def test_a_strict_tool_that_cannot_be_compiled_is_refused_by_its_index(
    checkpoint,
):
    async with front(checkpoint) as f:
        await f.worker()
        for (case, (bad, _)), choice in itertools.product(LOST.items(), CHOICES):
            request = asks(FINE, tool("bad", bad, strict=True), choice=choice)
            error = await error_of(f.stub.Chat(request, timeout=30))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, case
            (violation,) = details_of(error, error_details_pb2.BadRequest).field_violations
            assert violation.field == "tools_json[1].function.parameters"
            assert "start:" not in violation.description
        assert f.workers[0].requests == []


async def test_the_schema_of_text_is_named_where_it_cannot_be_compiled(checkpoint):
    async with front(checkpoint) as f:
        await f.worker()
        bad = schema({"type": "any"})
        error = await error_of(f.stub.Chat(asks(FINE, constraint=bad), timeout=30))
        (violation,) = details_of(error, error_details_pb2.BadRequest).field_violations
        assert violation.field == "constraint.json_schema"


async def test_what_is_too_much_together_is_held_in_part(checkpoint, checker, monkeypatch):
    """The longest lax schemas are dropped first, strict ones never."""

    def large(name, count, **more):
        enums = {f"p{i}": {"enum": [f"{name}{i}", f"{i}"]} for i in range(count)}
        return tool(name, properties(**enums), **more)

    tools = [large("a", 30), large("b", 31), large("c", 32, strict=True), FINE]
    config = checkpoint[0].config
    vocabulary = Vocabulary(checkpoint[0].folder, config.vocab_size, config.eos_token_ids)
    tokenizer = vocabulary.build()

    async def here(job):
        return await asyncio.to_thread(job, tokenizer)

    async with front(checkpoint) as f:
        worker = await f.worker()
        monkeypatch.setattr(grammar_module, "LIMITS", LLParserLimits(max_grammar_size=650))
        monkeypatch.setattr(checker, "_try", here)
        monkeypatch.setattr(checker, "cache", SingleFlightCache(lambda found: (), (), 9))
        await collect(f.stub.Chat(asks(*tools, stop=stop(max_tokens=1)), timeout=30))
        source = worker.requests[-1].constraint.source
        schemas = [json.loads(s) for s in re.findall(r"^args_\d: %json (.*)$", source, re.M)]
        assert [len(s.get("properties", ())) for s in schemas] == [30, 0, 32, 1]
        tools = [large("a", 30, strict=True), large("b", 31, strict=True), tools[2]]
        error = await error_of(f.stub.Chat(asks(*tools), timeout=30))
        (violation,) = details_of(error, error_details_pb2.BadRequest).field_violations
        assert violation.field == "tools_json"


async def test_a_format_that_is_not_known_is_an_annotation(checkpoint):
    async with front(checkpoint) as f:
        worker = await f.worker()
        part = {"type": "string", "format": "colour"}
        await collect(f.call(constraint=schema(part), stop=stop(max_tokens=1)))
        await collect(f.stub.Chat(asks(tool("f", properties(a=part))), timeout=30))
        assert "colour" not in worker.requests[-1].constraint.source
        strict = asks(tool("f", properties(a=part), strict=True))
        error = await error_of(f.stub.Chat(strict, timeout=30))
        (violation,) = details_of(error, error_details_pb2.BadRequest).field_violations
        assert violation.field == "tools_json[0].function.parameters"
        assert "format: 'colour' is not known" in violation.description
