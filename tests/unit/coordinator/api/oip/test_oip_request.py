"""The Open Inference Protocol's requests and responses as pure functions."""

import json
import struct

import hypothesis
import hypothesis.strategies as st
import pytest

from coordinator.api.oip import model as oip_model
from coordinator.api.oip.neutral import NEUTRAL
from coordinator.api.oip.options import OPTIONS
from coordinator.api.oip.request import read_request
from coordinator.api.oip.responses import FINAL, ResponseBuilder
from coordinator.api.oip.tensors import Tensor, read_tensors, write_tensor
from coordinator.api.validation.request import validate
from coordinator.api.values import Constraint, GenerateRequest, Output, Sampling, Stop
from coordinator.generation.events import Delta, PromptEvent
from coordinator.text.served_model import Limits
from engine.base.errors import DiptychError, InvalidRequest, NotFound
from engine.base.types import FinishReason
from engine.pb.diptych.v1 import inference_pb2
from engine.pb.inference import grpc_service_pb2 as pb
from engine.pb.inference import model_config_pb2
from tests.support.answer_events import finished, scored

MODEL = "smollm2"
LIMITS = Limits(MODEL, 1000, (2,), 500)
RANGES = {
    "BOOL": st.booleans(),
    "INT8": st.integers(-128, 127),
    "INT16": st.integers(-(2**15), 2**15 - 1),
    "INT32": st.integers(-(2**31), 2**31 - 1),
    "INT64": st.integers(-(2**63), 2**63 - 1),
    "UINT8": st.integers(0, 255),
    "UINT16": st.integers(0, 2**16 - 1),
    "UINT32": st.integers(0, 2**32 - 1),
    "UINT64": st.integers(0, 2**64 - 1),
    "FP32": st.floats(width=32, allow_nan=False),
    "FP64": st.floats(allow_nan=False),
    "BYTES": st.binary(max_size=20),
}


def packed(*values):
    return b"".join(struct.pack("<I", len(v)) + v for v in values)


def ask(text="Hello", shape=(1,), raw=False, **parameters):
    """A request for `text`; parameters by their Python type."""
    request = pb.ModelInferRequest(model_name=MODEL, id="r")
    tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=shape)
    if raw:
        request.raw_input_contents.append(packed(text.encode()))
    else:
        tensor.contents.bytes_contents.append(text.encode())
    set_parameters(request, **parameters)
    return request


def set_parameters(request, **parameters):
    for name, value in parameters.items():
        parameter = request.parameters[name]
        match value:
            case bool():
                parameter.bool_param = value
            case int():
                parameter.int64_param = value
            case float():
                parameter.double_param = value
            case str():
                parameter.string_param = value


def add(request, name, datatype, shape, *values):
    """One more input in typed contents."""
    fields = {"BYTES": "bytes", "BOOL": "bool", "INT32": "int", "FP32": "fp32", "UINT64": "uint64"}
    tensor = request.inputs.add(name=name, datatype=datatype, shape=shape)
    getattr(tensor.contents, fields[datatype] + "_contents").extend(values)
    return request


def refused(request, *parts, kind=InvalidRequest):
    with pytest.raises(kind) as caught:
        read_request(request, MODEL)
    for part in parts:
        assert part in caught.value.message, caught.value.message


@hypothesis.given(st.data())
def test_tensors_of_all_types_come_back_as_they_were(data):
    datatype = data.draw(st.sampled_from(sorted(RANGES)))
    rows, columns = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    values = data.draw(st.lists(RANGES[datatype], min_size=rows * columns, max_size=rows * columns))
    raw = data.draw(st.booleans())
    tensor = Tensor("x", datatype, (rows, columns), values)
    response = pb.ModelInferResponse()
    write_tensor(response, tensor, raw=raw)
    request = pb.ModelInferRequest(raw_input_contents=response.raw_output_contents)
    out = response.outputs[0]
    request.inputs.add(name="x", datatype=out.datatype, shape=out.shape, contents=out.contents)
    back = read_tensors(request)["x"]
    assert (back.datatype, back.shape, list(back.values)) == (datatype, (rows, columns), values)


