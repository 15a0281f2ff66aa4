"""OpenAI's own client against a real stack: what it gets equals what gRPC gives, and what it leaves
behind is nothing.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from engine.pb.diptych.v1 import inference_pb2 as pb
from tests.support.stack import Stack, stub, until

pytestmark = pytest.mark.timeout(600)
PROMPT = "The three longest rivers of the world are the Nile, the Amazon and the"
TURNS: Any = [{"role": "user", "content": "Name three rivers."}]
SAMPLED = {"temperature": 0.8, "seed": 7, "top_p": 0.95}


@pytest.fixture
def stack(quick_stack: Stack) -> Stack:
    return quick_stack


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    base = f"http://{stack.http_address}/v1"
    with openai.OpenAI(base_url=base, api_key="none", max_retries=0, timeout=60) as made:
        yield made
    stack.assert_at_rest()


def asynchronous(stack: Stack) -> openai.AsyncOpenAI:
    base = f"http://{stack.http_address}/v1"
    return openai.AsyncOpenAI(base_url=base, api_key="none", max_retries=0, timeout=60)


def extra(item: Any, name: str) -> Any:
    """A field that OpenAI's types do not have."""
    return (item.model_extra or {}).get(name)


@pytest.mark.parametrize("options", [{"temperature": 0}, SAMPLED], ids=["greedy", "sampled"])
def test_completions_give_the_tokens_of_grpc(stack, client, options):
    expected, text, done = stack.generate(PROMPT, max_tokens=40, **options)
    ask = {"model": "smollm2", "prompt": PROMPT, "max_tokens": 40, **options}
    body = {"return_token_ids": True}
    whole = client.completions.create(**ask, extra_body=body)
    assert extra(whole.choices[0], "token_ids") == expected
    assert whole.choices[0].text == text
    assert whole.choices[0].finish_reason == done.finish_reason
    assert whole.usage.completion_tokens == len(expected)
    streamed: list[int] = []
    texts = []
    for chunk in client.completions.create(**ask, stream=True, extra_body=body):
        for choice in chunk.choices:
            texts.append(choice.text)
            streamed += extra(choice, "token_ids") or []
    assert streamed == expected
    assert "".join(texts) == text


@pytest.mark.parametrize("options", [{"temperature": 0}, SAMPLED], ids=["greedy", "sampled"])
def test_chat_gives_the_tokens_of_grpc(stack, client, options):
    texts, expected = [], []
    for event in stack.client.chat(TURNS, max_tokens=30, timeout_s=60, **options):
        if hasattr(event, "token_ids"):
            texts.append(event.text)
            expected += event.token_ids
    ask = {"model": "smollm2", "messages": TURNS, "max_completion_tokens": 30, **options}
    whole = client.chat.completions.create(**ask, extra_body={"return_token_ids": True})
    assert extra(whole.choices[0], "token_ids") == expected
    assert whole.choices[0].message.content == "".join(texts)
    assert whole.choices[0].message.role == "assistant"
    usage = None
    streamed = ""
    for chunk in client.chat.completions.create(
        **ask, stream=True, stream_options={"include_usage": True}
    ):
        streamed += "".join(c.delta.content or "" for c in chunk.choices)
        usage = chunk.usage or usage
    assert streamed == "".join(texts)
    assert usage
    assert usage.completion_tokens == len(expected)
    assert usage.prompt_tokens == whole.usage.prompt_tokens


async def test_many_at_once_and_asynchronously(stack):
    expected = {i: stack.generate(f"{PROMPT} {i}", max_tokens=12)[1] for i in range(4)}
    async with asynchronous(stack) as client:

        async def whole(i: int) -> str:
            got = await client.completions.create(
                model="smollm2", prompt=f"{PROMPT} {i}", max_tokens=12, temperature=0
            )
            return got.choices[0].text

        async def streamed(i: int) -> str:
            parts = []
            async for chunk in await client.completions.create(
                model="smollm2", prompt=f"{PROMPT} {i}", max_tokens=12, temperature=0, stream=True
            ):
                parts += [c.text for c in chunk.choices]
            return "".join(parts)

        answers = await asyncio.gather(*(f(i % 4) for i in range(12) for f in (whole, streamed)))
    assert answers == [expected[i % 4] for i in range(12) for _ in range(2)]


def test_prompts_in_a_list_and_as_tokens(stack, client):
    tokens = [1000, 1001, 1002]
    texts = [stack.generate(prompt, max_tokens=8)[1] for prompt in (PROMPT, tokens)]
    as_tokens = client.completions.create(
        model="smollm2", prompt=[tokens, tokens], max_tokens=8, temperature=0
    )
    assert [c.text for c in as_tokens.choices] == [texts[1]] * 2
    mixed = client.completions.create(
        model="smollm2", prompt=[PROMPT, PROMPT], max_tokens=8, temperature=0
    )
    assert [(c.index, c.text) for c in mixed.choices] == [(0, texts[0]), (1, texts[0])]


