"""A request of the protocol between gateways and vLLM -> a GenerateRequest. Pure.

Plain scalars cannot tell zero from unset there: zero means vLLM's default. Defaults differ from
ours where vLLM's do: temperature 1, and the room left as the longest answer.
"""

from __future__ import annotations

from engine.base.errors import InvalidRequest, NotOffered
from engine.pb.diptych.v1 import inference_pb2
from engine.pb.vllm import vllm_engine_pb2

_NOT_TAKEN = ("kv_transfer_params", "kv_transfer_params_json", "mm_inputs", "media_refs")
_DEFAULT_TEMPERATURE = 1.0
# Zero in these is what we take for unset, or the very default.
_SAMPLING = ("top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty")
_STOP = ("min_tokens", "ignore_eos", "include_stop_str_in_output")
_CONSTRAINTS = ("json_schema", "regex", "grammar")


def to_generate(
    request: vllm_engine_pb2.GenerateRequest, served: str, max_model_len: int
) -> inference_pb2.GenerateRequest:
    """Raises InvalidRequest or NotOffered, naming the field as the caller knows it."""
    for field in _NOT_TAKEN:
        if request.HasField(field):
            raise NotOffered(field)
    if request.extra_mm_inputs:
        raise NotOffered("extra_mm_inputs")
    if request.data_parallel_rank:
        raise InvalidRequest(
            "data_parallel_rank", f"{request.data_parallel_rank}; there is rank 0 alone"
        )
    params = request.sampling_params
    generate = inference_pb2.GenerateRequest(
        request_id=request.request_id, model=served, n=params.n or None
    )
    match request.WhichOneof("input"):
        case "tokenized":
            generate.token_ids.ids.extend(request.tokenized.input_ids)
            generate.token_ids.SetInParent()  # none at all is refused as such
        case "text":
            generate.text = request.text
        case _:
            raise InvalidRequest("input", "unset; expected tokenized or text")
    _set_sampling(generate.sampling, params)
    _set_stop(generate.stop, params, max_model_len)
    _set_output(generate.output, params)
    _set_constraint(generate, params)
    return generate


def _set_sampling(sampling: inference_pb2.Sampling, params: vllm_engine_pb2.SamplingParams) -> None:
    given = params.HasField("temperature")
    sampling.temperature = params.temperature if given else _DEFAULT_TEMPERATURE
    for name in _SAMPLING:
        if value := getattr(params, name):
            setattr(sampling, name, value)
    if params.repetition_penalty:
        sampling.repetition_penalty = params.repetition_penalty
    if params.HasField("seed"):
        sampling.seed = params.seed % (1 << 64)  # ours has no sign
    for token, bias in params.logit_bias.items():
        if token < 0:
            raise InvalidRequest(f"sampling_params.logit_bias[{token}]", "not a token id")
        sampling.logit_bias[token] = bias


def _set_stop(
    stop: inference_pb2.Stop, params: vllm_engine_pb2.SamplingParams, max_model_len: int
) -> None:
    # Longer than there is room for: that ends it.
    stop.max_tokens = params.max_tokens if params.HasField("max_tokens") else max_model_len
    for name in _STOP:
        if value := getattr(params, name):
            setattr(stop, name, value)
    stop.stop.extend(params.stop)
    stop.stop_token_ids.extend(params.stop_token_ids)


def _set_output(output: inference_pb2.Output, params: vllm_engine_pb2.SamplingParams) -> None:
    if params.HasField("truncate_prompt_tokens"):
        raise NotOffered("sampling_params.truncate_prompt_tokens")
    output.skip_special_tokens = params.skip_special_tokens
    for name in ("logprobs", "prompt_logprobs"):
        if not params.HasField(name):
            continue
        if (count := getattr(params, name)) < 0:  # -1 is vLLM's word for all of the vocabulary
            raise InvalidRequest(f"sampling_params.{name}", f"{count}; expected 0 or more")
        setattr(output, name, count)


def _set_constraint(
    generate: inference_pb2.GenerateRequest, params: vllm_engine_pb2.SamplingParams
) -> None:
    match params.WhichOneof("constraint"):
        case "structural_tag":
            raise NotOffered("sampling_params.structural_tag")
        case "json_object" if params.json_object:
            generate.constraint.json_object = True
        case "choice":
            generate.constraint.choice.choices.extend(params.choice.choices)
        case kind if kind in _CONSTRAINTS:
            setattr(generate.constraint, kind, getattr(params, kind))