@hypothesis.given(
    st.sampled_from(sorted(RANGES)),
    st.lists(st.integers(-2, 2**62), max_size=3),
    st.binary(max_size=40),
)
def test_any_raw_bytes_are_read_or_refused(datatype, shape, raw):
    request = pb.ModelInferRequest(raw_input_contents=[raw])
    request.inputs.add(name="x", datatype=datatype, shape=shape)
    try:
        tensor = read_tensors(request)["x"]
    except InvalidRequest as error:
        assert error.field.startswith("inputs.x")
    else:
        count = 1
        for size in shape:
            count *= size
        assert len(tensor.values) == count


def test_a_request_keeps_to_one_way_of_carrying_elements():
    request = ask(raw=True)
    request.inputs[0].contents.bytes_contents.append(b"x")
    refused(request, "inputs.text_input.contents", "raw_input_contents")
    request = ask(raw=True)
    request.raw_input_contents.append(b"")
    refused(request, "raw_input_contents", "2 entries for 1 inputs")
    request = ask()
    request.inputs[0].parameters["shared_memory_region"].string_param = "r"
    refused(request, "shared memory is not served")
    request = ask()
    request.inputs.append(request.inputs[0])
    refused(request, "inputs.text_input", "given twice")
    request = ask()
    request.inputs[0].datatype = "FP16"
    refused(request, "inputs.text_input.datatype", "FP16")


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
@pytest.mark.parametrize("raw", [False, True])
def test_a_prompt_with_and_without_a_batch_dimension(shape, raw):
    asked = read_request(ask("Grüße", shape, raw), MODEL)
    assert asked.generate.text == "Grüße"
    assert asked.batched == (len(shape) == 2)
    assert asked.raw == raw
    assert asked.outputs == ("text_output", "finish_reason")
    assert not asked.streaming
    assert asked.timeout_s is None


@pytest.mark.parametrize("shape", [(), (2,), (1, 2), (2, 1), (1, 1, 1), (0,)])
def test_other_shapes_are_refused(shape):
    count = 1
    for size in shape:
        count *= size
    request = pb.ModelInferRequest(raw_input_contents=[packed(*[b"x"] * count)])
    request.inputs.add(name="text_input", datatype="BYTES", shape=shape)
    refused(request, "inputs.text_input.shape", "one prompt")


def test_prompts_that_are_none():
    refused(pb.ModelInferRequest(), "neither of text_input and input_ids")
    refused(add(ask(), "input_ids", "INT32", [1], 5), "both of text_input and input_ids")
    request = pb.ModelInferRequest()
    add(request, "text_input", "INT32", [1], 5)
    refused(request, "inputs.text_input.datatype", "expected BYTES")
    refused(bad_utf8(), "inputs.text_input", "UTF-8 at byte 1")
    refused(add(ask(), "text", "BYTES", [1], b"x"), "inputs.text", "not known")


def bad_utf8():
    request = ask()
    request.inputs[0].contents.bytes_contents[0] = b"a\xff"
    return request


def test_token_ids():
    request = add(pb.ModelInferRequest(), "input_ids", "INT32", [1, 3], 5, 6, 7)
    add(request, "input_lengths", "INT32", [1, 1], 3)
    asked = read_request(request, MODEL)
    assert list(asked.generate.token_ids) == [5, 6, 7]
    assert asked.outputs == ("text_output", "finish_reason", "output_ids")
    request.inputs[1].contents.int_contents[0] = 4
    refused(request, "inputs.input_lengths", "4; input_ids has 3")
    refused(add(pb.ModelInferRequest(), "input_ids", "INT32", [2], 5, -1), "inputs.input_ids[1]")
    refused(add(pb.ModelInferRequest(), "input_ids", "FP32", [1], 5), "expected one of INT32")
    empty = read_request(add(pb.ModelInferRequest(), "input_ids", "INT32", [0]), MODEL)
    assert list(empty.generate.token_ids) == []  # the frontend refuses it as empty


