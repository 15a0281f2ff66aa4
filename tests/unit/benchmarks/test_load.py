import asyncio
import json
import time

import pytest

from benchmarks.load.drive import Driver
from benchmarks.load.openai import Reading, request_bytes
from benchmarks.load.sse import EventParser, HttpError
from benchmarks.plan import Endpoint, PlannedLane, Record

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
BODY = b'data: {"a": 1}\n\n: comment\n\ndata: {"b": 2}\r\n\r\ndata: [DONE]\n\n'


def chunked(body, size):
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    framed = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in parts)
    return HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + framed + b"0\r\n\r\n"


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("stream", [HEAD + b"\r\n" + BODY, chunked(BODY, 5), chunked(BODY, 500)])
def test_events_come_out_whole_however_the_bytes_are_cut(stream, step):
    parser, events = EventParser(), []
    for i in range(0, len(stream), step):
        events += parser.feed(stream[i : i + step])
    assert [json.loads(e) for e in events] == [{"a": 1}, {"b": 2}]
    assert parser.done
    parser.close()


def test_what_is_no_stream_of_events_is_an_error():
    parser = EventParser()
    parser.feed(b"HTTP/1.1 429 Too Many\r\nContent-Length: 4\r\n\r\nbusy")
    with pytest.raises(HttpError, match="429: busy"):
        parser.close()
    parser = EventParser()
    parser.feed(HEAD + b"\r\n" + b'data: {"a": 1}\n\n')
    with pytest.raises(HttpError, match="early"):
        parser.close()
    with pytest.raises(HttpError, match="not an HTTP"):
        EventParser().feed(b"SMTP ready\r\n\r\n")


def chunk(text="", **fields):
    usage = fields.pop("usage", None)
    return json.dumps({"choices": [{"text": text, **fields}], "usage": usage}).encode()


def test_tokens_are_counted_as_the_server_tells():
    record = Record("all", 5, 0.0)
    reading = Reading(record)
    reading.take(1.0, [chunk("ab", token_ids=[1, 2])])
    reading.take(2.0, [chunk("", token_ids=[3]), chunk("c", token_ids=[4])])
    reading.take(3.0, [chunk("", token_ids=[], usage={"completion_tokens": 4})])
    reading.finish()
    assert (record.times_s, record.counts, record.completion_tokens) == ([1.0, 2.0], [2, 2], 4)
    assert record.text == "abc"


def test_tokens_that_no_message_carried_go_into_the_last():
    record = Record("all", 5, 0.0)
    reading = Reading(record)
    reading.take(1.0, [chunk("a")])
    reading.take(2.0, [chunk("")])
    reading.take(3.0, [chunk("b")])
    done = {"choices": [], "usage": {"completion_tokens": 5}, "timings": {"draft_n": 4,
            "draft_n_accepted": 2}}  # fmt: skip
    reading.take(4.0, [json.dumps(done).encode()])
    reading.finish()
    assert record.counts == [1, 4]
    assert (record.draft_tokens, record.accepted_tokens) == (4, 2)


def test_a_request_is_greedy_and_has_no_early_end():
    endpoint = Endpoint("openai", "h:1", "m", {"cache_prompt": True})
    head, _, body = request_bytes(endpoint, (1, 2), 7).partition(b"\r\n\r\n")
    sent = json.loads(body)
    assert f"Content-Length: {len(body)}".encode() in head
    assert (sent["prompt"], sent["max_tokens"], sent["temperature"]) == ([1, 2], 7, 0)
    assert sent["ignore_eos"] and sent["stream"] and sent["cache_prompt"]


class FakeApi:
    """Answers after `delay_s`; prompts that begin with 9 fail."""

    def __init__(self, delay_s):
        self.delay_s = delay_s
        self.running = self.most = 0

    async def run(self, record, prompt, max_tokens):
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(self.delay_s)
            if prompt[0] == 9:
                raise ConnectionError("gone")
            record.arrive(record.sent_s + self.delay_s, max_tokens - (prompt[0] == 8))
        finally:
            self.running -= 1

    async def close(self):
        pass


def lane(prompts, **fields):
    values = {"concurrency": 1, "start_s": 0.0, "every_s": 0.0, "until_s": None} | fields
    return PlannedLane(role="all", max_tokens=4, prompts=tuple((p,) for p in prompts), **values)


async def play(api, *lanes, limit_s=5.0):
    driver = Driver(api, time.monotonic())
    await driver.play(lanes, limit_s)
    return driver.records


async def test_a_closed_loop_keeps_its_streams_busy_and_no_more():
    api = FakeApi(0.01)
    records = await play(api, lane([1] * 7, concurrency=3))
    assert (len(records), api.most) == (7, 3)
    assert not any(r.error for r in records)


async def test_an_open_loop_does_not_wait_for_answers():
    api = FakeApi(0.2)
    records = await play(api, lane([1] * 3, concurrency=0, every_s=0.02, start_s=0.01))
    assert api.most == 3
    assert [round(r.planned_s, 3) for r in records] == [0.01, 0.03, 0.05]


async def test_no_request_starts_after_the_lane_s_end():
    records = await play(FakeApi(0.05), lane([1] * 9, concurrency=2, until_s=0.08))
    assert len(records) == 4


async def test_failures_short_answers_and_the_limit_are_errors():
    gone, short = await play(FakeApi(0.0), lane([9, 8]))
    assert "gone" in gone.error and "3 tokens came" in short.error
    (cut,) = await play(FakeApi(5.0), lane([1]), limit_s=0.05)
    assert "limit" in cut.error
