"""Run in smg-grpc-proto's environment: what a gateway asks of one engine of vLLM.

engine_calls.py HOST:PORT MODEL
"""

import sys
import threading

import grpc
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc

ADDRESS, MODEL = sys.argv[1:]
PROMPT = list(range(1000, 1040))


def request(request_id, *, stream=True, **params):
    values = {"temperature": 0.0, "max_tokens": 24, **params}
    return pb.GenerateRequest(
        request_id=request_id,
        tokenized=pb.TokenizedInput(input_ids=PROMPT),
        sampling_params=pb.SamplingParams(**values),
        stream=stream,
    )


def generate(stub, *args, **options):
    *chunks, last = stub.Generate(request(*args, **options), timeout=120)
    ids = [i for response in chunks for i in response.chunk.token_ids]
    return ids, last.complete


with grpc.insecure_channel(ADDRESS) as channel:
    stub = vllm_engine_pb2_grpc.VllmEngineStub(channel)
    assert stub.HealthCheck(pb.HealthCheckRequest(), timeout=10).healthy
    info = stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=10)
    assert info.served_model_name == MODEL and info.is_generation and info.eos_token_ids
    assert info.max_context_length > len(PROMPT) and info.tokenizer_path
    server = stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=10)
    assert server.uptime_seconds > 0 and server.data_parallel_size == 1 and not server.is_paused

    ids, complete = generate(stub, "a", ignore_eos=True)
    assert len(ids) == 24 and list(complete.output_ids) == ids
    assert complete.finish_reason == "length" and complete.prompt_tokens == len(PROMPT)
    assert complete.completion_tokens == 24
    nothing, whole = generate(stub, "b", stream=False, ignore_eos=True)
    assert not nothing and list(whole.output_ids) == ids
    _, stopped = generate(stub, "c", stop_token_ids=[ids[3]])
    assert stopped.finish_reason == "stop" and stopped.matched_token_id == ids[3]
    sampled = [generate(stub, f"d{i}", temperature=1.0, seed=3)[0] for i in range(2)]
    assert sampled[0] == sampled[1]

    several = stub.Generate(request("e", n=2, temperature=1.0, seed=3), timeout=120)
    ends = [r.complete for r in several if r.HasField("complete")]
    assert sorted(end.index for end in ends) == [0, 1]
    _, scored = generate(stub, "f", ignore_eos=True, logprobs=2, prompt_logprobs=0)
    assert len(scored.output_logprobs.token_logprobs) == 24
    assert len(scored.output_logprobs.top_logprobs[0].token_ids) == 2
    assert list(scored.input_logprobs.token_ids) == PROMPT
    values = scored.input_logprobs.token_logprobs
    assert [value.HasField("value") for value in values] == [False] + [True] * (len(PROMPT) - 1)

    # An abort from elsewhere ends a stream as "abort".
    long = stub.Generate(request("long", ignore_eos=True, max_tokens=4000), timeout=120)
    next(long)
    abort = pb.AbortRequest(request_ids=["long", "unknown"])
    threading.Thread(target=lambda: stub.Abort(abort, timeout=10)).start()
    *_, last = long
    assert last.complete.finish_reason == "abort", last
    assert 0 < last.complete.completion_tokens < 4000
    try:
        refused = pb.GenerateRequest(text="x", kv_transfer_params_json="{}")
        list(stub.Generate(refused, timeout=10))
    except grpc.RpcError as error:
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED, error
    else:
        raise AssertionError("KV transfer is taken")
print(
    "HealthCheck, GetModelInfo, GetServerInfo, Generate (streamed equals whole, n, logprobs), Abort"
)
