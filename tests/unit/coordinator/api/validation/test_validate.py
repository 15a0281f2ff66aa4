import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.api import values
from coordinator.api.validation.request import validate
from coordinator.text.served_model import Limits
from engine.base.errors import InvalidRequest, NotFound
from engine.base.seeds import choice_seed, default_seed
from engine.base.types import Constraint
from engine.base.types import ConstraintKind as K
from engine.pb.diptych.v1 import inference_pb2 as pb
from tests.support.validated import validated

LIMITS = Limits("m", 100, (2, 0), 1000)


def generate(**fields):
    fields.setdefault("text", "hello")
    return pb.GenerateRequest(**fields)


def refused_field(request):
    with pytest.raises(InvalidRequest) as caught:
        validated(request, LIMITS)
    assert caught.value.description
    return caught.value.field


def test_defaults():
    got = validated(generate(), LIMITS)
    assert got.sampling.greedy
    assert got.sampling.top_p == 1.0
    assert got.sampling.repetition_penalty == 1.0
    assert got.sampling.seed == default_seed(got.request_id)
    assert (got.max_tokens, got.default_max_tokens) == (None, 256)
    assert got.stop_token_ids == {0, 2}
    assert got.skip_special_tokens
    assert len(got.request_id) == 32
    chat = pb.ChatRequest(messages=[pb.Message(role="user", content="")])
    assert validated(chat, LIMITS).default_max_tokens is None


def test_values_are_carried():
    request = generate(
        request_id="r",
        model="m",
        sampling=pb.Sampling(temperature=0.5, seed=0, logit_bias={7: -100, 3: 2}),
        stop=pb.Stop(max_tokens=9, min_tokens=2, stop=["a"], stop_token_ids=[5], ignore_eos=True),
        output=pb.Output(skip_special_tokens=False),
        resume=[pb.Resume(token_ids=[1, 2])],
        n=1,
        priority=-3,
    )
    got = validated(request, LIMITS)
    assert got.sampling.seed == 0
    assert got.sampling.logit_bias == ((3, 2.0), (7, -100.0))
    assert got.stop_token_ids == {5}
    assert got.resume.token_ids == (1, 2)
    assert not got.skip_special_tokens
    assert got.priority == -3


BAD_SAMPLING = [
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("top_p", math.nan),
    ("min_p", -0.1),
    ("min_p", 1.5),
    ("frequency_penalty", 2.5),
    ("presence_penalty", -2.5),
    ("presence_penalty", math.nan),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", -1.0),
    ("repetition_penalty", math.inf),
    ("repetition_penalty", 1e-45),  # a logit divided by it overflows
    ("repetition_penalty", 3e38),
]


@pytest.mark.parametrize(("field", "value"), BAD_SAMPLING)
def test_sampling_ranges(field, value):
    request = generate(sampling=pb.Sampling(**{field: value}))
    assert refused_field(request) == f"sampling.{field}"