def test_every_option_is_served_by_every_carrier():
    values = {
        "logit_bias": '{"5": 1.5}',
        "stop": "x",
        "choice": "x",
        "json_object": True,
        "cache_salt": "s",
        "json_schema": "{}",
        "regex": "a",
        "grammar": "g",
    }
    for name, option in OPTIONS.items():
        value = values.get(name)
        if value is None:
            value = {bool: True, float: 0.5}.get(option.type, 3)
        tensor = ask()
        spec = next(spec for spec in oip_model.INPUTS if spec.name == name)
        element = value.encode() if isinstance(value, str) else value
        add(tensor, name, spec.datatype, [1], element)
        carriers = (
            ask(**{name: value}),
            tensor,
            add(ask(), "sampling_parameters", "BYTES", [1], json.dumps({name: value}).encode()),
        )
        for request in carriers:
            generate = read_request(request, MODEL).generate
            if option.part == "constraint":
                expected = ["x"] if name == "choice" else value
                assert generate.constraint == Constraint(name, expected)
                continue
            found = getattr(getattr(generate, option.part) if option.part else generate, name)
            if name == "logit_bias":
                assert found == {5: 1.5}
            else:
                assert found == ([value] if spec.dims == (-1,) else value), name


def test_options_are_the_fields_of_the_public_request():
    for option, part in (
        (inference_pb2.Sampling, "sampling"),
        (inference_pb2.Stop, "stop"),
        (inference_pb2.Output, "output"),
        (inference_pb2.Constraint, "constraint"),
    ):
        names = {name for name, found in OPTIONS.items() if found.part == part}
        assert names == set(option.DESCRIPTOR.fields_by_name)


def test_numbers_as_text_and_lists_as_json():
    generate = read_request(
        ask(
            temperature="0.5",
            max_tokens="20",
            top_k=-1,
            min_tokens=2.0,
            stop='["a", "b"]',
            stop_token_ids="[3, 4]",
            ignore_eos="true",
        ),
        MODEL,
    ).generate
    assert generate.sampling.temperature == 0.5
    assert generate.stop.max_tokens == 20
    assert generate.sampling.top_k is None
    assert generate.stop.min_tokens == 2
    assert list(generate.stop.stop) == ["a", "b"]
    assert list(generate.stop.stop_token_ids) == [3, 4]
    assert generate.stop.ignore_eos
    assert list(read_request(ask(stop="[END"), MODEL).generate.stop.stop) == ["[END"]


def test_a_request_as_tensorrt_llm_has_it():
    request = ask(shape=(1, 1))
    add(request, "max_tokens", "INT32", [1, 1], 9)
    add(request, "stop_words", "BYTES", [1, 2], b"x", b"")
    add(request, "bad_words", "BYTES", [1, 1], b"")
    add(request, "end_id", "INT32", [1, 1], 2)
    add(request, "pad_id", "INT32", [1, 1], 2)
    add(request, "random_seed", "UINT64", [1, 1], 2**63)
    add(request, "beam_width", "INT32", [1, 1], 1)
    add(request, "stream", "BOOL", [1, 1], True)
    asked = read_request(request, MODEL)
    assert asked.streaming
    assert asked.generate.stop.max_tokens == 9
    assert list(asked.generate.stop.stop) == ["x"]
    assert list(asked.generate.stop.stop_token_ids) == [2]
    assert asked.generate.sampling.seed == 2**63
    refused(ask(beam_width=4), "parameters.beam_width", "4", "not served")
    refused(add(ask(), "bad_words", "BYTES", [1], b"rude"), "inputs.bad_words", "not served")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_request_as_tensorrt_llms_backend_of_its_llm_api_has_it(streaming):
    request = ask(Streaming=False)
    for name, datatype, *values in [
        ("beam_width", "INT32", 1),
        ("temperature", "FP32", 0.5),
        ("top_k", "INT32", 7),
        ("top_p", "FP32", 0.0),
        ("frequency_penalty", "FP32", 0.0),
        ("max_tokens", "INT32", 9),
        ("stop", "BYTES", b"x", b"y"),
        ("seed", "UINT64", 5),
        ("exclude_input_from_output", "BOOL", False),
    ]:
        add(request, f"sampling_param_{name}", datatype, [len(values)], *values)
    add(request, "streaming", "BOOL", [1], streaming)
    add(request, "return_stop_reason", "BOOL", [1], False)
    asked = read_request(request, MODEL)
    assert asked.streaming == streaming
    assert asked.generate == GenerateRequest(
        model=MODEL,
        request_id="r",
        text="Hello",
        sampling=Sampling(temperature=0.5, top_k=7, frequency_penalty=0.0, seed=5),
        stop=Stop(max_tokens=9, stop=["x", "y"]),
        output=Output(echo=True),
    )
    again = add(request, "seed", "UINT64", [1], 6)
    refused(again, "inputs.seed", "given already, as inputs.sampling_param_seed")
    other = add(ask(), "sampling_param_beam_width", "INT32", [1], 4)
    refused(other, "inputs.sampling_param_beam_width", "4 is not served")
    refused(ask(sampling_param_x=1), "parameters.sampling_param_x", "not known")
    refused(ask(Streaming=True), "parameters.Streaming", "not served")


