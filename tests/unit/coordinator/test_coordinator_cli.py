"""The commands as a user runs them: status, one sentence, no traceback."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest

from coordinator.client import Client
from coordinator.cluster.worker import Load, Worker
from coordinator.process import describe_context, make_supervisor, serve
from coordinator.server import dialable
from engine.base.memory import HostMemory
from engine.base.option_groups import (
    AuthOptions,
    CacheOptions,
    DraftOptions,
    FleetOptions,
    FrontOptions,
    LogOptions,
    ModelOptions,
    StartOptions,
    StepOptions,
    TransferOptions,
)
from engine.base.types import KVPool, Peer, Role
from tests.support.fake_coordinator import ANSWER, FakeCoordinator, of_choice, whole
from tests.support.fake_decode import identity
from tests.support.stderr import sentences


def run(*args, **kwargs):
    command = [sys.executable, "-m", "coordinator.cli", *args]
    kwargs.setdefault("timeout", 60)
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)


@pytest.fixture
def used_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield f"127.0.0.1:{sock.getsockname()[1]}"


def one_sentence(done, status, *words):
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = sentences(done.stderr)
    for word in words:
        assert word in line


def test_bad_options():
    one_sentence(run("start", "--dtype", "int3"), 2, "--dtype", "int3")
    one_sentence(run("start", "--nonsense"), 2, "--nonsense")
    one_sentence(run("begin"), 2, "begin")
    one_sentence(run("generate", "x", "--max-tokens", "-1"), 2, "--max-tokens")


BAD_ANSWER_FLAGS = [
    (["--max-tokens", "5000000000"], "--max-tokens"),
    (["--top-k", "4294967296"], "--top-k"),
    (["--seed", "18446744073709551616"], "--seed"),
    (["--timeout", "nan"], "--timeout"),
    (["--timeout", "inf"], "--timeout"),
    (["--timeout", "-1"], "--timeout"),
    (["--server", "nonsense"], "--server"),
    (["--server", ""], "--server"),
    (["--server", "127.0.0.1:1,,"], "--server"),
    (["--stop", b"\xff"], "--stop"),
    (["--n", "-1"], "--n"),
    (["--regex", b"\xff"], "--regex"),
    (["--json-schema", "/nowhere"], "--json-schema"),
    (["--json-schema", "/nowhere", "--regex", "a"], "--regex"),
]


@pytest.mark.parametrize(("flags", "word"), BAD_ANSWER_FLAGS)
def test_bad_flags_of_an_answer(flags, word):
    one_sentence(run("generate", "x", *flags), 2, word)


async def test_several_answers_and_constraints(tmp_path):
    fake = FakeCoordinator()
    await fake.start()
    ask = ["generate", "x", "--server", fake.address]
    try:
        done = await asyncio.to_thread(run, *ask, "--n", "3")
        assert done.returncode == 0, done.stderr
        texts = [whole(of_choice(ANSWER, i)) for i in range(3)]
        assert sorted(done.stdout.split("--- ")) == [
            "",
            *(f"choice {i}\n{text}\n" for i, text in enumerate(texts)),
        ]
        assert done.stderr.count("[length; ") == 3
        for command in (ask, ["chat", "x", "--server", fake.address]):
            done = await asyncio.to_thread(run, *command, "--regex", "é+", "--quiet")
            assert (done.returncode, done.stdout) == (0, whole(ANSWER) + "\n")
            assert fake.requests[-1].constraint.regex == "é+"
        schema = tmp_path / "schema.json"
        schema.write_text('{"type": "object"}')
        await asyncio.to_thread(run, *ask, "--json-schema", str(schema))
        assert fake.requests[-1].constraint.json_schema == '{"type": "object"}'
        assert not fake.requests[-1].HasField("n")
    finally:
        await fake.stop()


def test_bytes_that_are_no_text():
    one_sentence(run("generate", b"\xff\xfe"), 2, "prompt", "UTF-8")
    one_sentence(run("chat", "x", "--system", b"\xff"), 2, "--system", "UTF-8")
    bad = b"\xff\xfe\n".decode("utf-8", "surrogateescape")
    for command in (["generate", "-"], ["chat"]):
        one_sentence(run(*command, input=bad, errors="surrogateescape"), 2, "standard input")


def test_text_in_a_locale_that_cannot_hold_it():
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for command in (["generate"], ["chat"]):
        prompt = "é".encode()
        done = run(*command, prompt, "--server", "127.0.0.1:1", env=ascii_only)
        one_sentence(done, 1, "no coordinator answers")


def test_a_missing_model():
    one_sentence(run("start", "--model", "/nowhere/model.gguf"), 2, "/nowhere/model.gguf")


@pytest.mark.parametrize("flag", ["--listen", "--http"])
def test_a_used_port(used_port, flag):
    other = {"--listen": "--http", "--http": "--listen"}[flag]
    done = run("start", "--workers", "external", flag, used_port, other, "127.0.0.1:0")
    one_sentence(done, 2, used_port, "in use")


@pytest.mark.parametrize("flag", ["--listen", "--http", "--internal-listen"])
def test_a_used_port_is_found_before_a_model_is_read(used_port, flag):
    done = run("start", "--model", "/nowhere/model.gguf", flag, used_port)
    one_sentence(done, 2, used_port, "in use")


@pytest.mark.parametrize("flag", ["--listen", "--http"])
def test_a_worker_finds_a_used_port_before_it_loads(used_port, flag):
    command = [sys.executable, "-m", "worker.cli", "decode", "start"]
    command += ["--model", "/nowhere/model.gguf", flag, used_port]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    one_sentence(done, 2, used_port, "in use")


def test_nobody_answers(used_port):
    for command in (["generate", "x"], ["chat", "x"], ["status"]):
        one_sentence(
            run(*command, "--server", "127.0.0.1:1"), 1, "no coordinator answers at 127.0.0.1:1"
        )
    several = "127.0.0.1:1,127.0.0.1:2"
    one_sentence(
        run("generate", "x", "--server", several), 1, f"no coordinator answers at {several}"
    )


def test_help_is_for_newcomers():
    done = run("--help")
    assert done.returncode == 0
    for word in ("start", "generate", "chat", "status", "examples:"):
        assert word in done.stdout
    done = run("start", "--help")
    for word in ("--model", "--prefill-workers", "--listen", "--worker-wait-s", "[smollm2]"):
        assert word in done.stdout


def test_serving_without_workers_until_a_signal(tmp_path):
    env = {**os.environ, "DIPTYCH_WORKER_WAIT_S": "0.2"}
    command = [sys.executable, "-m", "coordinator.cli", "start", "--workers", "external"]
    command += ["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("coordinator: serving smollm2 on 127.0.0.1:")
        address = line.split(" on ")[1].split()[0]
        http = line.split("(HTTP ")[1].split(")")[0]
        with urllib.request.urlopen(f"http://{http}/health", timeout=5) as answer:
            assert answer.status == 200
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(f"http://{http}/health/ready", timeout=5)
        with Client(address) as client:
            assert not client.model().ready
        done = run("generate", "x", "--timeout", "3", "--server", address)
        first, last = sentences(done.stderr)
        assert first == "coordinator: waiting for a decode worker"
        # The client tries again until its time is over; a loaded machine leaves none for the last.
        assert "time ran out" in last or "no decode worker is ready" in last
        done = run("generate", "x", "--timeout", "3", "--quiet", "--server", address)
        assert "time ran out" in done.stderr or "no decode worker is ready" in done.stderr
        one_sentence(done, 1)
        port = address.rpartition(":")[2]
        for command in (("generate", "x"), ("chat", "x"), ("status",), ("drain", "w")):
            wrong = run(*command, "--server", http)
            one_sentence(wrong, 1, "this is an HTTP port", f"is {port}")
        done = run("status", "--server", f"127.0.0.1:1,{address}")
        assert done.returncode == 0, done.stderr
        assert "not ready" in done.stdout
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert time.monotonic() - began < 5
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_drains_and_once_more_stops_now(tmp_path, presses):
    """A request that waits for a worker is inside: it is what the draining waits for."""
    command = [sys.executable, "-m", "coordinator.cli", "start", "--workers", "external"]
    command += ["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--log-format", "json"]
    command += ["--worker-wait-s", "3" if presses == 1 else "60", "--drain-s", "60"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        line = process.stdout.readline()
        address, http = line.split(" on ")[1].split()[0], line.split("(HTTP ")[1].split(")")[0]
        asking = subprocess.Popen(
            [sys.executable, "-m", "coordinator.cli", "generate", "x", "--server", address],
            stderr=subprocess.PIPE,
            text=True,
        )
        until(lambda: is_waiting(http))
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        until(lambda: "Ctrl-C again to stop now" in (tmp_path / "log").read_text())
        if presses == 2:
            process.send_signal(signal.SIGINT)
        assert process.wait(20) == (0 if presses == 1 else 130)
        assert time.monotonic() - began < 10
        said = (tmp_path / "log").read_text()
        assert "Traceback" not in said
        assert "KeyboardInterrupt" not in said
    finally:
        process.kill()
        process.wait()
        asking.kill()
        asking.wait()


def is_waiting(http):
    with urllib.request.urlopen(f"http://{http}/metrics", timeout=5) as answer:
        return re.search(r"num_requests_waiting\S* 1", answer.read().decode())


def until(condition, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def options_of(tmp_path, **model):
    return StartOptions(
        ModelOptions(model="m.gguf", model_name="mine", dtype="float32", **model),
        FrontOptions(),
        FleetOptions(prefill_workers=2, decode_workers=1, log_dir=str(tmp_path)),
        CacheOptions(block_size=32),
        StepOptions(max_num_seqs=3),
        DraftOptions(draft_tokens=2),
        TransferOptions(),
        LogOptions(),
    )


async def test_a_local_worker_keeps_its_share_of_the_memory(tmp_path, monkeypatch):
    """What others have taken or given back since the start changes no pool."""
    found = [HostMemory(9 << 30, "the cgroup's 10 GiB"), HostMemory(1 << 20, "a neighbour")]
    monkeypatch.setattr("coordinator.process.host_memory", lambda: found.pop(0))
    supervisor = make_supervisor(options_of(tmp_path), "0.0.0.0:700")
    for name in ("prefill-0", "prefill-1", "decode-0", "decode-0"):  # the last starts again
        role = Role(name.partition("-")[0])
        command = supervisor.command(name, role)
        assert f"--memory-share={3 << 30}:the cgroup's 10 GiB" in command


async def test_local_workers_are_dealt_gpus_and_parts_of_them(tmp_path):
    options = replace(options_of(tmp_path), gpus=("GPU-a", "GPU-b"))
    supervisor = make_supervisor(options, "0.0.0.0:700")
    assert supervisor.assigned == {
        "prefill-0": {"CUDA_VISIBLE_DEVICES": "GPU-a"},
        "prefill-1": {"CUDA_VISIBLE_DEVICES": "GPU-b"},
        "decode-0": {"CUDA_VISIBLE_DEVICES": "GPU-a"},
    }
    shared = supervisor.command("decode-0", Role.DECODE)
    assert "--gpu-memory-utilization=0.45" in shared
    alone = supervisor.command("prefill-1", Role.PREFILL)
    assert not any("utilization" in word for word in alone), "the default, 0.9"
    assert make_supervisor(options_of(tmp_path), "0.0.0.0:700").assigned == {}


@pytest.mark.parametrize(
    ("device", "workers", "gpus"),
    [("auto", "local", ("GPU-a", "GPU-b")), ("cpu", "local", ()), ("auto", "external", ())],
)
def test_a_start_looks_for_the_gpus_of_its_own_workers(monkeypatch, device, workers, gpus):
    """And prepares no weights for kernels of the CPU where they compute."""
    started, prepared = [], []

    async def start(options, served, trust):
        started.append(options)
        return 0

    fakes = {
        "find_gpus": lambda: ["GPU-a", "GPU-b"],
        "resolve": lambda model, weights=True: SimpleNamespace(name="m", config=None),
        "check_length": lambda config, max_model_len: None,
        "prepare_weights": lambda *args, on_gpu: prepared.append(on_gpu),
        "ServedModel": mock.Mock(),
        "configure_logging": mock.Mock(),
        "_serve": start,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(f"coordinator.process.{name}", fake)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        options = StartOptions(
            ModelOptions(device=device),
            FrontOptions(listen="127.0.0.1:0", http="127.0.0.1:0"),
            FleetOptions(workers=workers),
            *(kind() for kind in (CacheOptions, StepOptions, DraftOptions, TransferOptions)),
            LogOptions(),
            AuthOptions(),
        )
        status = serve(options)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert (status, started[0].gpus) == (0, gpus)
    assert prepared == ([bool(gpus)] if workers == "local" else [])


def test_the_ready_line_tells_where_the_context_comes_from():
    pool = KVPool(192 << 20)
    worker = Worker(
        Peer("d0", "i", "a"), Role.DECODE, "", identity(), "ready", Load(), 1, 0, 0, kv_pool=pool
    )
    assert describe_context(8192, worker) == "context 8,192 tokens: KV pool 192 MiB"
    worker = replace(worker, kv_pool=replace(pool, limit="the cgroup's 2 GiB"))
    assert describe_context(2944, worker).endswith("MiB, limited by the cgroup's 2 GiB")
    assert describe_context(8192, None) == "context 8,192 tokens"


async def test_local_workers_get_their_options_as_flags(tmp_path):
    options = options_of(tmp_path)
    supervisor = make_supervisor(options, "0.0.0.0:700")
    names = [(w.worker_id, w.role) for w in supervisor.workers]
    assert names == [
        ("prefill-0", Role.PREFILL),
        ("prefill-1", Role.PREFILL),
        ("decode-0", Role.DECODE),
    ]
    prefill, decode = (supervisor.command(f"{r.value}-0", r) for r in (Role.PREFILL, Role.DECODE))
    assert prefill[:3] == ["worker.cli", "prefill", "start"]
    assert prefill[-2:] == ["--worker-id", "prefill-0"]
    for flag, value in (
        ("--coordinator", "127.0.0.1:700"),
        ("--model-name", "mine"),
        ("--block-size", "32"),
        ("--max-num-seqs", "3"),
    ):
        assert f"{flag}={value}" in prefill
        assert f"{flag}={value}" in decode
    assert not any("--draft-tokens" in word for word in prefill)
    assert "--draft-tokens=2" in decode


def test_dialable():
    assert dialable("0.0.0.0:5") == "127.0.0.1:5"
    assert dialable("[::]:5") == "[::1]:5"
    assert dialable("host:5") == "host:5"
