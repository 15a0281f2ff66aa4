"""Several choices, log-probabilities and the prompt sent back: the coordinator over the wire."""

import asyncio

import grpc
import pytest

from coordinator.routing.affinity import affinity_token_of
from coordinator.text.detokenizer import Detokenizer
from engine.base.seeds import choice_seed
from engine.pb.diptych.v1 import inference_pb2
from tests.support.fake_decode import Cue, lost, scored
from tests.support.grpc_front import PROMPT, TEXT, collect, error_of, front, read, stop

SEED = 7
OTHERS = (
    "No one had ever asked him such a thing before, and he said so at once.",
    "Snow fell on the roofs of the town for the whole of that long night.",
    "“Wait” — 雪が降る。 🙂 It snows on.",
)


def sampling():
    return inference_pb2.Sampling(temperature=1.0, seed=SEED)


def answers(f, n):
    """The scripted text of each choice: choice 0 has the front's, the others differ."""
    encode = f.coordinator.model.tokenizer.encode
    return [f.answer, *(encode(OTHERS[i % 3] + str(i)) for i in range(n - 1))]


def scripted(f, n):
    by_index = answers(f, n)
    return {choice_seed(SEED, i): by_index[i] for i in range(n)}


def by_index(responses, n):
    """(text, token ids, Finished) of each choice."""
    return [read([r for r in responses if r.index == i]) for i in range(n)]


async def test_choices_are_calls_on_one_worker_with_seeds_of_their_own(checkpoint):
    async with front(checkpoint) as f:
        workers = [
            await f.worker(f"d{i}", by_seed=scripted(f, 4), pace_s=0.002, group=2) for i in range(2)
        ]
        f.prefill()
        call = f.call(n=4, sampling=sampling(), stop=stop(max_tokens=12))
        responses = await collect(call)
        for i, (text, ids, finished) in enumerate(by_index(responses, 4)):
            expected = answers(f, 4)[i][:12]
            assert ids == expected
            assert text == f.coordinator.model.tokenizer.decode(expected)
            assert finished.usage.completion_tokens == 12
            assert finished.usage.prompt_tokens == len(PROMPT)
        assert sorted(len(w.requests) for w in workers) == [0, 4], "they share the prompt's blocks"
        (worker,) = (w for w in workers if w.requests)
        assert {r.sampling.seed for r in worker.requests} == {
            choice_seed(SEED, i) for i in range(4)
        }
        assert all(r.prefill.worker_id == "p0" for r in worker.requests)
        indices = [r.index for r in responses if r.HasField("delta")]
        assert indices != sorted(indices), "they come as they are made"
        assert f.sample("prompt_tokens_total") == len(PROMPT)
        assert f.sample("generation_tokens_total") == 48
        assert f.sample("request_success_total", finished_reason="length") == 4


async def test_stops_end_their_own_choice_only(checkpoint):
    async with front(checkpoint) as f:
        await f.worker(by_seed=scripted(f, 3), group=3)
        strings = [" wide", "such a thing"]
        call = f.call(n=3, sampling=sampling(), stop=stop(stop=strings, max_tokens=16))
        first, second, third = by_index(await collect(call), 3)
        assert first[0] == "The river was"
        assert first[2].matched_stop.text == " wide"
        assert second[0] == "No one had ever asked him "
        assert second[2].matched_stop.text == "such a thing"
        assert len(third[1]) == 16
        assert third[2].finish_reason == inference_pb2.FINISH_REASON_LENGTH


@pytest.mark.parametrize("group", [1, 5])
async def test_one_lost_choice_is_tried_again_alone(checkpoint, group):
    async with front(checkpoint) as f:
        cues = [Cue(100), Cue(4, lost()), Cue(100)]  # the second call of three
        first = await f.worker("d0", by_seed=scripted(f, 3), cues=cues, group=group, pace_s=0.002)
        second = await f.worker("d1", by_seed=scripted(f, 3), group=group)
        for cue in (cues[0], cues[2]):
            cue.error = AssertionError("not reached")
        call = f.call(n=3, sampling=sampling(), stop=stop(max_tokens=14))
        got = by_index(await collect(call), 3)
        assert [ids for _, ids, _ in got] == [a[:14] for a in answers(f, 3)]
        calls = first.requests + second.requests
        assert len(calls) == 4
        (again,) = (r for r in calls if r.output_token_ids)
        assert len(again.output_token_ids) == 4
        assert f.sample("migrations_total", outcome="resumed") == 1


