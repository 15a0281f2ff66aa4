"""Run in tritonclient's environment: everything its gRPC clients do with a language model.

triton_calls.py HOST:PORT MODEL
"""

import asyncio
import itertools
import json
import queue
import sys

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException

ADDRESS, MODEL = sys.argv[1:]
PROMPT = "The river was wide and slow, and nobody knew where it began."
TOKENS = 24


def tensor(name, values, datatype, shape=None):
    array = np.array(values, dtype=triton_dtype(datatype))
    made = triton.InferInput(name, shape or list(array.shape), datatype)
    made.set_data_from_numpy(array.reshape(shape) if shape else array)
    return made


def triton_dtype(datatype):
    return {
        "BYTES": np.object_,
        "BOOL": bool,
        "INT32": np.int32,
        "UINT32": np.uint32,
        "UINT64": np.uint64,
        "FP32": np.float32,
    }[datatype]


def prompt(text=PROMPT, shape=None):
    return tensor("text_input", [text.encode()], "BYTES", shape)


def words(result, name="text_output"):
    return [each.decode() for each in result.as_numpy(name).reshape(-1)]


def refused(call, *parts):
    try:
        call()
    except InferenceServerException as error:
        for part in parts:
            assert part in str(error), (part, str(error))
        return error
    raise AssertionError("not refused")


class Stream:
    """One stream; responses by request id."""

    def __init__(self, client, **options):
        self.client = client
        self.responses = queue.Queue()
        client.start_stream(lambda result, error: self.responses.put((result, error)), **options)

    def ask(self, request_id, inputs, **options):
        self.client.async_stream_infer(MODEL, inputs, request_id=request_id, **options)

    def gather(self, *ids):
        """Responses of each id until its final one, and the ids in the order they came."""
        got, order, ended = {i: [] for i in ids}, [], set()
        while ended != set(ids):
            result, error = self.responses.get(timeout=120)
            assert error is None, error
            response = result.get_response()
            got[response.id].append(result)
            order.append(response.id)
            assert response.id not in ended, "a response after the final one"
            if response.parameters["triton_final_response"].bool_param:
                ended.add(response.id)
        return got, order


def text_of(results):
    """Only the empty final response has no tensors."""
    return "".join(words(r)[0] for r in results if r.as_numpy("text_output") is not None)


def metadata(client):
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready(MODEL)
    assert not client.is_model_ready("another")
    assert not client.is_model_ready(MODEL, "7")
    assert "parameters" in client.get_server_metadata().extensions
    described = client.get_model_metadata(MODEL)
    outputs = {each.name: each.datatype for each in described.outputs}
    assert outputs["text_output"] == outputs["finish_reason"] == "BYTES", outputs
    assert "text_input" in {each.name for each in described.inputs}
    config = client.get_model_config(MODEL, as_json=True)["config"]
    assert config["model_transaction_policy"]["decoupled"] is True
    inputs = {each["name"]: each["data_type"] for each in config["input"]}
    assert inputs["text_input"] == "TYPE_STRING" and inputs["streaming"] == "TYPE_BOOL"
    refused(lambda: client.get_model_metadata("another"), "another", MODEL)