BAD = [
    (pb.GenerateRequest(), "prompt"),
    (pb.GenerateRequest(token_ids=pb.TokenIds()), "token_ids.ids"),
    (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 2, 3, 100])), "token_ids.ids[3]"),
    (generate(stop=pb.Stop(max_tokens=0)), "stop.max_tokens"),
    (generate(stop=pb.Stop(max_tokens=3, min_tokens=4)), "stop.min_tokens"),
    (generate(stop=pb.Stop(stop=["x"] * 17)), "stop.stop"),
    (generate(stop=pb.Stop(stop=["x", ""])), "stop.stop[1]"),
    (generate(stop=pb.Stop(stop_token_ids=[100])), "stop.stop_token_ids[0]"),
    (generate(sampling=pb.Sampling(logit_bias={100: 1})), "sampling.logit_bias[100]"),
    (generate(sampling=pb.Sampling(logit_bias={1: 101})), "sampling.logit_bias[1]"),
    (generate(sampling=pb.Sampling(logit_bias={1: math.nan})), "sampling.logit_bias[1]"),
    (generate(request_id="x" * 129), "request_id"),
    (generate(request_id="a\nb"), "request_id"),
    (generate(n=0), "n"),
    (generate(n=65), "n"),
    (generate(output=pb.Output(logprobs=21)), "output.logprobs"),
    (generate(output=pb.Output(prompt_logprobs=21)), "output.prompt_logprobs"),
    # Too long comes before a look at the ids: a message holds millions.
    (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[500] * 1001)), "token_ids.ids"),
    (generate(stop=pb.Stop(stop_token_ids=[500] * 101)), "stop.stop_token_ids"),
    (generate(stop=pb.Stop(min_tokens=1, stop_token_ids=range(100))), "stop.stop_token_ids"),
    (
        generate(sampling=pb.Sampling(logit_bias=dict.fromkeys(range(101), 0))),
        "sampling.logit_bias",
    ),
    (generate(resume=[pb.Resume(token_ids=[500] * 1001)]), "resume[0].token_ids"),
    (generate(cache_salt="x" * 2000), "cache_salt"),
    (generate(resume=[pb.Resume(), pb.Resume()]), "resume"),
    (generate(resume=[pb.Resume(affinity_token="x" * 129)]), "resume[0].affinity_token"),
    (generate(resume=[pb.Resume(index=1)]), "resume[0].index"),
    (generate(n=3, resume=[pb.Resume(index=3)]), "resume[0].index"),
    (generate(n=3, resume=[pb.Resume(index=1), pb.Resume(index=1)]), "resume[1].index"),
    (generate(n=2, resume=[pb.Resume(index=1, token_ids=[100])]), "resume[0].token_ids[0]"),
    (generate(resume=[pb.Resume(token_ids=[100])]), "resume[0].token_ids[0]"),
    (
        generate(resume=[pb.Resume(token_ids=[1, 2])], stop=pb.Stop(max_tokens=1)),
        "resume[0].token_ids",
    ),
]


@pytest.mark.parametrize(("request_", "field"), BAD, ids=[field for _, field in BAD])
def test_the_error_names_the_field(request_, field):
    assert refused_field(request_) == field


BAD_CHAT = [
    (pb.ChatRequest(), "messages"),
    (pb.ChatRequest(messages=[pb.Message(content="x")]), "messages[0].role"),
    (pb.ChatRequest(messages=[pb.Message(role="user")]), "messages[0].content"),
    (pb.ChatRequest(messages=[pb.Message(role="user", content="")] * 1001), "messages"),
]


@pytest.mark.parametrize(("request_", "field"), BAD_CHAT)
def test_chat_fields(request_, field):
    assert refused_field(request_) == field


def test_no_tokens_where_the_prompt_is_to_tell_something():
    nothing = pb.Stop(max_tokens=0)
    assert refused_field(generate(stop=nothing)) == "stop.max_tokens"
    assert refused_field(generate(stop=nothing, output=pb.Output(logprobs=1))) == "stop.max_tokens"
    for output in (pb.Output(echo=True), pb.Output(prompt_logprobs=0)):
        got = validated(generate(stop=nothing, output=output), LIMITS)
        assert got.max_tokens == 0
        assert got.returns_prompt
        resumed = [pb.Resume(finished=True)]
        again = validated(generate(stop=nothing, output=output, resume=resumed), LIMITS)
        assert not again.returns_prompt, "the client has it"


def test_choices_have_seeds_and_tokens_of_their_own():
    resume = [pb.Resume(index=2, token_ids=[7, 8], finished=True), pb.Resume(token_ids=[9])]
    got = validated(
        generate(n=3, resume=resume, sampling=pb.Sampling(seed=5), output=pb.Output(logprobs=0)),
        LIMITS,
    )
    assert (got.num_choices, got.num_logprobs, got.num_prompt_logprobs) == (3, 0, None)
    choices = [got.choice(i) for i in range(3)]
    assert [c.index for c in choices] == [0, 1, 2]
    assert [c.resume.token_ids for c in choices] == [(9,), (), (7, 8)]
    assert [c.resume.finished for c in choices] == [False, False, True]
    assert [c.sampling.seed for c in choices] == [choice_seed(5, i) for i in range(3)]
    assert choices[0].sampling.seed == 5
    assert got.choice(0).request_id == got.request_id