async def test_when_one_choice_cannot_be_saved_all_end(checkpoint, monkeypatch):
    monkeypatch.setattr("coordinator.routing.retry.FIRST_BACKOFF_S", 0.001)
    monkeypatch.setattr("coordinator.routing.retry.MAX_ATTEMPTS", 2)
    async with front(checkpoint) as f:
        cues = [Cue(3, lost()), Cue(1000, lost())]
        worker = await f.worker(by_seed=scripted(f, 2), cues=cues, pace_s=0.01, group=1)
        worker.cues += [Cue(0, lost("no luck"))] * 20
        call = f.call(n=2, sampling=sampling(), stop=stop(max_tokens=40))
        error = await error_of(call)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "no luck" in error.details()
        await asyncio.wait_for(worker.cancelled.wait(), 5)
        await asyncio.wait_for(f.coordinator.pipeline.idle.wait(), 5)


async def test_a_client_that_goes_away_ends_all_choices(checkpoint):
    async with front(checkpoint) as f:
        worker = await f.worker(by_seed=scripted(f, 8), pace_s=0.05, group=1)
        call = f.call(n=8, sampling=sampling(), stop=stop(max_tokens=60))
        await call.read()
        assert f.sample("num_requests_running") == 8
        ended = []
        worker.cancelled.set = lambda: ended.append(1)
        call.cancel()
        await asyncio.wait_for(f.coordinator.pipeline.idle.wait(), 5)
        for _ in range(100):
            if len(ended) == 8:
                break
            await asyncio.sleep(0.02)
        assert len(ended) == 8
        assert f.sample("request_failures_total", code="cancelled") == 1


async def test_admission_counts_choices(checkpoint):
    async with front(checkpoint, max_queued_requests=4) as f:
        await f.worker(by_seed=scripted(f, 3), pace_s=0.05, group=1)
        call = f.call(n=3, sampling=sampling(), stop=stop(max_tokens=15))
        await call.read()
        error = await error_of(f.call(n=2))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "3 requests are admitted and 2 more" in error.details()
        await f.ask(stop=stop(max_tokens=1))  # there is room for one more
        call.cancel()
        await asyncio.wait_for(f.coordinator.pipeline.idle.wait(), 5)
        # A request above the limit is admitted when it is the only one.
        responses = await collect(f.call(n=6, stop=stop(max_tokens=1)))
        assert {r.index for r in responses} == set(range(6))


async def test_choices_do_not_all_depend_on_one_prefill_worker(checkpoint):
    """All wait for the first prompt; if its prefill worker hangs, the next one uses another."""
    async with front(checkpoint) as f:
        worker = await f.worker(by_seed=scripted(f, 3))
        f.prefill("p0")
        f.prefill("p1")
        await collect(f.call(n=3, sampling=sampling(), stop=stop(max_tokens=4)))
        assert sorted(r.prefill.worker_id for r in worker.requests) == ["p0", "p1", "p1"]


async def test_each_choice_is_resumed_alone(checkpoint):
    async with front(checkpoint) as f:
        worker = await f.worker(by_seed=scripted(f, 3), group=4)
        expected = [a[:10] for a in answers(f, 3)]
        resume = [
            inference_pb2.Resume(index=1, token_ids=expected[1][:6]),
            inference_pb2.Resume(index=2, token_ids=expected[2], finished=True),
        ]
        output = inference_pb2.Output(logprobs=1, echo=True)
        fields = {"n": 3, "sampling": sampling(), "stop": stop(max_tokens=10), "output": output}
        responses = await collect(f.call(resume=resume, **fields))
        assert not any(r.HasField("prompt") for r in responses), "it has been delivered"
        got = by_index(responses, 3)
        assert [ids for _, ids, _ in got] == [expected[0], expected[1][6:], []]
        assert [f.usage.completion_tokens for _, _, f in got] == [10, 10, 10]
        assert len(worker.requests) == 2
        deltas = [r.delta for r in responses if r.index == 1 and r.HasField("delta")]
        tops = [entry.top[0].token_id for d in deltas for entry in d.logprobs]
        assert tops == [1000 + i for i in range(6, 10)], "only of the new ones"