def unary(client):
    """Returns the greedy answer's text and token ids."""
    limit = {"max_tokens": TOKENS}
    result = client.infer(MODEL, [prompt()], request_id="one", parameters=limit)
    (text,), (reason,) = words(result), words(result, "finish_reason")
    assert text and reason in ("length", "stop"), (text, reason)
    assert result.get_response().id == "one"
    # As TensorRT-LLM's clients ask, with a batch dimension, and as vLLM's do.
    batched = client.infer(
        MODEL,
        [
            prompt(shape=[1, 1]),
            tensor("max_tokens", [[TOKENS]], "INT32"),
            tensor("temperature", [[0.0]], "FP32"),
            tensor("stop_words", [[b""]], "BYTES"),
            tensor("beam_width", [[1]], "INT32"),
        ],
    )
    assert batched.as_numpy("text_output").shape == (1,) and words(batched) == [text]
    # With every option at the default that TensorRT-LLM's clients have, and compressed.
    defaults = [
        tensor("max_tokens", [[TOKENS]], "INT32"),
        tensor("top_k", [[-1]], "INT32"),
        tensor("top_p", [[0.0]], "FP32"),
        tensor("temperature", [[1.0]], "FP32"),
        tensor("repetition_penalty", [[1.0]], "FP32"),
        tensor("random_seed", [[0]], "UINT64"),
        tensor("return_log_probs", [[False]], "BOOL"),
        tensor("bad_words", [[b""]], "BYTES"),
    ]
    for packing in ("gzip", "deflate"):
        packed = client.infer(MODEL, [prompt(), *defaults], compression_algorithm=packing)
        assert words(packed) == [text], packing
    options = json.dumps({"temperature": "0", "max_tokens": str(TOKENS)}).encode()
    as_vllm = client.infer(
        MODEL,
        [
            prompt(),
            tensor("sampling_parameters", [options], "BYTES"),
            tensor("return_num_output_tokens", [True], "BOOL"),
            tensor("return_num_input_tokens", [True], "BOOL"),
        ],
        outputs=[
            triton.InferRequestedOutput("text_output"),
            triton.InferRequestedOutput("num_output_tokens"),
            triton.InferRequestedOutput("output_ids"),
        ],
    )
    assert words(as_vllm) == [text]
    ids = as_vllm.as_numpy("output_ids")
    assert as_vllm.as_numpy("num_output_tokens").tolist() == [len(ids)]
    assert as_vllm.as_numpy("finish_reason") is None
    # Sampled with a seed: the same twice.
    sampled = {"temperature": 1.0, "seed": 7, "max_tokens": TOKENS, "top_p": 0.9}
    twice = [words(client.infer(MODEL, [prompt()], parameters=sampled)) for _ in range(2)]
    assert twice[0] == twice[1]
    answers = queue.Queue()
    client.async_infer(
        MODEL, [prompt()], lambda result, error: answers.put((result, error)), parameters=limit
    )
    result, error = answers.get(timeout=120)
    assert error is None and words(result) == [text]
    return text, ids.tolist()


def token_ids(client, ids):
    """The answer's own tokens as a prompt: token ids in, token ids out."""
    for datatype in ("INT32", "UINT32"):
        result = client.infer(
            MODEL, [tensor("input_ids", ids, datatype)], parameters={"max_tokens": 5}
        )
        assert result.as_numpy("output_ids").shape == (5,) or words(result, "finish_reason") == [
            "stop"
        ]


def choices_and_logprobs(client, text):
    options = {"max_tokens": TOKENS, "n": 3, "temperature": 1.0, "seed": 5}
    several = client.infer(MODEL, [prompt()], parameters=options)
    assert several.as_numpy("text_output").shape == (3,) and len(set(words(several))) > 1
    stream = Stream(client)
    stream.ask("n", [prompt(), tensor("streaming", [True], "BOOL")], parameters=options)
    pieces = [words(r) for r in stream.gather("n")[0]["n"]]
    assert ["".join(piece) for piece in zip(*pieces, strict=True)] == words(several)
    client.stop_stream()
    scored = client.infer(
        MODEL,
        [
            prompt(),
            tensor("return_logprobs", [True], "BOOL"),
            tensor("return_cumulative_logprob", [True], "BOOL"),
            tensor("exclude_input_in_output", [False], "BOOL"),
        ],
        parameters={"max_tokens": TOKENS, "logprobs": 2},
    )
    assert words(scored) == [PROMPT + text]
    tokens = json.loads(words(scored, "logprobs")[0])
    assert len(tokens) == TOKENS
    total = sum(next(iter(token.values()))["logprob"] for token in tokens)
    assert abs(total - scored.as_numpy("cumulative_logprob")[0]) < 1e-3


