"""The sampling of generation_config.json, and where it is the default."""

from __future__ import annotations

import json

import pytest

from coordinator.api.openai.requests import read_chat, read_completion
from coordinator.api.validation.request import validate
from coordinator.text.served_model import Limits
from engine.base.errors import CheckpointError
from engine.checkpoint.generation_config import SamplingDefaults, read_sampling
from engine.pb.diptych.v1 import inference_pb2 as pb
from tests.support.validated import validated


def sampling_of(folder, **config) -> SamplingDefaults:
    (folder / "generation_config.json").write_text(json.dumps(config))
    return read_sampling(folder)


def test_a_folder_without_the_file_has_none(tmp_path):
    assert read_sampling(tmp_path) == SamplingDefaults()
    assert sampling_of(tmp_path, eos_token_id=2) == SamplingDefaults()


def test_values_of_the_file(tmp_path):
    found = sampling_of(
        tmp_path, do_sample=True, temperature=0.6, top_p=0.95, top_k=20, min_p=0.0, max_length=9
    )
    assert found == SamplingDefaults(0.6, 0.95, 20, 0.0, None)
    assert sampling_of(tmp_path, top_k=-1, top_p=1).values() == {"top_k": 0, "top_p": 1.0}
    assert sampling_of(tmp_path, temperature=None, top_k=None) == SamplingDefaults()


def test_do_sample(tmp_path):
    assert sampling_of(tmp_path, do_sample=False, temperature=0.6).temperature == 0.0
    assert sampling_of(tmp_path, do_sample=True).temperature == 1.0
    assert sampling_of(tmp_path, temperature=0.6).temperature == 0.6


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("top_k", 0.5),
        ("top_k", True),
        ("repetition_penalty", 0),
        ("do_sample", "yes"),
    ],
)
def test_a_value_that_no_request_may_have_is_refused_by_name(tmp_path, key, value):
    with pytest.raises(CheckpointError, match=rf"generation_config.json: {key} is .*--generation"):
        sampling_of(tmp_path, **{key: value})


DEFAULTS = SamplingDefaults(temperature=0.5, top_p=0.9, top_k=20, repetition_penalty=1.25)
LIMITS = Limits("m", 100, (2,), 1000, sampling=DEFAULTS)
PLAIN = Limits("m", 100, (2,), 1000)


def numbers(checked) -> tuple[float, ...]:
    found = checked.sampling
    return (found.temperature, round(found.top_p, 6), found.top_k, found.repetition_penalty)


def test_silent_requests_of_all_protocols_get_the_models_sampling():
    silent = pb.GenerateRequest(text="x")
    assert numbers(validated(silent, LIMITS)) == (0.5, 0.9, 20, 1.25)
    assert numbers(validated(silent, PLAIN)) == (0.0, 1.0, 0, 1.0)
    body = {"messages": [{"role": "user", "content": "x"}]}
    for call in (read_chat(body, "r"), read_completion({"prompt": "x"}, "r")):
        (request,) = call.requests
        assert numbers(validate(request, LIMITS)) == (0.5, 0.9, 20, 1.25)
        assert numbers(validate(request, PLAIN)) == (1.0, 1.0, 0, 1.0)


def test_a_requests_own_values_win():
    own = pb.Sampling(temperature=0, top_p=1, top_k=0, repetition_penalty=1)
    loud = pb.GenerateRequest(text="x", sampling=own)
    assert numbers(validated(loud, LIMITS)) == (0.0, 1.0, 0, 1.0)
    partly = pb.GenerateRequest(text="x", sampling=pb.Sampling(top_k=0))
    assert numbers(validated(partly, LIMITS)) == (0.5, 0.9, 0, 1.25)