async def test_choices_are_resumed_at_one_worker(checkpoint):
    """That of the first unfinished choice, since all share the prompt's blocks."""
    async with front(checkpoint) as f:
        workers = [await f.worker(f"d{i}", by_seed=scripted(f, 3)) for i in range(3)]
        expected = [a[:10] for a in answers(f, 3)]
        _, first, second = map(affinity_token_of, f.coordinator.membership.snapshot())
        resume = [
            inference_pb2.Resume(
                index=0, token_ids=expected[0], finished=True, affinity_token=first
            ),
            inference_pb2.Resume(index=1, token_ids=expected[1][:6], affinity_token=second),
        ]
        fields = {"n": 3, "sampling": sampling(), "stop": stop(max_tokens=10)}
        got = by_index(await collect(f.call(resume=resume, **fields)), 3)
        assert [ids for _, ids, _ in got] == [[], expected[1][6:], expected[2]]
        assert [len(worker.requests) for worker in workers] == [0, 0, 2]
        got = by_index(await collect(f.call(resume=resume[:1], **fields)), 3)
        assert [ids for _, ids, _ in got] == [[], *expected[1:]]
        assert [len(worker.requests) for worker in workers] == [0, 2, 2]


# -- log-probabilities -----------------------------------------------------------------------------


def told(responses):
    """(token ids, log-probabilities) of all deltas."""
    deltas = [r.delta for r in responses if r.HasField("delta")]
    return [i for d in deltas for i in d.token_ids], [x for d in deltas for x in d.logprobs]


def check_entries(entries, ids, first, count, text_of):
    """Entries of the tokens `ids` at positions from `first` on, as `scored` gives them."""
    assert len(entries) == len(ids)
    for at, (entry, token_id) in enumerate(zip(entries, ids, strict=True), first):
        expected_scores = scored(at, count)
        assert entry.chosen.token_id == token_id
        assert entry.chosen.text == text_of(token_id)
        assert entry.chosen.logprob == expected_scores.chosen
        assert [t.token_id for t in entry.top] == list(expected_scores.token_ids)
        assert [t.logprob for t in entry.top] == list(expected_scores.logprobs)
        assert [t.text for t in entry.top] == [text_of(t) for t in expected_scores.token_ids]


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("group", [1, 7])
async def test_one_entry_a_token_also_across_a_loss(checkpoint, group, count):
    async with front(checkpoint) as f:
        await f.worker("d0", cues=[Cue(5, lost())], group=group)
        await f.worker("d1", group=group)
        output = inference_pb2.Output(logprobs=count)
        responses = await collect(f.call(output=output, stop=stop(max_tokens=20)))
        ids, entries = told(responses)
        assert ids == f.answer[:20]
        check_entries(entries, ids, 0, count, f.coordinator.model.tokenizer.text_of)
        for delta in (r.delta for r in responses if r.HasField("delta")):
            assert len(delta.logprobs) == len(delta.token_ids)


async def test_held_back_text_does_not_hold_entries_back(checkpoint):
    async with front(checkpoint) as f:
        text = "雪が降る。"
        ids = f.coordinator.model.tokenizer.encode(text)
        f.answer = ids
        await f.worker(group=1)
        output = inference_pb2.Output(logprobs=0)
        responses = await collect(f.call(output=output, stop=stop(max_tokens=len(ids))))
        deltas = [r.delta for r in responses if r.HasField("delta")]
        assert any(not d.text for d in deltas), "some tokens are parts of characters"
        assert all(len(d.logprobs) == len(d.token_ids) == 1 for d in deltas if d.token_ids)
        assert "".join(d.text for d in deltas) == text
        pieces = [d.logprobs[0].chosen.text for d in deltas if d.token_ids]
        assert any("\ufffd" in piece for piece in pieces)


async def test_without_asking_there_are_none(checkpoint):
    async with front(checkpoint) as f:
        worker = await f.worker()
        assert told(await collect(f.call(stop=stop(max_tokens=5))))[1] == []
        assert not worker.requests[0].HasField("num_logprobs")


# -- the prompt ------------------------------------------------------------------------------------


async def test_echo_comes_first_and_once(checkpoint):
    async with front(checkpoint) as f:
        worker = await f.worker(by_seed=scripted(f, 3), group=2)
        f.prefill()
        output = inference_pb2.Output(echo=True)
        fields = {"sampling": sampling(), "output": output, "stop": stop(max_tokens=6)}
        responses = await collect(f.call(prompt=TEXT, n=3, **fields))
        assert responses[0].prompt.text == TEXT
        ids = f.coordinator.model.tokenizer.encode(TEXT)
        assert list(responses[0].prompt.token_ids) == ids
        assert not responses[0].prompt.logprobs
        assert sum(r.HasField("prompt") for r in responses) == 1
        assert [i for _, i, _ in by_index(responses[1:], 3)] == [a[:6] for a in answers(f, 3)]
        assert all(r.HasField("prefill") for r in worker.requests)
        (first, *_) = await collect(f.call(prompt=PROMPT, **fields))
        assert first.prompt.text == f.coordinator.model.tokenizer.decode(PROMPT)
        assert f.coordinator.model.limits.vocab_size > max(first.prompt.token_ids)


