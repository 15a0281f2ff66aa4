"""Several coroutines as one stream: order, bounds, failures; nothing runs afterwards."""

import asyncio

import pytest

from coordinator.generation.fan_in import Merge
from engine.base.errors import DeadlineExceeded, InvalidRequest


async def count(merge, name, n, pace_s=0.0):
    for i in range(n):
        await asyncio.sleep(pace_s)
        await merge.put((name, i))


async def test_all_items_come_each_work_in_its_order():
    merge = Merge()
    async with merge:
        for name in "abc":
            merge.add(count(merge, name, 50, 0.0001))
        got = [item async for item in merge]
    for name in "abc":
        assert [i for work, i in got if work == name] == list(range(50))
    assert len(got) == 150


async def test_work_may_add_work():
    merge = Merge()

    async def parent():
        await merge.put(("parent", 0))
        merge.add(count(merge, "child", 3))

    async with merge:
        merge.add(parent())
        assert len([item async for item in merge]) == 4


async def test_without_work_it_is_empty():
    async with Merge() as merge:
        assert [item async for item in merge] == []


async def test_put_waits_for_the_reader():
    merge = Merge(room=4)
    async with merge:
        task = merge.add(count(merge, "a", 10))
        await asyncio.sleep(0.05)
        assert not task.done()
        assert merge._items.qsize() == 4
        assert len([item async for item in merge]) == 10


async def test_a_failure_is_the_readers_and_ends_the_rest():
    ended = asyncio.Event()

    async def endless():
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    async def failing():
        await asyncio.sleep(0.01)
        raise InvalidRequest("field", "wrong")

    merge = Merge()
    with pytest.raises(InvalidRequest, match="wrong"):
        async with merge:
            merge.add(endless())
            merge.add(failing())
            async for _ in merge:
                raise AssertionError("nothing is put")
    assert ended.is_set()


async def test_the_limit_holds_while_the_reader_does_not_read():
    merge = Merge(room=1)
    async with merge:
        task = merge.add(count(merge, "a", 10), 0.05)
        await asyncio.wait([task], timeout=5)
        assert task.done()
        assert await anext(merge) == ("a", 0)
        with pytest.raises(DeadlineExceeded, match=r"0\.05 s"):
            await anext(merge)


async def test_cancelled_work_just_ends():
    merge = Merge()
    async with merge:
        merge.add(count(merge, "a", 3, 0.01))
        merge.add(count(merge, "b", 1000, 0.01)).cancel()  # before it began
        running = merge.add(count(merge, "c", 1000, 0.005))
        await asyncio.sleep(0.02)
        running.cancel()
        got = [item async for item in merge]
    assert [i for work, i in got if work == "a"] == [0, 1, 2]
    assert {work for work, _ in got} == {"a", "c"}


async def test_leaving_ends_work_that_never_began():
    async with Merge() as merge:
        task = merge.add(count(merge, "a", 3))
    assert task.cancelled()