def test_a_request_as_the_client_of_vllms_backend_has_it():
    options = {"temperature": "0.1", "top_p": "0.95", "max_tokens": "100", "stop": "A", "seed": 7}
    request = ask(**{**options, "seed": "7"})
    add(request, "sampling_parameters", "BYTES", [1], json.dumps(options).encode())
    alone = add(ask(), "sampling_parameters", "BYTES", [1], json.dumps(options).encode())
    assert read_request(request, MODEL).generate == read_request(alone, MODEL).generate
    for name, other in (("temperature", "0.2"), ("stop", "a"), ("seed", 8)):
        request.parameters[name].CopyFrom(ask(**{name: other}).parameters[name])
        refused(request, f"sampling_parameters.{name}: given already", "with another value")
        request.parameters[name].CopyFrom(ask(**{name: str(options[name])}).parameters[name])


def every_default_of_tensorrt_llm():
    """The request of a client that fills in every input of the backend's configuration."""
    request = ask(shape=(1, 1))
    for name, datatype, *values in [
        ("max_tokens", "INT32", 9),
        ("num_return_sequences", "INT32", 1),
        ("bad_words", "BYTES", b""),
        ("stop_words", "BYTES", b"", b""),
        ("exclude_input_in_output", "BOOL", True),
        ("end_id", "INT32", 2),
        ("pad_id", "INT32", 0),
        ("top_k", "INT32", 0),
        ("top_p", "FP32", 0.0),
        ("temperature", "FP32", 1.0),
        ("length_penalty", "FP32", 1.0),
        ("repetition_penalty", "FP32", 1.0),
        ("min_length", "INT32", 1),
        ("presence_penalty", "FP32", 0.0),
        ("frequency_penalty", "FP32", 0.0),
        ("random_seed", "UINT64", 0),
        ("return_log_probs", "BOOL", False),
        ("return_context_logits", "BOOL", False),
        ("return_generation_logits", "BOOL", False),
        ("return_perf_metrics", "BOOL", False),
        ("beam_width", "INT32", 1),
        ("stream", "BOOL", False),
        ("prompt_vocab_size", "INT32", 0),
        ("embedding_bias_words", "BYTES"),
        ("embedding_bias_weights", "FP32"),
        ("num_draft_tokens", "INT32", 0),
        ("use_draft_logits", "BOOL", False),
        ("guided_decoding_guide_type", "BYTES", b""),
        ("guided_decoding_guide", "BYTES", b""),
        ("decoder_text_input", "BYTES", b""),
        ("runtime_top_p_min", "FP32", 1e-6),
        ("runtime_top_p_decay", "FP32", 1.0),
        ("runtime_top_p_reset_ids", "INT32", -1),
        ("beam_search_diversity_rate", "FP32", 0.0),
        ("early_stopping", "BOOL", True),
    ]:
        add(request, name, datatype, [1, len(values)], *values)
    add(request, "stop_words_list", "INT32", [1, 2, 2], 0, 0, -1, -1)
    return add(request, "bad_words_list", "INT32", [1, 2, 0])


def test_every_default_of_tensorrt_llms_clients_is_taken():
    asked = read_request(every_default_of_tensorrt_llm(), MODEL)
    assert asked.generate == GenerateRequest(
        model=MODEL,
        request_id="r",
        text="Hello",
        n=1,
        # No top_k and a top_p of 0: the likeliest token, whatever the temperature.
        sampling=Sampling(
            temperature=1.0,
            top_k=1,
            repetition_penalty=1.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            seed=0,
        ),
        stop=Stop(max_tokens=9, min_tokens=1, stop=[], stop_token_ids=[2]),
    )