async def test_echo_alone_needs_no_worker(checkpoint):
    async with front(checkpoint) as f:
        output = inference_pb2.Output(echo=True)
        prompt, done = await collect(f.call(prompt=TEXT, output=output, stop=stop(max_tokens=0)))
        assert prompt.prompt.text == TEXT
        assert done.finished.finish_reason == inference_pb2.FINISH_REASON_LENGTH
        assert done.finished.usage.completion_tokens == 0
        assert done.finished.usage.prompt_tokens == len(prompt.prompt.token_ids)


@pytest.mark.parametrize("max_tokens", [0, 5])
@pytest.mark.parametrize("after", [None, 0, 3])
async def test_the_prompt_s_logprobs_once_also_across_a_loss(
    checkpoint,
    max_tokens,
    after,
):
    async with front(checkpoint) as f:
        cues = [] if after is None else [Cue(min(after, max_tokens), lost())]
        first = await f.worker("d0", cues=cues)
        second = await f.worker("d1")
        f.prefill()
        output = inference_pb2.Output(prompt_logprobs=2, logprobs=1)
        responses = await collect(f.call(output=output, stop=stop(max_tokens=max_tokens)))
        text_of = f.coordinator.model.tokenizer.text_of
        prompt = responses[0].prompt
        assert prompt.text == ""
        assert list(prompt.token_ids) == PROMPT
        check_entries(prompt.logprobs, PROMPT[1:], 1, 2, text_of)
        assert sum(r.HasField("prompt") for r in responses) == 1
        ids, entries = told(responses)
        assert ids == f.answer[:max_tokens]
        check_entries(entries, ids, 0, 1, text_of)
        calls = first.requests + second.requests
        assert not calls[0].HasField("prefill"), "a worker that scores a prompt computes all of it"
        assert calls[0].num_prompt_logprobs == 2
        for request in calls[1:]:
            told_before = max_tokens == 0 or len(request.output_token_ids) > 0
            assert request.HasField("num_prompt_logprobs") != told_before


async def test_choices_wait_for_the_prompt_s_part(checkpoint):
    async with front(checkpoint) as f:
        worker = await f.worker(by_seed=scripted(f, 3))
        output = inference_pb2.Output(prompt_logprobs=0)
        fields = {"n": 3, "sampling": sampling(), "stop": stop(max_tokens=4)}
        responses = await collect(f.call(output=output, **fields))
        assert responses[0].HasField("prompt")
        assert [i for _, i, _ in by_index(responses[1:], 3)] == [a[:4] for a in answers(f, 3)]
        assert [r.HasField("num_prompt_logprobs") for r in worker.requests] == [True, False, False]


async def test_a_prompt_of_one_token_has_no_log_probabilities(checkpoint):
    async with front(checkpoint) as f:
        await f.worker()
        output = inference_pb2.Output(prompt_logprobs=3)
        for max_tokens in (0, 2):
            got = await collect(f.call(prompt=[5], output=output, stop=stop(max_tokens=max_tokens)))
            assert list(got[0].prompt.token_ids) == [5]
            assert not got[0].prompt.logprobs
            assert got[-1].finished.usage.completion_tokens == max_tokens


def test_text_of_a_token_is_what_it_writes_alone(checkpoint):
    tokenizer = checkpoint[1]
    assert tokenizer.text_of(2) == "<|im_end|>"
    assert tokenizer.text_of(10**6) == ""
    ids = tokenizer.encode("The river was wide.")
    assert "".join(map(tokenizer.text_of, ids)) == "The river was wide."
    broken = tokenizer.encode("🙂")
    assert len(broken) > 1
    assert all("\ufffd" in tokenizer.text_of(i) for i in broken)
    assert b"".join(map(tokenizer.raw_of, broken)).decode() == "🙂"
    assert [tokenizer.raw_of(i) for i in (2, 10**6, *ids)] == [None] * (2 + len(ids))
    assert Detokenizer(tokenizer).push(broken) == "🙂"
