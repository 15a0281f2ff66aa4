"""The comparison, and every interleaving of the reads and writes that it depends on."""

from itertools import combinations

import pytest

from kvtransfer.fence import Fence

OLD, NEW = "old", "new"


def test_differences_are_reported_by_index() -> None:
    top = 2**64 - 1
    assert Fence().stale([5, 6, top], [5, 6, top]) == ()
    assert Fence().stale([5, 6, top], [5, 7, 0]) == (1, 2)
    assert Fence().stale([], []) == ()
    assert Fence(enabled=False).stale([5], [6]) == ()
    with pytest.raises(ValueError, match="2 expected generations for 1 read"):
        Fence().stale([1, 2], [1])


def run(order: tuple[str, ...], reader: list[str], writer: list[str]) -> tuple[list[str], int]:
    """One interleaving over a block of two bytes and its generation, begun at 7."""
    block, generation, seen, read_generation = [OLD, OLD], 7, [OLD, OLD], -1
    steps = {"reader": iter(reader), "writer": iter(writer)}
    for side in order:
        step = next(steps[side])
        if step == "bump":
            generation += 1
        elif step == "fence":
            read_generation = generation
        elif side == "writer":
            block[int(step)] = NEW
        else:
            seen[int(step)] = block[int(step)]
    return seen, read_generation


def interleavings(num_reader: int, num_writer: int) -> list[tuple[str, ...]]:
    total = num_reader + num_writer
    return [
        tuple("reader" if i in chosen else "writer" for i in range(total))
        for chosen in combinations(range(total), num_reader)
    ]


@pytest.mark.parametrize("writes", [["0", "1"], ["1", "0"]])
def test_no_interleaving_passes_a_new_byte(writes: list[str]) -> None:
    outcomes = [run(order, ["0", "1", "fence"], ["bump", *writes]) for order in interleavings(3, 3)]
    assert any(seen == [OLD, NEW] or seen == [NEW, OLD] for seen, _ in outcomes)
    for seen, generation in outcomes:
        if not Fence().stale([7], [generation]):
            assert seen == [OLD, OLD]


@pytest.mark.parametrize(
    ("reader", "writer"),
    [
        (["fence", "0", "1"], ["bump", "0", "1"]),  # generation read with or before the data
        (["0", "fence", "1"], ["bump", "0", "1"]),
        (["0", "1", "fence"], ["0", "bump", "1"]),  # bumped after the first write
    ],
)
def test_any_other_order_would_let_poison_through(reader: list[str], writer: list[str]) -> None:
    outcomes = [run(order, reader, writer) for order in interleavings(3, 3)]
    assert any(NEW in seen and not Fence().stale([7], [gen]) for seen, gen in outcomes)