@pytest.mark.parametrize(
    ("top_k", "top_p", "expected"),
    [
        (0, 0.0, (1, 1.0)),
        (-1, 0.0, (1, 1.0)),
        (None, 0.0, (1, 1.0)),
        (50, 0.0, (50, 1.0)),
        (-1, 0.5, (0, 0.5)),
        (0, 0.5, (0, 0.5)),
        (-1, None, (0, 1.0)),
        (7, 1.0, (7, 1.0)),
    ],
)
@pytest.mark.parametrize("names", [("top_k", "top_p"), ("runtime_top_k", "runtime_top_p")])
def test_filters_as_tensorrt_llm_reads_them(names, top_k, top_p, expected):
    given = {n: v for n, v in zip(names, (top_k, top_p), strict=True) if v is not None}
    text = {name: str(value) for name, value in given.items()}
    tensors = ask()
    for name, value in given.items():
        add(tensors, name, "INT32" if name.endswith("k") else "FP32", [1], value)
    vllms = add(ask(), "sampling_parameters", "BYTES", [1], json.dumps(text).encode())
    for request in (ask(**given), ask(**text), tensors, vllms):
        sampling = validate(read_request(request, MODEL).generate, LIMITS).sampling
        assert (sampling.top_k, sampling.top_p) == expected


# Every option that is not served, and values at which it would have an effect.
BEYOND = {
    "bad_words": ["rude", ["rude"]],
    "bad_words_list": [[5, 1]],
    "stop_words_list": [[5, 1]],
    "beam_width": [2, 0, "4", 10**400, "1e999", "NaN", "one"],
    "return_log_probs": [True, "true", 1],
    "return_context_logits": [True],
    "return_generation_logits": [True],
    "return_perf_metrics": [True],
    "no_repeat_ngram_size": [3],
    "length_penalty": [2.0],
    "top_p_decay": [0.9],
    "top_p_min": [0.1],
    "early_stopping": ["never"],
    "lora_task_id": [0, 7],
    "lora_name": ["x"],
    "prompt_vocab_size": [8],
    "embedding_bias": [[0.0, 1.0]],
    "embedding_bias_words": ["x"],
    "guided_decoding_guide": ["{}x"],
    "num_draft_tokens": [4],
    "use_beam_search": [True],
    "best_of": [2, "2"],
    "detokenize": [False],
    "allowed_token_ids": [[1, 2], "[1, 2]"],
    "logits_processors": [["x"]],
    "extra_args": [{"a": 1}],
    "logit_processors": ["[" * 900 + "]" * 900, json.loads("[" * 900 + "]" * 900)],
    "truncate_prompt_tokens": [5],
    "thinking_token_budget": [5],
    "image": ["abc"],
}


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_options_that_are_not_served_are_taken_at_neutral_values_alone(name):
    plain = read_request(ask(), MODEL).generate

    def carry(value):
        options = json.dumps({name: value}).encode()
        yield add(ask(), "sampling_parameters", "BYTES", [1], options)
        if isinstance(value, str | float) or (isinstance(value, int) and value < 2**63):
            yield ask(**{name: value})

    harmless = NEUTRAL[name]
    for value in ("", [], "[]", [""], *((5, "x") if harmless is None else harmless)):
        text = value if isinstance(value, str) else json.dumps(value)
        for request in [*carry(value), *carry(text)]:
            assert read_request(request, MODEL).generate == plain, value
    for value in BEYOND.get(name, []):
        for request in carry(value):
            refused(request, f".{name}: ", "not served")


def test_what_is_served_in_place_of_an_option_is_said():
    refused(ask(return_log_probs=True), "expected the option return_logprobs")
    kind = "guided_decoding_guide_type"
    refused(ask(**{kind: "json_schema"}), "expected the option json_schema, regex,")
    refused(ask(no_repeat_ngram_size=3), "leave it out")