def test_stops_and_options_of_vllm(stack, client):
    ids, text, _ = stack.generate(PROMPT, max_tokens=20)
    ask = {"model": "smollm2", "prompt": PROMPT, "max_tokens": 20, "temperature": 0}
    stop = text[5:9]
    got = client.completions.create(**ask, stop=stop)
    assert got.choices[0].text == text[: text.index(stop)]
    assert got.choices[0].finish_reason == "stop"
    assert extra(got.choices[0], "stop_reason") == stop
    got = client.completions.create(
        **ask, extra_body={"stop_token_ids": [ids[4]], "return_token_ids": True}
    )
    assert extra(got.choices[0], "token_ids") == ids[: ids.index(ids[4]) + 1]
    assert extra(got.choices[0], "stop_reason") == ids[4]
    got = client.completions.create(**ask, logit_bias={str(ids[0]): -100})
    assert got.choices[0].text != text
    long = client.completions.create(**ask, extra_body={"ignore_eos": True, "min_tokens": 20})
    assert long.usage.completion_tokens == 20


def test_json_comes_to_an_end(stack, client):
    """Also for a model that likes digits and blanks best."""
    likes = {}
    for text in ("8", " ", "\n", ".", "e"):
        asked = {"prompt": text, "add_special_tokens": False}
        tokens = httpx.post(f"http://{stack.http_address}/tokenize", json=asked).json()["tokens"]
        likes |= dict.fromkeys(tokens, 12.0)
    schema = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 3}
    for options in ({"temperature": 0}, SAMPLED):
        got = client.completions.create(
            model="smollm2",
            prompt=PROMPT,
            max_tokens=400,
            logit_bias={str(token): bias for token, bias in likes.items()},
            extra_body={"guided_json": schema, "return_token_ids": True},
            **options,
        )
        assert got.choices[0].finish_reason == "stop"
        assert 2 <= len(json.loads(got.choices[0].text)) <= 3
        asked = {"max_tokens": 400, "logit_bias": likes, "json_schema": json.dumps(schema)}
        assert stack.generate(PROMPT, **asked, **options)[0] == extra(got.choices[0], "token_ids")


