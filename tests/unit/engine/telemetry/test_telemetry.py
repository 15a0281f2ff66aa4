import asyncio
import io
import json
import logging
import urllib.request

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from engine.base.errors import ConfigError
from engine.base.option_groups import LogOptions
from engine.http.server import make_app, serve_http
from engine.telemetry.coordinator_metrics import CoordinatorMetrics
from engine.telemetry.log import bind_request, configure_logging, get_logger
from engine.telemetry.metrics import RpcMetrics, WorkerMetrics
from engine.telemetry.timeline import Event, Timeline


@pytest.fixture
def restore_logging():
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


async def test_json_lines_have_request_process_and_libraries(restore_logging):
    stream = io.StringIO()
    configure_logging(LogOptions(), stream=stream, role="decode", worker_id="d0")

    async def call(request_id):
        bind_request(request_id)
        await asyncio.sleep(0)
        get_logger("engine.x").info("token", num_tokens=3)

    await asyncio.gather(call("r1"), call("r2"))
    logging.getLogger("uvicorn.error").warning("library %s", "line")
    try:
        raise ValueError("inside")
    except ValueError:
        get_logger("engine.x").exception("failed")
    get_logger("engine.x").debug("not written")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line.get("request_id") for line in lines] == ["r1", "r2", None, None]
    assert {line["role"] for line in lines} == {"decode"}
    assert lines[0]["event"] == "token"
    assert lines[0]["num_tokens"] == 3
    assert lines[2]["event"] == "library line"
    assert "ValueError: inside" in lines[3]["exception"]


def test_console_lines_are_no_json(restore_logging):
    stream = io.StringIO()
    configure_logging(LogOptions(log_format="console"), stream=stream)
    get_logger("a").info("hello", field=1)
    assert "hello" in stream.getvalue()
    assert "field=1" in stream.getvalue()
    assert not stream.getvalue().startswith("{")


def test_worker_series():
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry, "m")
    metrics.set_blocks(free=1, cached=2, held=1)
    metrics.kv_transfer_failed("peer_lost")
    metrics.spec_decode_num_accepted_tokens.inc(3)
    metrics.iteration_tokens.observe(5)
    text = generate_latest(registry).decode()
    for line in (
        'diptych_kv_blocks{model_name="m",state="held"} 1.0',
        'diptych_kv_cache_usage_perc{model_name="m"} 0.25',
        'diptych_kv_transfer_failures_total{model_name="m",reason="peer_lost"} 1.0',
        'diptych_spec_decode_num_accepted_tokens_total{model_name="m"} 3.0',
        'diptych_iteration_tokens_total_bucket{le="8.0",model_name="m"} 1.0',
        'diptych_kv_stale_reads_total{model_name="m"} 0.0',
    ):
        assert line in text
    with pytest.raises(ValueError, match="Duplicated"):
        WorkerMetrics(registry, "m")


def test_coordinator_series_and_buckets():
    registry = CollectorRegistry()
    metrics = CoordinatorMetrics(registry, "m")
    RpcMetrics(registry).failed("S/M", "internal")
    metrics.inter_token_latency_seconds.observe(0.003)
    metrics.request_succeeded("stop")
    metrics.migrated("resumed")
    metrics.set_workers("decode", "ready", 2)
    text = generate_latest(registry).decode()
    for line in (
        'diptych_inter_token_latency_seconds_bucket{le="0.002",model_name="m"} 0.0',
        'diptych_inter_token_latency_seconds_bucket{le="0.004",model_name="m"} 1.0',
        'diptych_request_success_total{finished_reason="stop",model_name="m"} 1.0',
        'diptych_migrations_total{model_name="m",outcome="resumed"} 1.0',
        'diptych_workers{model_name="m",role="decode",state="ready"} 2.0',
        'diptych_rpc_failures_total{code="internal",method="S/M"} 1.0',
    ):
        assert line in text


def test_timeline_is_subtraction():
    now = [10.0]
    timeline = Timeline(lambda: now[0])
    timeline.mark(Event.ARRIVED)
    for moment in (12.0, 13.0, 16.0):
        now[0] = moment
        timeline.mark(Event.TOKENS)
    timeline.mark(Event.FINISHED, at=20.0)
    assert timeline.between(Event.ARRIVED, Event.TOKENS) == 2.0
    assert timeline.span(Event.TOKENS) == 4.0
    assert timeline.as_dict()["tokens"][2] == 3
    assert timeline.between(Event.FINISHED, Event.ARRIVED) == 0.0
    assert timeline.between(Event.ARRIVED, Event.PULLED) == 0.0
    assert timeline.last(Event.PULLED) is None
    assert timeline.as_dict()["tokens"] == (12.0, 16.0, 3)


def fetch(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


async def test_http_server():
    registry = CollectorRegistry()
    WorkerMetrics(registry, "m")
    ready = [False]
    server = await serve_http(make_app(registry, lambda: ready[0]), "127.0.0.1:0")
    base = f"http://{server.address}"
    assert not server.address.endswith(":0")
    status, text = await asyncio.to_thread(fetch, base + "/metrics")
    assert status == 200
    assert "diptych_kv_stale_reads_total" in text
    assert (await asyncio.to_thread(fetch, base + "/health"))[0] == 200
    assert (await asyncio.to_thread(fetch, base + "/health/ready"))[0] == 503
    ready[0] = True
    assert (await asyncio.to_thread(fetch, base + "/health/ready"))[0] == 200
    with pytest.raises(ConfigError, match=server.address):
        await serve_http(make_app(registry, lambda: True), server.address)
    await server.stop()
    again = await serve_http(make_app(registry, lambda: True), server.address)
    await again.stop()
