import random

import pytest

from benchmarks.corpus import DEFAULT_TEXT, Corpus, Plain, Repeated, SharedPrefix
from benchmarks.plan import Endpoint, Plan, Record, Result
from benchmarks.workloads import GROUPS, WORKLOADS, Speculation, pick, quick


class Letters:
    """One token a character; a BOS before each prompt."""

    def encode(self, text, add_special_tokens=True):
        return ([0] if add_special_tokens else []) + [ord(c) for c in text]

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(i) for i in ids)


@pytest.fixture(scope="module")
def corpus():
    return Corpus(DEFAULT_TEXT.read_text(encoding="utf-8")[:100_000], Letters())


def test_prompts_have_their_length_begin_with_a_word_and_depend_on_the_seed(corpus):
    first = Plain((40, 7)).make(corpus, random.Random(1), 4)
    assert [len(ids) for ids in first] == [40, 7, 40, 7]
    assert all(ids[0] == 0 for ids in first)  # the BOS stands in place of the leading space
    assert all(not chr(ids[1]).isspace() or chr(ids[1]) == "\n" for ids in first)
    assert first == Plain((40, 7)).make(corpus, random.Random(1), 4)
    assert first != Plain((40, 7)).make(corpus, random.Random(2), 4)


def test_a_shared_prefix_is_shared_and_ends_differ(corpus):
    prompts = SharedPrefix(50, 10).make(corpus, random.Random(1), 5)
    assert {ids[:50] for ids in prompts} == {prompts[0][:50]}
    assert len({ids[50:] for ids in prompts}) == 5
    assert {len(ids) for ids in prompts} == {60}


def test_a_repeated_text_is_given_twice_and_begun(corpus):
    (ids,) = Repeated(30, 5).make(corpus, random.Random(1), 1)
    assert len(ids) == 65
    assert ids[1:30] == ids[31:60]
    assert ids[30:35] == ids[60:]


def test_a_text_that_is_too_short_says_so(corpus):
    with pytest.raises(ValueError, match="tokens"):
        Plain((1_000_000,)).make(corpus, random.Random(1), 1)


def test_prompts_change_with_the_repetition_alone(corpus):
    one, again, other = (WORKLOADS["W1"].plan(corpus, 1, n) for n in (1, 1, 2))
    assert one == again
    assert not set(one[0].prompts) & set(other[0].prompts)


def test_every_workload_fits_what_it_asks_for():
    for workload in WORKLOADS.values():
        for lane in workload.lanes:
            shape = lane.prompts
            if isinstance(shape, Plain):
                longest = max(shape.num_tokens)
            elif isinstance(shape, SharedPrefix):
                longest = shape.prefix_tokens + shape.own_tokens
            else:
                longest = 2 * shape.text_tokens + shape.begun_tokens
            assert longest + lane.max_tokens <= workload.needs.max_model_len, workload.name
            assert lane.concurrency or lane.every_s > 0, workload.name
        roles = {lane.role for lane in workload.lanes}
        assert workload.headline.role in roles, workload.name


def test_the_issue_s_lengths():
    (w1,) = WORKLOADS["W1"].lanes
    assert (w1.prompts, w1.max_tokens, w1.concurrency) == (Plain((128,)), 128, 1)
    assert WORKLOADS["W1"].speculation is Speculation.OFF
    (w2,) = WORKLOADS["W2"].lanes
    assert (w2.prompts, w2.max_tokens, w2.num_requests) == (Plain((256,)), 128, 32)
    steady, long = WORKLOADS["W3"].lanes
    assert (steady.concurrency, steady.prompts, steady.max_tokens) == (4, Plain((64,)), 256)
    assert (long.concurrency, long.prompts, long.max_tokens) == (0, Plain((2048,)), 16)
    assert long.every_s == 1.5


def test_names_and_groups():
    names = [w.name for w in pick("W2,main,soak", 30.0)]
    assert names == ["W2", *(n for n in GROUPS["main"] if n != "W2"), "soak"]
    assert pick("soak", 30.0)[0].lanes[0].until_s == 30.0
    with pytest.raises(ValueError, match="W9"):
        pick("W9", 1.0)
    assert quick(WORKLOADS["W2"]).lanes[0].num_requests == 8


def test_plans_and_results_survive_their_files(corpus, tmp_path):
    plan = Plan(Endpoint("openai", "h:1", "m", {"x": 1}), WORKLOADS["W3"].plan(corpus, 1, 1), 9.0)
    plan.write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == plan
    result = Result(1.0, 2.0, 0.1, [Record("all", 3, 0.0, times_s=[1.0], counts=[2])])
    result.write(tmp_path / "result.json")
    assert Result.read(tmp_path / "result.json") == result