def test_choices_differ_and_equal_grpcs(stack, client):
    ask = {"model": "smollm2", "prompt": PROMPT, "max_tokens": 12, **SAMPLED}
    whole = client.completions.create(**ask, n=3, extra_body={"return_token_ids": True})
    texts = [choice.text for choice in sorted(whole.choices, key=lambda c: c.index)]
    assert len(set(texts)) == 3
    assert texts[0] == stack.generate(PROMPT, max_tokens=12, **SAMPLED)[1]
    assert whole.usage.prompt_tokens == len(stack_tokens(stack, PROMPT))
    assert whole.usage.completion_tokens == sum(
        len(extra(choice, "token_ids")) for choice in whole.choices
    )
    streamed = ["", "", ""]
    for chunk in client.completions.create(**ask, n=3, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == texts
    chat = client.chat.completions.create(
        model="smollm2", messages=TURNS, max_tokens=8, n=2, **SAMPLED
    )
    assert [choice.index for choice in chat.choices] == [0, 1]


def stack_tokens(stack: Stack, text: str) -> list[int]:
    got = httpx.post(f"http://{stack.http_address}/tokenize", json={"prompt": text})
    return got.json()["tokens"]


def by_grpc(stack: Stack, **fields: Any) -> list[pb.GenerateResponse]:
    async def run() -> list[pb.GenerateResponse]:
        channel, service = stub(stack.address)
        try:
            call = service.Generate(pb.GenerateRequest(**fields), timeout=60)
            return [response async for response in call]
        finally:
            await channel.close()

    return asyncio.run(run())


def test_logprobs_of_both_apis_equal_grpcs(stack, client):
    ids, text, _ = stack.generate(PROMPT, max_tokens=10)
    responses = by_grpc(
        stack, text=PROMPT, stop=pb.Stop(max_tokens=10), output=pb.Output(logprobs=3)
    )
    entries = [entry for r in responses for entry in r.delta.logprobs]
    assert [entry.chosen.token_id for entry in entries] == ids
    ask = {"model": "smollm2", "max_tokens": 10, "temperature": 0}
    whole = client.completions.create(prompt=PROMPT, **ask, logprobs=3)
    shown = whole.choices[0].logprobs
    assert shown.tokens == [entry.chosen.text for entry in entries]
    assert "".join(shown.tokens) == text
    # Torch sums in an order that depends on what else is in the step.
    logprobs = [entry.chosen.logprob for entry in entries]
    assert shown.token_logprobs == pytest.approx(logprobs, abs=1e-3)
    assert all(len(top) == 3 for top in shown.top_logprobs)
    assert [max(top.values()) for top in shown.top_logprobs] == shown.token_logprobs  # greedy
    assert shown.text_offset == [len("".join(shown.tokens[:i])) for i in range(10)]
    plain = client.completions.create(prompt=PROMPT, **ask, logprobs=0)
    again = plain.choices[0].logprobs.token_logprobs
    assert again == pytest.approx(shown.token_logprobs, abs=1e-3)
    offsets = []
    for chunk in client.completions.create(prompt=PROMPT, **ask, logprobs=3, stream=True):
        for choice in chunk.choices:
            offsets += choice.logprobs.text_offset if choice.logprobs else []
    assert offsets == shown.text_offset
    chat = client.chat.completions.create(
        messages=TURNS, **ask, logprobs=True, top_logprobs=2
    ).choices[0]
    content = chat.logprobs.content
    assert "".join(one.token for one in content).startswith(chat.message.content)
    assert all(bytes(one.bytes).decode() == one.token for one in content)
    assert all(one.top_logprobs[0].token == one.token for one in content)
    assert all(len(one.top_logprobs) == 2 for one in content)


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_an_echoed_prompt_with_its_logprobs(stack, client, max_tokens):
    """What lm-eval asks for."""
    ids = stack_tokens(stack, PROMPT)
    ask = {"model": "smollm2", "max_tokens": max_tokens, "temperature": 0}
    for prompt in (PROMPT, ids):
        got = client.completions.create(prompt=prompt, **ask, logprobs=1, echo=True)
        (choice,) = got.choices
        shown = choice.logprobs
        assert choice.text.startswith(PROMPT)
        assert choice.finish_reason == "length"
        assert len(shown.tokens) == len(ids) + max_tokens == len(shown.token_logprobs)
        assert "".join(shown.tokens) == choice.text
        assert shown.token_logprobs[0] is None
        assert shown.top_logprobs[0] is None
        assert all(value <= 0 for value in shown.token_logprobs[1:])
        for value, top in zip(shown.token_logprobs[1:], shown.top_logprobs[1:], strict=True):
            assert value <= max(top.values())
        assert got.usage.completion_tokens == max_tokens
    plain = client.completions.create(prompt=PROMPT, **ask, echo=True)
    assert plain.choices[0].text == choice.text
    assert plain.choices[0].logprobs is None
    listed = client.completions.create(prompt=[ids, ids], **ask, logprobs=1, echo=True)
    for other in listed.choices:  # torch sums in an order that depends on the batch
        assert other.logprobs.token_logprobs[0] is None
        wanted = pytest.approx(shown.token_logprobs[1:], abs=1e-3)
        assert other.logprobs.token_logprobs[1:] == wanted


def test_errors_are_the_clients_own(stack, client):
    def ask(**options: Any) -> Any:
        return client.chat.completions.create(
            **{"model": "smollm2", "messages": TURNS, "max_tokens": 4, **options}
        )

    with pytest.raises(openai.NotFoundError) as missing:
        ask(model="another")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        ask(temperature=-1)
    assert bad.value.param == "temperature"
    assert bad.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as unknown:
        ask(extra_body={"temprature": 1})
    assert unknown.value.code == "unknown_parameter"
    with pytest.raises(openai.BadRequestError) as image:
        ask(
            messages=[
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "http://x"}}],
                }
            ]
        )
    assert image.value.param == "messages[0].content[0].type"
    with pytest.raises(openai.BadRequestError):
        ask(messages=[{"role": "user", "content": "word " * 20_000}])
    assert [model.id for model in client.models.list()] == ["smollm2"]
    assert client.models.retrieve("smollm2").id == "smollm2"
    request = client.chat.completions.with_raw_response.create(
        model="smollm2", messages=TURNS, max_tokens=1, extra_headers={"X-Request-Id": "mine"}
    )
    assert request.headers["x-request-id"] == "mine"
    assert request.parse().id == "chatcmpl-mine"


def held(stack: Stack) -> int:
    return sum(worker.held_blocks + worker.num_running for worker in stack.workers())


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_goes_away_frees_everything(stack, client, streams):
    # Without a temperature it would repeat itself, and drafts make that quick.
    ask = {"model": "smollm2", "prompt": PROMPT, "max_tokens": 1500, "temperature": 1}
    if streams:
        stream = client.completions.create(**ask, stream=True, extra_body={"ignore_eos": True})
        next(iter(stream))
        until(lambda: bool(held(stack)), 5, "a heartbeat tells of it")
        stream.close()
    else:
        impatient = client.with_options(timeout=1.0)
        with pytest.raises(openai.APITimeoutError):
            impatient.completions.create(**ask, extra_body={"ignore_eos": True})
    left = time.monotonic()
    until(lambda: not held(stack), 5, "everything is let go", 0.05)
    # A worker tells of it with its next heartbeat, half a second later at most.
    assert time.monotonic() - left < 2.0


def test_the_other_paths(stack):
    base = f"http://{stack.http_address}"
    assert httpx.get(f"{base}/health").status_code == 200
    assert httpx.get(f"{base}/health/ready").status_code == 200
    assert "diptych_http_requests_total" in httpx.get(f"{base}/metrics").text
    assert httpx.get(f"{base}/version").json()["version"]
    tokens = httpx.post(f"{base}/tokenize", json={"prompt": PROMPT}).json()["tokens"]
    back = httpx.post(f"{base}/detokenize", json={"tokens": tokens}).json()["prompt"]
    assert back == PROMPT
    raw = json.dumps({"prompt": PROMPT, "max_tokens": 2}).encode()
    got = httpx.post(f"{base}/v1/completions", content=raw)
    assert got.status_code == 415