def test_empty_stops_are_none():
    for request in (
        ask(stop=""),
        ask(stop="[]"),
        ask(stop='[""]'),
        add(ask(), "stop", "BOOL", [1], False),  # TensorRT-LLM's: do not end the request
        add(ask(), "stop_words", "BYTES", [1, 0]),
        ask(seed=-1),
    ):
        generate = read_request(request, MODEL).generate
        assert not generate.stop.stop
        assert generate.sampling == Sampling()
    assert list(read_request(ask(stop='["", "x"]'), MODEL).generate.stop.stop) == ["x"]


def test_a_request_as_vllms_backend_has_it():
    options = {
        "temperature": "0.1",
        "max_tokens": None,
        "structured_outputs": {"json": {"type": "object"}, "regex": None, "json_object": False},
    }
    request = add(ask(), "sampling_parameters", "BYTES", [1], json.dumps(options).encode())
    add(request, "return_num_input_tokens", "BOOL", [1], True)
    add(request, "return_logprobs", "BOOL", [1], True)
    add(request, "exclude_input_in_output", "BOOL", [1], False)
    asked = read_request(request, MODEL)
    assert json.loads(asked.generate.constraint.value) == {"type": "object"}
    assert asked.generate.stop.max_tokens is None
    assert asked.generate.output.echo
    assert asked.generate.output.logprobs == 0
    expected = ("text_output", "finish_reason", "num_input_tokens", "logprobs")
    assert asked.outputs == expected


@pytest.mark.parametrize("name", ["structured_outputs", "guided_decoding"])
def test_a_constraint_as_text_as_vllms_backend_wants_it(name):
    value = json.dumps({"choice": ["yes", "no"], "regex": None, "backend": "xgrammar"})
    options = json.dumps({name: value}).encode()
    for request in (
        add(ask(), "sampling_parameters", "BYTES", [1], options),
        ask(**{name: value}),  # a parameter of the request can be nothing but text
    ):
        asked = read_request(request, MODEL)
        assert asked.generate.constraint == Constraint("choice", ["yes", "no"])


def test_a_schema_that_nothing_fits_is_no_schema_that_is_off():
    options = json.dumps({"structured_outputs": {"json": False}}).encode()
    asked = read_request(add(ask(), "sampling_parameters", "BYTES", [1], options), MODEL)
    assert asked.generate.constraint.value == "false"


@pytest.mark.parametrize(
    ("parameters", "parts"),
    [
        ({"temprature": 1.0}, ["parameters.temprature", "not known", "temperature"]),
        ({"temperature": "hot"}, ["parameters.temperature", "expected a number"]),
        ({"temperature": True}, ["parameters.temperature", "expected a number"]),
        ({"max_tokens": 1.5}, ["parameters.max_tokens", "whole number"]),
        ({"max_tokens": -1}, ["parameters.max_tokens", "-1"]),
        ({"max_tokens": 2**40}, ["parameters.max_tokens"]),
        ({"ignore_eos": 1}, ["parameters.ignore_eos", "true or false"]),
        ({"streaming": "maybe"}, ["parameters.streaming", "true or false"]),
        ({"logit_bias": "[1]"}, ["parameters.logit_bias", "object"]),
        ({"logit_bias": "{"}, ["parameters.logit_bias", "JSON"]),
        ({"logit_bias": '{"x": 1}'}, ["parameters.logit_bias", "whole number"]),
        ({"sampling_parameters": "[" * 100_000}, ["sampling_parameters", "JSON"]),
        ({"sampling_parameters": "3"}, ["sampling_parameters", "object"]),
        ({"sampling_parameters": '{"foo": 1}'}, ["sampling_parameters.foo", "not known"]),
        ({"structured_outputs": "x"}, ["structured_outputs", "JSON"]),
        ({"structured_outputs": "[1]"}, ["structured_outputs", "object"]),
        (
            {"sampling_parameters": '{"structured_outputs": {"seed": 1}}'},
            ["structured_outputs.seed", "not known", "regex"],
        ),
        (
            {"sampling_parameters": '{"structured_outputs": ' * 900 + "{}" + "}" * 900},
            ["structured_outputs.structured_outputs", "not known"],
        ),
        (
            {"sampling_parameters": '{"structured_outputs": {"regex": "a", "json": {}}}'},
            ["structured_outputs.json", "structured_outputs.regex", "one of them"],
        ),
        ({"regex": "a", "json_schema": "{}"}, ["parameters.json_schema", "parameters.regex"]),
        ({"cache_salt": 3}, ["parameters.cache_salt", "text"]),
        ({"seed": "9" * 5000}, ["parameters.seed", "whole number"]),
        ({"seed": 1, "random_seed": 2}, ["parameters.seed", "parameters.random_seed"]),
        ({"timeout": -1}, ["parameters.timeout", "microseconds"]),
        ({"sequence_id": 5}, ["parameters.sequence_id", "not served"]),
        ({"request_id": "x"}, ["parameters.request_id", "not known"]),
    ],
)
def test_bad_options_are_refused_by_name(parameters, parts):
    refused(ask(**parameters), *parts)


