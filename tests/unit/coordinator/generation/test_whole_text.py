"""An answer's text is decode(prompt + answer) without decode(prompt), by every protocol.

A tokenizer that strips the first space of a text does so once, at the start of the prompt.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from coordinator.text.tokenizer import Tokenizer
from engine.pb.diptych.v1 import inference_pb2 as pb
from engine.pb.inference import grpc_service_pb2, grpc_service_pb2_grpc
from engine.rpc.channel import open_channel
from tests.support.fake_decode import Cue, lost
from tests.support.http_front import HttpFront, events, http_front
from tests.support.tiny_tokenizer import tiny_tokenizer

KINDS = ["llama2", "gemma", "t5", "metaspace, bytes", "byte-level"]
PROMPT = "The worker reads"
ANSWER = " the the, a é worker"


def tokens(tokenizer: Tokenizer, prompt: str = PROMPT, answer: str = ANSWER) -> list[int]:
    """Token ids of an answer that continues a prompt."""
    before = tokenizer.encode(prompt)
    whole = tokenizer.encode(prompt + answer)
    assert whole[: len(before)] == before
    return whole[len(before) :]


async def generate(f: HttpFront, **fields: Any) -> dict[int, tuple[str, list[int], str]]:
    """By choice: text, token ids, the stop string that ended it."""
    found: dict[int, tuple[str, list[int], str]] = {}
    async for response in f.stub.Generate(pb.GenerateRequest(**fields), timeout=10):
        text, ids, stop = found.get(response.index, ("", [], ""))
        text += response.prompt.text + response.delta.text
        ids = ids + list(response.delta.token_ids)
        stop = response.finished.matched_stop.text
        found[response.index] = (text, ids, stop)
    return found


@pytest.mark.parametrize("kind", KINDS)
async def test_the_answers_first_space_is_there(kind: str) -> None:
    tokenizer = tiny_tokenizer(kind)
    answer = tokens(tokenizer)
    prompt_ids = pb.TokenIds(ids=tokenizer.encode(PROMPT))
    async with http_front(own=tokenizer) as f:
        await f.worker(answer=answer)
        limit = pb.Stop(max_tokens=len(answer))
        for prompt in ({"text": PROMPT}, {"token_ids": prompt_ids}):
            assert (await generate(f, stop=limit, **prompt))[0] == (ANSWER, answer, "")
            echo = await generate(f, stop=limit, output=pb.Output(echo=True), **prompt)
            assert echo[0][0] == PROMPT + ANSWER
            shown = pb.Output(echo=True, skip_special_tokens=False)
            echo = await generate(f, stop=limit, output=shown, **prompt)
            assert echo[0][0].removeprefix("<s>").strip() == PROMPT + ANSWER
        # Choices, and the rest after a resume, wherever it was cut.
        several = await generate(f, text=PROMPT, n=3, stop=limit)
        assert [text for text, _, _ in several.values()] == [ANSWER] * 3
        texts = []
        for cut in range(len(answer)):
            resume = [pb.Resume(token_ids=answer[:cut])]
            texts.append((await generate(f, text=PROMPT, stop=limit, resume=resume))[0][0])
        assert all(text.endswith(later) for text, later in itertools.pairwise(texts))
        assert all(ANSWER.endswith(text) for text in texts)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_stop_string_begins_with_the_space_that_is_there(kind: str) -> None:
    tokenizer = tiny_tokenizer(kind)
    answer = tokens(tokenizer)
    async with http_front(own=tokenizer) as f:
        await f.worker(answer=answer)
        stop = pb.Stop(max_tokens=len(answer), stop=[" the"])
        assert (await generate(f, text=PROMPT, stop=stop))[0] == ("", answer[:1], " the")
        stop.include_stop_str_in_output = True
        assert (await generate(f, text=PROMPT, stop=stop))[0] == (" the", answer[:1], " the")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("after", [0, 1, 4])
async def test_a_lost_worker_changes_no_character(kind: str, after: int) -> None:
    tokenizer = tiny_tokenizer(kind)
    answer = tokens(tokenizer)
    async with http_front(own=tokenizer) as f:
        await f.worker(answer=answer, cues=[Cue(after, lost())], name="d0")
        await f.worker(answer=answer, cues=[Cue(2, lost())], name="d1")
        stop = pb.Stop(max_tokens=len(answer))
        assert (await generate(f, text=PROMPT, stop=stop))[0] == (ANSWER, answer, "")


@pytest.mark.parametrize("kind", KINDS)
async def test_after_a_prompt_of_no_text_an_answer_is_a_text_of_its_own(kind: str) -> None:
    tokenizer = tiny_tokenizer(kind)
    answer = tokens(tokenizer, "", PROMPT)
    async with http_front(own=tokenizer) as f:
        await f.worker(answer=answer)
        limit, bos = pb.Stop(max_tokens=len(answer)), pb.TokenIds(ids=[1])
        assert (await generate(f, token_ids=bos, stop=limit))[0][0] == PROMPT
        output = pb.Output(logprobs=0)
        asked = pb.GenerateRequest(token_ids=bos, stop=limit, output=output)
        text, entries = "", []
        async for response in f.stub.Generate(asked, timeout=10):
            text += response.delta.text
            entries += response.delta.logprobs
        for entry in entries:
            assert text.startswith(entry.chosen.text, entry.text_offset)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", [PROMPT, "<s>a<|end|>worker"])
async def test_offsets_are_those_of_the_text(kind: str, stream: bool, prompt: str) -> None:
    """By HTTP, with an echoed prompt: also where it spells special tokens."""
    tokenizer = tiny_tokenizer(kind)
    ids = tokenizer.encode(prompt)
    answer = [*tokens(tokenizer), 3, *tokens(tokenizer)]
    for given in (prompt, ids):
        async with http_front(own=tokenizer) as f:
            await f.worker(answer=answer)
            response = await f.complete(
                prompt=given, max_tokens=len(answer), echo=True, logprobs=1, stream=stream
            )
            parts = events(response) if stream else [response.json()]
        choices = [part["choices"][0] for part in parts]
        text = "".join(choice["text"] for choice in choices)
        shown = [choice["logprobs"] for choice in choices if choice["logprobs"]]
        shown_names = [name for each in shown for name in each["tokens"]]
        offsets = [offset for each in shown for offset in each["text_offset"]]
        before = given if isinstance(given, str) else tokenizer.decode(ids)
        assert text == before + ANSWER * 2
        assert len(shown_names) == len(offsets) == len(ids) + len(answer)
        assert offsets == sorted(offsets)
        for token, name, offset in zip([*ids, *answer], shown_names, offsets, strict=True):
            if token in tokenizer.special_ids or "\ufffd" in name:
                continue  # hidden, or part of a character
            # An encoder may write a space behind a special token.
            names = (name, name.removeprefix(" ")) if prompt != PROMPT else (name,)
            assert text.startswith(names, offset), (token, name, offset)


@pytest.mark.parametrize("kind", ["llama2", "byte-level"])
async def test_an_echoed_prompt_may_end_within_a_character(kind: str) -> None:
    """Prompt and answer make one text, also where the answer completes or breaks a character."""
    tokenizer = tiny_tokenizer(kind)
    first, *rest = tokenizer.encode("\u4e2d", add_special_tokens=False)[-3:]
    prompt = [*tokenizer.encode(PROMPT), first]
    for answer in ([*rest, *tokens(tokenizer)], tokens(tokenizer)):
        for n, limit in ((1, len(answer)), (2, len(answer)), (1, 0)):
            async with http_front(own=tokenizer) as f:
                await f.worker(answer=answer)
                response = await f.complete(prompt=prompt, max_tokens=limit, echo=True, n=n)
            whole = tokenizer.decode(prompt + answer[:limit])
            assert [c["text"] for c in response.json()["choices"]] == [whole] * n


@pytest.mark.parametrize("kind", KINDS)
async def test_an_answer_by_the_inference_protocol(kind: str) -> None:
    tokenizer = tiny_tokenizer(kind)
    answer = tokens(tokenizer)
    async with http_front(own=tokenizer) as f:
        await f.worker(answer=answer)
        channel = open_channel(f.coordinator.address)
        stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for excluded, expected in ((True, ANSWER), (False, PROMPT + ANSWER)):
            asked = grpc_service_pb2.ModelInferRequest(model_name="smollm2")
            tensor = asked.inputs.add(name="text_input", datatype="BYTES", shape=[1])
            tensor.contents.bytes_contents.append(PROMPT.encode())
            asked.parameters["max_tokens"].int64_param = len(answer)
            asked.parameters["exclude_input_in_output"].bool_param = excluded
            response = await stub.ModelInfer(asked, timeout=10)
            (text,) = [t.contents for t in response.outputs if t.name == "text_output"]
            assert text.bytes_contents[0].decode() == expected
        await channel.close()
