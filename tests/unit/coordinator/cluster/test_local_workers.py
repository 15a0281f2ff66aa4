"""Real processes under the supervisor; small modules stand in for workers."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import structlog.testing

from coordinator.cluster.local_workers import (
    LocalWorker,
    Supervisor,
    doing,
    process_options,
)
from engine.base.errors import ConfigError
from engine.base.types import Role
from tests.support.paths import ROOT

SLEEPER = """
import os, sys, time
print("up", os.getpid(), os.environ.get("DIPTYCH_LISTEN"), os.environ.get("OMP_PROBE"), flush=True)
time.sleep(60)
"""
STUBBORN = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SLEEPER
BAD = 'import sys\nprint("{}")\nprint("prefill: --dtype int3: no such dtype")\nsys.exit(2)\n'
BROKEN = "raise SystemExit(1)\n"


@pytest.fixture
def modules(tmp_path, monkeypatch):
    folder = tmp_path / "modules"
    folder.mkdir()
    for name, text in {
        "sleeper": SLEEPER,
        "stubborn": STUBBORN,
        "bad": BAD,
        "broken": BROKEN,
    }.items():
        (folder / f"{name}_worker.py").write_text(text)
    root = str(ROOT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), root]))
    return folder


def make(tmp_path, kind, places=1):
    return Supervisor(
        [(f"w{i}", Role.DECODE) for i in range(places)],
        tmp_path / "logs",
        lambda worker_id, role: [f"{kind}_worker", worker_id],
        lambda role, cores, count: ["--nice=1", "--env=OMP_PROBE=7"],
    )


async def until(condition, timeout_s=15.0):
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    return value


def ups(supervisor, index=0):
    """[pid, DIPTYCH_LISTEN, OMP_PROBE] of every start of one place."""
    text = supervisor.workers[index].log_path.read_text()
    return [line.split()[1:] for line in text.splitlines() if line.startswith("up")]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_a_killed_worker_comes_back_and_all_end(modules, tmp_path, monkeypatch):
    monkeypatch.setenv("DIPTYCH_LISTEN", "0.0.0.0:1")
    supervisor = make(tmp_path, "sleeper", places=2)
    supervisor.start()
    await until(lambda: ups(supervisor, 0) and ups(supervisor, 1))
    pid, listen, probe = ups(supervisor)[0]
    assert (listen, probe) == ("None", "7")  # options travel as flags, not by inheritance
    assert os.getpriority(os.PRIO_PROCESS, int(pid)) == os.getpriority(os.PRIO_PROCESS, 0) + 1
    os.kill(int(pid), signal.SIGKILL)
    await until(lambda: len(ups(supervisor)) == 2)
    assert ups(supervisor)[1][0] != pid
    assert supervisor.workers[0].num_restarts == 1
    assert not supervisor.fatal.done()
    pids = [int(ups(supervisor, i)[-1][0]) for i in range(2)]
    await supervisor.stop(5.0)
    assert not any(alive(p) for p in pids)


async def test_a_killed_worker_is_not_reported_with_bad_options(modules, tmp_path):
    (modules / "silent_worker.py").write_text("import os\nprint('{}')\nos.kill(os.getpid(), 9)\n")
    supervisor = make(tmp_path, "silent")
    with structlog.testing.capture_logs() as lines:
        supervisor.start()
        (end,) = await until(lambda: [x for x in lines if x["event"] == "local worker ended"])
        await supervisor.stop()
    assert (end["status"], end["said"]) == (-signal.SIGKILL, "")


async def test_a_worker_keeps_its_gpu_when_it_starts_again(modules, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    show = "import os\nprint('up', 0, os.environ['CUDA_VISIBLE_DEVICES'], 0, flush=True)\n"
    (modules / "gpu_worker.py").write_text(show)
    supervisor = Supervisor(
        [("w0", Role.PREFILL), ("w1", Role.DECODE)],
        tmp_path / "logs",
        lambda worker_id, role: ["gpu_worker", worker_id],
        assigned={"w0": {"CUDA_VISIBLE_DEVICES": "4"}, "w1": {"CUDA_VISIBLE_DEVICES": "GPU-b"}},
    )
    supervisor.start()
    await until(lambda: all(len(ups(supervisor, i)) >= 2 for i in range(2)))
    await supervisor.stop()
    assert {start[1] for start in ups(supervisor, 0)} == {"4"}
    assert {start[1] for start in ups(supervisor, 1)} == {"GPU-b"}


async def test_a_worker_that_does_not_listen_is_killed(modules, tmp_path):
    supervisor = make(tmp_path, "stubborn")
    supervisor.start()
    (start,) = await until(lambda: ups(supervisor))
    began = time.monotonic()
    await supervisor.stop(0.3)
    assert time.monotonic() - began < 4
    assert not alive(int(start[0]))


async def test_a_bad_configuration_is_fatal_with_its_error(modules, tmp_path):
    supervisor = make(tmp_path, "bad")
    supervisor.start()
    error = await asyncio.wait_for(supervisor.fatal, 15)
    assert error.message == "w0: prefill: --dtype int3: no such dtype"
    assert supervisor.workers[0].num_restarts == 0
    await supervisor.stop()


async def test_restarts_back_off(modules, tmp_path):
    supervisor = make(tmp_path, "broken")
    supervisor.start()
    await until(lambda: supervisor.workers[0].num_restarts >= 1)
    began = time.monotonic()
    await supervisor.stop(5.0)  # in the middle of a pause
    assert time.monotonic() - began < 2
    assert supervisor.workers[0].num_restarts < 4


async def test_a_worker_without_its_log_file_comes_back(modules, tmp_path):
    supervisor = make(tmp_path, "sleeper", places=2)
    supervisor.start()
    await until(lambda: ups(supervisor, 0) and ups(supervisor, 1))
    pids = [int(ups(supervisor, i)[0][0]) for i in range(2)]
    shutil.rmtree(tmp_path / "logs")
    os.kill(pids[0], signal.SIGKILL)
    await until(lambda: supervisor.workers[0].log_path.exists() and ups(supervisor, 0))
    shutil.rmtree(tmp_path / "logs")
    (tmp_path / "logs").write_text("a file")  # nor can it be made anew
    os.kill(pids[1], signal.SIGKILL)
    await until(lambda: supervisor.workers[1].process.pid != pids[1])
    assert supervisor.workers[1].process.poll() is None
    await supervisor.stop()


@pytest.mark.parametrize("what", ["Popen", "pidfd_open"])
async def test_a_worker_that_cannot_be_started_is_tried_again(modules, tmp_path, monkeypatch, what):
    """A machine that is out of memory or descriptors for a moment does not cost the place."""
    owner = subprocess if what == "Popen" else os
    real, failures = getattr(owner, what), [1, 2]

    def short_of(*args, **options):
        if failures:
            failures.pop()
            raise OSError(24, "Too many open files")
        return real(*args, **options)

    monkeypatch.setattr(owner, what, short_of)
    supervisor = make(tmp_path, "sleeper")
    supervisor.start()
    pid = int((await until(lambda: ups(supervisor)))[-1][0])
    assert supervisor.workers[0].process.pid == pid, "a process that is not watched does not stay"
    assert supervisor.workers[0].num_restarts == 2
    await supervisor.stop()
    assert not alive(pid)


async def test_status_2_of_a_place_that_has_lived_ends_no_other(modules, tmp_path, monkeypatch):
    monkeypatch.setattr("coordinator.cluster.local_workers._STABLE_S", 0.2)
    supervisor = make(tmp_path, "sleeper")
    supervisor.start()
    pid = int((await until(lambda: ups(supervisor)))[0][0])
    await asyncio.sleep(0.3)
    sleeper = (modules / "sleeper_worker.py").read_text()
    (modules / "sleeper_worker.py").write_text(BAD)  # as if its model were gone
    os.kill(pid, signal.SIGKILL)
    await until(lambda: supervisor.workers[0].num_restarts >= 2)
    assert not supervisor.fatal.done()
    (modules / "sleeper_worker.py").write_text(sleeper)
    await until(lambda: len(ups(supervisor)) == 2)
    await supervisor.stop()


def test_what_a_worker_does_is_what_it_logged_last(tmp_path):
    worker = LocalWorker("d0", Role.DECODE, tmp_path / "d0.log")
    assert doing(worker) == ""
    worker.log_path.write_text("plain\n" * 2000 + '{"event": "warm-up begins", "step": "decode"}\n')
    assert doing(worker) == "warm-up begins: decode"
    with worker.log_path.open("a") as log:
        log.write('{"event": "engine built"}\nnvcc: a line of a compiler\n[1, 2]\n{"no": 1}')
    assert doing(worker) == "engine built"
    worker.num_restarts, worker.last_end = 4, "status 72: decode: the self-test failed"
    assert doing(worker) == "restart 4 after status 72: decode: the self-test failed"


async def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(ConfigError, match="--log-dir"):
        make(tmp_path, "sleeper").start()


def test_kill_9_of_the_supervisor_takes_its_workers(modules, tmp_path):
    script = textwrap.dedent(
        """
        import asyncio, sys
        from pathlib import Path
        from coordinator.cluster.local_workers import Supervisor
        from engine.base.types import Role

        async def main():
            places = [("w0", Role.PREFILL), ("w1", Role.DECODE)]
            s = Supervisor(places, Path(sys.argv[1]), lambda i, r: ["sleeper_worker", i])
            s.start()
            await asyncio.sleep(60)

        asyncio.run(main())
        """
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    try:
        deadline = time.monotonic() + 20
        pids = []
        while len(pids) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
            logs = [p.read_text().split() for p in tmp_path.glob("*.log")]
            pids = [int(words[1]) for words in logs if len(words) > 2]
        assert all(alive(p) for p in pids)
    finally:
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 5
    while any(alive(p) for p in pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_orphan_ends_before_it_begins(modules):
    command = [
        sys.executable,
        "-m",
        "engine.process.parent_death",
        "--parent",
        "1",
        "sleeper_worker",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stdout) == (1, "")


def test_ucx_of_workers_that_are_alone_stays_on_the_machine():
    assert "--env=UCX_NET_DEVICES=lo" in process_options(Role.DECODE, 2, 2, alone=True)
    assert "UCX_NET_DEVICES" not in "".join(process_options(Role.DECODE, 2, 2))


def test_environment_shares_the_cores():
    assert "--env=OMP_NUM_THREADS=4" in process_options(Role.DECODE, 16, 4)
    assert "--env=OMP_NUM_THREADS=1" in process_options(Role.PREFILL, 2, 4)
