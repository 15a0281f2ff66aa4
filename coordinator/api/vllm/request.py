"""A request of the protocol between gateways and vLLM -> a GenerateRequest. Pure.

Plain scalars of that protocol have no unset state: zero means vLLM's default. Defaults are vLLM's:
temperature 1, and the room left as the longest output.
"""

from __future__ import annotations

from coordinator.api.values import Constraint, GenerateRequest, Output, Sampling, Stop
from engine.base.errors import InvalidRequest, NotOffered
from engine.pb.vllm import vllm_engine_pb2 as pb
from engine.rpc.convert import from_pb

_NOT_TAKEN = ("kv_transfer_params", "kv_transfer_params_json", "mm_inputs", "media_refs")
_DEFAULT_TEMPERATURE = 1.0
# Zero in these means unset, or is the default.
_SAMPLING = (
    *("top_p", "top_k", "min_p"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty"),
)
_CONSTRAINTS = ("json_schema", "json_object", "regex", "grammar")


def to_generate(request: pb.GenerateRequest, served: str, max_model_len: int) -> GenerateRequest:
    """The request as values. Raises InvalidRequest, NotOffered, naming the caller's field."""
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
    text, token_ids = None, None
    match request.WhichOneof("input"):
        case "tokenized":
            token_ids = request.tokenized.input_ids  # an empty list is refused as such
        case "text":
            text = request.text
        case _:
            raise InvalidRequest("input", "unset; expected tokenized or text")
    return GenerateRequest(
        request_id=request.request_id,
        model=served,
        text=text,
        token_ids=token_ids,
        sampling=_sampling(params),
        stop=from_pb(
            Stop,
            params,
            # The room left is shorter, and ends the output.
            max_tokens=params.max_tokens if params.HasField("max_tokens") else max_model_len,
        ),
        output=_output(params),
        constraint=_constraint(params),
        n=params.n or 1,
    )


def _sampling(params: pb.SamplingParams) -> Sampling:
    for token in params.logit_bias:
        if token < 0:
            raise InvalidRequest(f"sampling_params.logit_bias[{token}]", "not a token id")
    has = params.HasField
    return Sampling(
        temperature=params.temperature if has("temperature") else None,
        default_temperature=_DEFAULT_TEMPERATURE,
        seed=params.seed % (1 << 64) if has("seed") else None,  # the frontend's has no sign
        logit_bias=params.logit_bias,
        **{name: value for name in _SAMPLING if (value := getattr(params, name))},
    )


def _output(params: pb.SamplingParams) -> Output:
    if params.HasField("truncate_prompt_tokens"):
        raise NotOffered("sampling_params.truncate_prompt_tokens")
    output = Output(skip_special_tokens=params.skip_special_tokens)
    for name in ("logprobs", "prompt_logprobs"):
        if not params.HasField(name):
            continue
        if (count := getattr(params, name)) < 0:  # -1: all of the vocabulary
            raise InvalidRequest(f"sampling_params.{name}", f"{count}; expected 0 or more")
        setattr(output, name, count)
    return output


def _constraint(params: pb.SamplingParams) -> Constraint | None:
    match params.WhichOneof("constraint"):
        case "structural_tag":
            raise NotOffered("sampling_params.structural_tag")
        case "choice":
            return Constraint("choice", params.choice.choices)
        case kind if kind in _CONSTRAINTS and getattr(params, kind) is not False:
            return Constraint(kind, getattr(params, kind))
    return None