def streams(client, text):
    stream = Stream(client)
    on = tensor("streaming", [True], "BOOL")
    limit = {"max_tokens": TOKENS}
    for i in range(4):
        stream.ask(f"s{i}", [prompt(), on], parameters=limit)
    stream.ask("whole", [prompt()], parameters=limit)
    stream.ask("empty", [prompt(), on], parameters=limit, enable_empty_final_response=True)
    names = [*(f"s{i}" for i in range(4)), "whole", "empty"]
    got, order = stream.gather(*names)
    for name in names:
        assert text_of(got[name]) == text, (name, text_of(got[name]))
    assert len(got["whole"]) == 1 and len(got["s0"]) > 2
    last = got["empty"][-1].get_response()
    assert not last.outputs and last.model_name == MODEL, "an empty final response"
    assert words(got["empty"][-2], "finish_reason")[0] in ("length", "stop")
    blocks = 1 + sum(a != b for a, b in itertools.pairwise(order))
    assert blocks > len(names), "requests of a stream are interleaved"
    # An error is its request's alone, and the stream goes on.
    stream.ask("bad", [prompt(), on], parameters={"no_such_option": 1})
    result, error = stream.responses.get(timeout=60)
    assert result is None and "no_such_option" in str(error), error
    stream.ask("after", [prompt(), on], parameters=limit)
    assert text_of(stream.gather("after")[0]["after"]) == text
    # Cancelled with a request inside, and then another stream.
    stream.ask("long", [prompt(), on], parameters={"max_tokens": 2000, "ignore_eos": True})
    stream.responses.get(timeout=60)
    client.stop_stream(cancel_requests=True)
    while True:  # what came before the cancellation
        result, error = stream.responses.get(timeout=60)
        if error is not None:
            assert error.status() == "StatusCode.CANCELLED", error
            break
    ended = Stream(client, headers={"triton_grpc_error": "true"})
    ended.ask("bad", [prompt(), on], parameters={"no_such_option": 1})
    _, error = ended.responses.get(timeout=60)
    assert error.status() == "StatusCode.INVALID_ARGUMENT", error
    client.stop_stream()


def refusals(client):
    bad = client.infer
    refused(lambda: bad(MODEL, [prompt()], parameters={"temprature": 1.0}), "temprature")
    refused(lambda: bad(MODEL, [prompt()], parameters={"temperature": -1.0}), "temperature")
    refused(lambda: bad(MODEL, [tensor("text", [b"x"], "BYTES")]), "text_input")
    two = tensor("text_input", [b"a", b"b"], "BYTES")
    refused(lambda: bad(MODEL, [two]), "text_input", "shape")
    refused(lambda: bad(MODEL, [prompt(), tensor("streaming", [True], "BOOL")]), "ModelStreamInfer")
    refused(lambda: bad(MODEL, [prompt()], sequence_id=5), "sequence_id")
    refused(
        lambda: bad(MODEL, [prompt()], outputs=[triton.InferRequestedOutput("nothing")]), "nothing"
    )
    error = refused(lambda: bad("another", [prompt()]), "another")
    assert error.status() == "StatusCode.NOT_FOUND", error.status()
    error = refused(lambda: bad(MODEL, [prompt()], timeout=1), "time")
    assert error.status() == "StatusCode.DEADLINE_EXCEEDED", error.status()


async def asynchronous(text):
    async with triton_aio.InferenceServerClient(ADDRESS) as client:
        assert await client.is_model_ready(MODEL)
        limit = {"max_tokens": TOKENS}
        results = await asyncio.gather(
            *(client.infer(MODEL, [prompt()], parameters=limit) for _ in range(4))
        )
        assert all(words(result) == [text] for result in results)

        async def requests():
            for name in ("a", "b"):
                yield {
                    "model_name": MODEL,
                    "inputs": [prompt(), tensor("streaming", [True], "BOOL")],
                    "request_id": name,
                    "parameters": limit,
                }

        texts = {"a": "", "b": ""}
        async for result, error in client.stream_infer(requests()):
            assert error is None, error
            texts[result.get_response().id] += words(result)[0]
        assert texts == {"a": text, "b": text}, texts


with triton.InferenceServerClient(ADDRESS) as triton_client:
    metadata(triton_client)
    answer, answer_ids = unary(triton_client)
    token_ids(triton_client, answer_ids)
    choices_and_logprobs(triton_client, answer)
    streams(triton_client, answer)
    refusals(triton_client)
asyncio.run(asynchronous(answer))
print(
    "live, ready, metadata, config; ModelInfer by text and token ids; choices, log-probabilities,"
    " echo; 6 interleaved requests on a stream, errors, cancellation; asyncio; streams equal whole"
    " answers"
)