def test_a_parameter_without_a_value():
    request = ask()
    request.parameters["temperature"].SetInParent()
    refused(request, "parameters.temperature", "unset")


def test_what_comes_back():
    request = ask()
    request.outputs.add(name="output_ids")
    request.outputs.add(name="cumulative_logprob")
    asked = read_request(request, MODEL)
    assert asked.outputs == ("output_ids", "cumulative_logprob")
    assert asked.generate.output.logprobs == 0
    request.outputs.add(name="nothing")
    refused(request, "outputs.nothing", "text_output")
    request = ask()
    request.outputs.add(name="text_output").parameters["classification"].int64_param = 3
    refused(request, "outputs.text_output.parameters.classification")


def test_the_client_may_say_how_elements_come_back():
    assert read_request(ask(binary_data_output=True), MODEL).raw
    assert not read_request(ask(raw=True, binary_data_output=False), MODEL).raw
    request = ask()
    for name in ("text_output", "finish_reason"):
        request.outputs.add(name=name).parameters["binary_data"].bool_param = True
    assert read_request(request, MODEL).raw
    request.outputs[1].parameters["binary_data"].bool_param = False
    refused(request, "outputs", "all of one kind")


def test_the_model_and_its_one_version():
    for version in ("", "1"):
        request = ask()
        request.model_version = version
        read_request(request, MODEL)
    request.model_version = "2"
    refused(request, "'2'", kind=NotFound)
    request = ask()
    request.model_name = "another"
    refused(request, "another", MODEL, kind=NotFound)


def test_timeout_and_final_are_the_requests_own():
    asked = read_request(ask(timeout=2_500_000, triton_enable_empty_final_response=True), MODEL)
    assert asked.timeout_s == 2.5
    assert asked.empty_final
    assert read_request(ask(timeout=0), MODEL).timeout_s is None


_values = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(st.characters(exclude_categories=["Cs"])),
)


@hypothesis.given(
    st.dictionaries(
        st.sampled_from([*OPTIONS, "streaming", "sampling_parameters", "stop_words", "timeout"]),
        _values,
        max_size=4,
    )
)
def test_any_parameters_are_read_or_refused(parameters):
    try:
        read_request(ask(**parameters), MODEL)
    except DiptychError as error:
        assert error.message


def delta(text, ids=(), index=0, logprobs=()):
    return Delta(index, text, ids, logprobs)


def token(token_id, logprob, *top):
    named = [(i, f"t{i}", value) for i, value in top]
    return scored(token_id, f"t{token_id}", logprob, *named)


def asked_for(*outputs, **parameters):
    request = ask(shape=(1, 1) if parameters.pop("batched", False) else (1,), **parameters)
    for name in outputs:
        request.outputs.add(name=name)
    return read_request(request, MODEL)


def contents(response):
    """Output name -> (shape, values)."""
    out = {}
    for tensor in response.outputs:
        ((_, values),) = tensor.contents.ListFields() or [(None, [])]
        out[tensor.name] = (list(tensor.shape), list(values))
    return out


def test_a_whole_answer_of_several_choices():
    builder = ResponseBuilder(
        asked_for("text_output", "finish_reason", "output_ids", "num_output_tokens", n=2)
    )
    for each in (
        delta("a", [1, 2]),
        delta("x", [7], index=1),
        delta("b", [3]),
        finished(1, FinishReason.LENGTH),
    ):
        builder.add(each)
        assert not builder.finished
    builder.add(finished())
    assert builder.finished
    assert contents(builder.take(final=True)) == {
        "text_output": ([2], [b"ab", b"x"]),
        "finish_reason": ([2], [b"stop", b"length"]),
        "output_ids": ([2, 3], [1, 2, 3, 7, -1, -1]),
        "num_output_tokens": ([2], [3, 1]),
    }