CONSTRAINTS = [
    (pb.Constraint(json_schema='{"type": "null"}'), K.JSON_SCHEMA, '{"type": "null"}'),
    (pb.Constraint(json_object=True), K.JSON_SCHEMA, '{"type": "object"}'),
    (pb.Constraint(regex="a+"), K.REGEX, "a+"),
    (pb.Constraint(grammar='start: "a"'), K.LARK, 'start: "a"'),
    (pb.Constraint(choice=pb.Choices(choices=["a", 'b"'])), K.LARK, 'start: "a" | "b\\""'),
]


@pytest.mark.parametrize(("asked", "kind", "source"), CONSTRAINTS)
def test_constraints_become_a_kind_and_a_source(asked, kind, source):
    assert validated(generate(constraint=asked), LIMITS).constraint == Constraint(kind, source)
    turn = pb.Message(role="user", content="x")
    chat = pb.ChatRequest(messages=[turn], constraint=asked)
    assert validated(chat, LIMITS).constraint == Constraint(kind, source)


BAD_CONSTRAINTS = [
    (pb.Constraint(json_schema=" "), "constraint.json_schema"),
    (pb.Constraint(json_schema="x" * (2**20 + 1)), "constraint.json_schema"),
    (pb.Constraint(regex=""), "constraint.regex"),
    (pb.Constraint(regex="x" * (2**14 + 1)), "constraint.regex"),
    (pb.Constraint(grammar="x" * (2**16 + 1)), "constraint.grammar"),
    (pb.Constraint(choice=pb.Choices()), "constraint.choice.choices"),
    (pb.Constraint(choice=pb.Choices(choices=["x"] * 1001)), "constraint.choice.choices"),
    (pb.Constraint(choice=pb.Choices(choices=["x" * 40000] * 2)), "constraint.choice.choices"),
    (pb.Constraint(choice=pb.Choices(choices=["x", ""])), "constraint.choice.choices[1]"),
]


@pytest.mark.parametrize(("asked", "field"), BAD_CONSTRAINTS)
def test_constraints_out_of_bounds(asked, field):
    assert refused_field(generate(constraint=asked)) == field


def test_what_is_off_is_not_refused():
    validated(generate(n=1, output=pb.Output(echo=False), constraint=pb.Constraint()), LIMITS)
    off = pb.Constraint(json_object=False)
    assert validated(generate(constraint=off), LIMITS).constraint is None


def test_unknown_model():
    with pytest.raises(NotFound, match="other"):
        validated(generate(model="other"), LIMITS)


@given(st.binary(max_size=200))
def test_any_message_that_parses_is_judged(raw):
    try:
        request = pb.GenerateRequest.FromString(raw)
    except Exception:
        return
    try:
        got = validated(request, LIMITS)
    except (InvalidRequest, NotFound):
        return
    assert got.text or got.token_ids
    assert 0 <= got.sampling.top_p <= 1
    assert math.isfinite(got.sampling.temperature)


def test_numbers_are_rounded_as_workers_get_them():
    """Values of HTTP are doubles; those of gRPC are 32 bits. Both are the same request."""
    for sampling in (
        values.Sampling(temperature=0.699999988079071),
        values.Sampling(temperature=0.7),
    ):
        request = values.GenerateRequest(text="x", sampling=sampling)
        assert validate(request, LIMITS).sampling.temperature == 0.699999988079071
    request = values.GenerateRequest(text="x", sampling=values.Sampling(logit_bias={2: 0.1, 1: 5}))
    assert validate(request, LIMITS).sampling.logit_bias == ((1, 5.0), (2, 0.10000000149011612))
    for name in ("temperature", "top_p"):
        too_large = values.Sampling(**{name: 1e39})
        with pytest.raises(InvalidRequest, match=f"sampling.{name}: inf"):
            validate(values.GenerateRequest(text="x", sampling=too_large), LIMITS)
