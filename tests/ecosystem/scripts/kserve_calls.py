"""Run in KServe's environment: its client of the `grpc-v2` protocol.

kserve_calls.py HOST:PORT MODEL
"""

import asyncio
import sys

import grpc
import numpy as np
from kserve import InferenceGRPCClient, InferInput, InferRequest
from kserve.protocol.infer_type import RequestedOutput

ADDRESS, MODEL = sys.argv[1:]
PROMPT = "Once upon a time"


def request(data, *, outputs=(), model=MODEL, **parameters):
    prompt = InferInput("text_input", [1], "BYTES", data=data)
    if isinstance(data, np.ndarray):
        prompt.set_data_from_numpy(data, binary_data=True)
    return InferRequest(
        model,
        [prompt],
        request_id="kserve",
        parameters={"max_tokens": 12, **parameters},
        request_outputs=[RequestedOutput(name, options) for name, options in outputs] or None,
    )


def text_of(response):
    (output,) = [o for o in response.outputs if o.name == "text_output"]
    (text,) = output.as_numpy().reshape(-1) if output._raw_data else output.data
    return text.decode() if isinstance(text, bytes) else text


async def main():
    async with InferenceGRPCClient(ADDRESS) as client:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready(MODEL)
        assert not await client.is_model_ready("another")
        typed = await client.infer(request([PROMPT]))
        assert typed.id == "kserve" and typed.model_name == MODEL
        text = text_of(typed)
        assert text
        raw = await client.infer(request(np.array([PROMPT.encode()], dtype=np.object_)))
        assert text_of(raw) == text
        asked = await client.infer(
            request([PROMPT], outputs=[("text_output", {"binary_data": True})])
        )
        assert [output.name for output in asked.outputs] == ["text_output"]
        assert text_of(asked) == text
        for bad, code in (
            (request([PROMPT], model="another"), grpc.StatusCode.NOT_FOUND),
            (request([PROMPT], no_such=1), grpc.StatusCode.INVALID_ARGUMENT),
        ):
            try:
                await client.infer(bad)
            except grpc.RpcError as error:
                assert error.code() is code, error
            else:
                raise AssertionError("not refused")


asyncio.run(main())
print("live, ready, model ready; ModelInfer with typed and raw contents, outputs by name; statuses")