def test_a_stream_tells_each_thing_once():
    builder = ResponseBuilder(
        asked_for("text_output", "output_ids", "cumulative_logprob", batched=True)
    )
    assert not builder.worth_sending
    builder.add(delta("a", [1], logprobs=[token(1, -0.5)]))
    assert builder.worth_sending
    assert contents(builder.take(final=False)) == {
        "text_output": ([1], [b"a"]),  # TensorRT-LLM's clients decode each of its elements
        "output_ids": ([1, 1], [1]),
        "cumulative_logprob": ([1, 1], [-0.5]),
    }
    assert not builder.worth_sending
    builder.add(delta("", [2], logprobs=[token(2, -0.25)]))
    assert builder.worth_sending
    assert contents(builder.take(final=False))["cumulative_logprob"] == ([1, 1], [-0.75])


def test_texts_of_a_batched_request_are_a_row_of_choices():
    builder = ResponseBuilder(asked_for("text_output", "finish_reason", batched=True, n=2))
    for each in (delta("a", [1]), delta("x", [7], index=1), finished(1), finished()):
        builder.add(each)
    assert contents(builder.take(final=True)) == {
        "text_output": ([2], [b"a", b"x"]),
        "finish_reason": ([1, 2], [b"stop", b"stop"]),
    }


def test_held_text_is_no_response_where_only_text_was_asked_for():
    builder = ResponseBuilder(asked_for("text_output", "finish_reason"))
    builder.add(delta("", [1]))
    assert not builder.worth_sending
    builder.add(delta("é", [2]))
    assert builder.worth_sending
    assert contents(builder.take(final=False))["text_output"] == ([1], ["é".encode()])
    builder.add(finished())
    last = builder.take(final=True)
    assert contents(last)["finish_reason"] == ([1], [b"stop"])
    assert last.parameters[FINAL].bool_param


def test_log_probabilities_as_vllm_has_them():
    builder = ResponseBuilder(asked_for("logprobs", "prompt_logprobs"))
    prompt = PromptEvent("ab", [5, 6], [token(6, -1.0)])
    builder.add(prompt)
    builder.add(delta("c", [7], logprobs=[token(7, -2.0, (8, -0.5), (7, -2.0))]))
    got = contents(builder.take(final=False))
    assert json.loads(got["logprobs"][1][0]) == [
        {
            "7": {"logprob": -2.0, "rank": 2, "decoded_token": "t7"},
            "8": {"logprob": -0.5, "rank": 1, "decoded_token": "t8"},
        }
    ]
    assert json.loads(got["prompt_logprobs"][1][0]) == [
        None,
        {"6": {"logprob": -1.0, "rank": None, "decoded_token": "t6"}},
    ]


def test_an_echoed_prompt_stands_before_each_choice():
    builder = ResponseBuilder(asked_for("text_output", "output_ids", "num_output_tokens", n=2))
    builder.add(PromptEvent("ab", [5, 6]))
    builder.add(delta("c", [7], index=1))
    assert contents(builder.take(final=False)) == {
        "text_output": ([2], [b"ab", b"abc"]),
        "output_ids": ([2, 3], [5, 6, -1, 5, 6, 7]),
        "num_output_tokens": ([2], [0, 1]),
    }


def test_metadata_and_configuration_agree():
    metadata, config = oip_model.metadata(MODEL), oip_model.config(MODEL, 8192)
    assert [t.name for t in metadata.inputs] == [t.name for t in config.input]
    assert [list(t.shape) for t in metadata.outputs] == [list(t.dims) for t in config.output]
    types = model_config_pb2.DataType
    for tensor, described in zip(metadata.inputs, config.input, strict=True):
        expected = "STRING" if tensor.datatype == "BYTES" else tensor.datatype
        assert types.Name(described.data_type) == f"TYPE_{expected}"
        assert described.optional
    assert config.model_transaction_policy.decoupled
    assert config.parameters["max_model_len"].string_value == "8192"
