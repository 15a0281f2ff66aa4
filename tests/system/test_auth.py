"""The cluster token between real processes: without it a process gets nothing.

One cluster of an external coordinator, a prefill and a decode worker, as on several machines, whose
files name the same two secrets in different orders, as in the middle of a change; and the stack
that makes its token itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from coordinator.client import Client
from engine.base.errors import DiptychError
from engine.pb.diptych.internal.v1 import registry_pb2, registry_pb2_grpc, worker_pb2
from engine.pb.diptych.internal.v1 import worker_pb2_grpc as stubs
from engine.pb.diptych.v1 import admin_pb2, admin_pb2_grpc
from engine.rpc.auth import ClusterToken
from engine.rpc.channel import open_channel
from tests.support.cluster import Cluster, Shape
from tests.support.commands import Commands
from tests.support.http_get import http_get
from tests.support.stack import DEFAULT, Stack, until
from tests.support.stderr import sentences
from tests.support.timeouts import LEASE_TTL_S

pytestmark = pytest.mark.timeout(300)

FIRST, SECOND, WRONG = (f"{name}-{secrets.token_hex(16)}" for name in ("one", "two", "wrong"))
PROMPT = "Saxifrage 4711 grows where the quiet heron nests; " * 12
SALT = "salt-of-the-tenant-4711"
BLOCK_SIZE = 16
FRONT = "coordinator-0"
CODES = {None: grpc.StatusCode.UNAUTHENTICATED, WRONG: grpc.StatusCode.PERMISSION_DENIED}


def _command(name: str) -> tuple[str, ...]:
    return ("coordinator.cli",) if name == "coordinator" else ("worker.cli", name)


def token_file(folder: Path, name: str, *lines: str) -> str:
    path = folder / f"{name}.token"
    path.write_text("\n".join(lines))
    path.chmod(0o600)
    return str(path)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    flags = ("--log-level", "debug", "--cluster-token-file")
    shape = Shape(
        prefill=1,
        decode=1,
        coordinators=1,
        coordinator_flags=(*flags, token_file(folder, "front", FIRST, SECOND)),
        worker_flags=(*flags, token_file(folder, "workers", SECOND, FIRST)),
    )
    with Cluster(folder, shape) as running:
        yield running


def token(secret: str | None) -> ClusterToken | None:
    return None if secret is None else ClusterToken((secret,))


def hello() -> registry_pb2.WorkerMessage:
    fields = registry_pb2.Hello(
        worker_id="intruder", incarnation="i", role=registry_pb2.ROLE_DECODE, address="127.0.0.1:1"
    )
    return registry_pb2.WorkerMessage(hello=fields)


def registering(channel: grpc.aio.Channel) -> Any:
    async def say() -> AsyncIterator[registry_pb2.WorkerMessage]:
        yield hello()
        await asyncio.sleep(10)  # like a worker that stays

    return registry_pb2_grpc.RegistryServiceStub(channel).Register(say(), timeout=10)


def draining(channel: grpc.aio.Channel) -> Any:
    request = admin_pb2.DrainWorkerRequest(worker_id="unknown")
    return admin_pb2_grpc.AdminServiceStub(channel).DrainWorker(request, timeout=10)


def handshaking(channel: grpc.aio.Channel, digest: str = "") -> Any:
    request = worker_pb2.HandshakeRequest(digest=digest, caller_incarnation="tester")
    return stubs.KvServiceStub(channel).Handshake(request, timeout=10)


def holding(channel: grpc.aio.Channel, *hashes: bytes) -> Any:
    request = worker_pb2.HoldRequest(caller_incarnation="tester", hashes=hashes)
    return stubs.KvServiceStub(channel).Hold(request, timeout=10)


def renewing(channel: grpc.aio.Channel, *leases: bytes, owner: str = "tester") -> Any:
    request = worker_pb2.RenewRequest(caller_incarnation=owner, leases=leases)
    return stubs.KvServiceStub(channel).Renew(request, timeout=10)


def releasing(channel: grpc.aio.Channel, *leases: bytes, owner: str = "tester") -> Any:
    request = worker_pb2.ReleaseRequest(caller_incarnation=owner, leases=leases)
    return stubs.KvServiceStub(channel).Release(request, timeout=10)


def prefilling(channel: grpc.aio.Channel) -> Any:
    request = worker_pb2.PrefillRequest(
        request_id="raw", caller_incarnation="tester", token_ids=range(100, 100 + 4 * BLOCK_SIZE)
    )
    return stubs.PrefillServiceStub(channel).Prefill(request, timeout=60)


def decoding(channel: grpc.aio.Channel) -> Any:
    request = worker_pb2.DecodeRequest(
        request_id="raw",
        prompt_token_ids=range(100, 120),
        stop=worker_pb2.StopParams(max_tokens=4),
        sampling=worker_pb2.SamplingParams(top_p=1.0, repetition_penalty=1.0),
    )
    return stubs.DecodeServiceStub(channel).Decode(request, timeout=60)


async def messages(call: Any) -> list[Any]:
    """The messages of a call of any kind. Raises AioRpcError."""
    if isinstance(call, grpc.aio.UnaryUnaryCall):
        return [await call]
    return [message async for message in call]


GUARDED: list[tuple[str, Callable[..., Any]]] = [
    (FRONT, registering),
    (FRONT, draining),
    *((role, ask) for role in ("prefill-0", "decode-0") for ask in (handshaking, holding)),
    *((role, ask) for role in ("prefill-0", "decode-0") for ask in (renewing, releasing)),
    ("prefill-0", prefilling),
    ("decode-0", decoding),
]


def counted(http_address: str, series: str, **labels: str) -> float:
    """One sample of /metrics; 0 if it is missing."""
    text = http_get(f"http://{http_address}/metrics").text
    for line in text.splitlines():
        named = line.startswith(f"{series}{{")
        if named and all(f'{key}="{value}"' in line for key, value in labels.items()):
            return float(line.rpartition(" ")[2])
    return 0.0


@pytest.mark.parametrize("sent", [None, WRONG], ids=["none", "wrong"])
@pytest.mark.parametrize(("place", "ask"), GUARDED, ids=lambda x: getattr(x, "__name__", x))
async def test_without_the_token_nothing_is_said(
    cluster: Cluster, place: str, ask: Callable[..., Any], sent: str | None
) -> None:
    """No message is sent before the refusal."""
    async with open_channel(cluster.address(place), token=token(sent)) as channel:
        call = ask(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await messages(call)
        assert caught.value.code() is CODES[sent]
        assert "digest" not in (caught.value.details() or "")
    assert "intruder" not in cluster.rows()


async def test_refusals_are_counted_and_logged_with_the_callers_address(cluster: Cluster) -> None:
    worker = cluster.rows()["prefill-0"]
    labels = {"method": "KvService/Handshake", "code": "permission_denied"}
    before = counted(worker.http_address, "diptych_rpc_failures_total", **labels)
    async with open_channel(worker.address, token=token(WRONG)) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await handshaking(channel)
    after = counted(worker.http_address, "diptych_rpc_failures_total", **labels)
    assert after == before + 1
    log = cluster.log_text("prefill-0")
    lines = [line for line in log.splitlines() if "caller refused" in line]
    assert any("KvService/Handshake" in x and "ipv4:127.0.0.1:" in x for x in lines)


@pytest.mark.parametrize("secret", [FIRST, SECOND], ids=["first", "second"])
async def test_with_a_token_of_the_file_workers_talk(cluster: Cluster, secret: str) -> None:
    places = {place: cluster.address(place) for place, _ in GUARDED}
    async with contextlib.AsyncExitStack() as stack:
        channel = {
            place: await stack.enter_async_context(open_channel(address, token=token(secret)))
            for place, address in places.items()
        }
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await handshaking(channel["prefill-0"], "another digest")
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        digest = (caught.value.details() or "").split()[2].rstrip(",")
        answer = await handshaking(channel["prefill-0"], digest)
        assert answer.agents[0].metadata and answer.num_blocks
        assert (await holding(channel["decode-0"], b"nothing")).lease == b""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await messages(registering(channel[FRONT]))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, "its hello names no model"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await draining(channel[FRONT])
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND, "there is no such worker"
        said = await messages(decoding(channel["decode-0"]))
        assert sum(len(m.tokens.token_ids) for m in said) == 4


def test_an_answer_goes_through_all_three(cluster: Cluster) -> None:
    """The coordinator sends the first secret, the workers the second; all accept both."""
    with Client(cluster.address(FRONT)) as client:
        events = list(client.generate(PROMPT, max_tokens=8, cache_salt=SALT, timeout_s=120))
    assert events[-1].usage.completion_tokens == 8  # type: ignore[union-attr]
    worker = cluster.rows()["decode-0"]
    assert counted(worker.http_address, "diptych_kv_transfer_blocks_total") > 0


# --- leases


@contextlib.asynccontextmanager
async def leased(cluster: Cluster) -> AsyncIterator[tuple[grpc.aio.Channel, bytes, list[bytes]]]:
    """A lease of "tester" on four blocks of the prefill worker, and nothing else held there."""
    until(lambda: held(cluster) == 0, 20, "nothing is held")
    worker = cluster.rows()["prefill-0"]
    async with open_channel(worker.address, token=token(FIRST)) as channel:
        call = prefilling(channel)
        names: list[bytes] = []
        async for message in call:
            names += message.ready.hashes
            if len(names) == 4:
                break
        lease = (await holding(channel, *names)).lease
        call.cancel()  # its leases end with it
        assert len(lease) == 16
        yield channel, lease, names
        await releasing(channel, lease)
    until(lambda: held(cluster) == 0, 20, "nothing is held any more")


def held(cluster: Cluster) -> int:
    """Blocks that the prefill worker holds now."""
    return int(counted(cluster.http("prefill-0"), "diptych_kv_blocks", state="held"))


async def still_held(cluster: Cluster) -> int:
    """The same a while later, when what should free none would have."""
    await asyncio.sleep(0.5)
    return held(cluster)


def refused(cluster: Cluster, reason: str) -> float:
    return counted(cluster.http("prefill-0"), "diptych_kv_lease_refusals_total", reason=reason)


async def test_forged_and_foreign_leases_free_nothing(cluster: Cluster) -> None:
    async with leased(cluster) as (channel, lease, _):
        forged = [secrets.token_bytes(16), bytes([lease[0] ^ 1]) + lease[1:], lease[:-1], b""]
        before = {reason: refused(cluster, reason) for reason in ("unknown", "foreign")}
        await releasing(channel, *forged)
        await releasing(channel, lease, owner="thief")
        assert list((await renewing(channel, *forged)).unknown) == forged
        assert list((await renewing(channel, lease, owner="thief")).unknown) == [lease]
        assert not (await renewing(channel, lease)).unknown, "it is its owner's still"
        assert await still_held(cluster) == 4
        assert refused(cluster, "unknown") == before["unknown"] + 2 * len(forged)
        assert refused(cluster, "foreign") == before["foreign"] + 2
        log = cluster.log_text("prefill-0")
        assert "'thief'" in log and lease.hex() not in log


async def test_a_replayed_release_frees_nothing_of_the_next_lease(cluster: Cluster) -> None:
    async with leased(cluster) as (channel, lease, names):
        other = (await holding(channel, *names)).lease
        for _ in range(4):
            await releasing(channel, lease)
        assert list((await renewing(channel, lease, other)).unknown) == [lease]
        assert await still_held(cluster) == 4, "the other lease holds the same blocks"
        await releasing(channel, other)


async def test_a_lease_cannot_be_renewed_under_another_incarnation(cluster: Cluster) -> None:
    async with leased(cluster) as (channel, lease, _):
        ends_at = asyncio.get_running_loop().time() + LEASE_TTL_S + 1.5
        while asyncio.get_running_loop().time() < ends_at:
            assert list((await renewing(channel, lease, owner="thief")).unknown) == [lease]
            await asyncio.sleep(0.2)
        assert await still_held(cluster) == 0, "it ran out"
        assert list((await renewing(channel, lease)).unknown) == [lease]


# --- refusals at the start

REFUSED = [(role, sent) for role in ("prefill", "decode") for sent in (None, WRONG)]
WITHOUT_TOKEN = [
    ("coordinator", ("--workers", "external", "--listen", "0.0.0.0:0"), "--listen 0.0.0.0:0"),
    ("prefill", ("--listen", "0.0.0.0:0", "--advertise", "x"), "--listen 0.0.0.0:0"),
    ("decode", ("--listen", "[::]:0", "--advertise", "x"), "--listen [::]:0"),
    ("decode", ("--cluster-token-file", "/nowhere/token"), "/nowhere/token: No such file"),
]


@pytest.fixture(scope="module")
def ends(cluster: Cluster) -> Iterator[Commands]:
    """Processes without the right token, all at once."""
    with Commands() as commands:
        for role, sent in REFUSED:
            flags = (*DEFAULT, "--kv-cache-memory", "128MiB", "--worker-id", "intruder")
            flags += ("--coordinator", cluster.address(FRONT), "--log-format", "json")
            if sent is not None:
                flags += ("--cluster-token-file", token_file(cluster.folder, "wrong", sent))
            commands.start((role, sent), *_command(role), "start", *flags)
        for command, flags, _ in WITHOUT_TOKEN:
            words = (*_command(command), "start", *flags, "--http", "127.0.0.1:0")
            commands.start((command, flags), *words)
        yield commands


@pytest.mark.parametrize(
    ("role", "sent"), REFUSED, ids=lambda x: {None: "none", WRONG: "wrong"}.get(x, x)
)
def test_a_worker_with_another_token_ends_with_2(
    cluster: Cluster, ends: Commands, role: str, sent: str | None
) -> None:
    done = ends.result((role, sent))
    assert done.returncode == 2, done.stderr
    (sentence,) = sentences(done.stderr)
    assert sentence.startswith(f"{role}: refused by coordinator {cluster.address(FRONT)}: ")
    assert "--cluster-token-file" in sentence
    assert WRONG not in done.stderr and "intruder" not in cluster.rows()


@pytest.mark.parametrize(("command", "flags", "words"), WITHOUT_TOKEN)
def test_what_other_machines_reach_does_not_start_without_a_token(
    ends: Commands, command: str, flags: tuple[str, ...], words: str
) -> None:
    done = ends.result((command, flags))
    assert done.returncode == 2, done.stderr
    (sentence,) = sentences(done.stderr)
    assert words in sentence and "--cluster-token-file" in sentence


# --- logs and command lines


def everywhere(entry: str) -> dict[int, bytes]:
    """/proc/PID/`entry` of all processes but this one."""
    found = {}
    for place in Path("/proc").iterdir():
        if place.name.isdigit() and int(place.name) != os.getpid():
            with contextlib.suppress(OSError):
                found[int(place.name)] = (place / entry).read_bytes()
    return found


def test_the_secret_is_in_no_command_line_variable_or_log(cluster: Cluster) -> None:
    processes = {place.pid for place in cluster.places}
    for entry in ("cmdline", "environ"):
        found = everywhere(entry)
        assert processes <= found.keys()
        for secret in (FIRST, SECOND):
            assert not [pid for pid, text in found.items() if secret.encode() in text]
    logs = logs_of(cluster)
    assert "caller refused" in logs, "the tests above were here"
    assert not [s for s in (FIRST, SECOND, WRONG) if s in logs]


def logs_of(cluster: Cluster) -> str:
    return "".join(cluster.log_text(place.name) for place in cluster.places)


def test_logs_hold_no_prompt_answer_or_salt(cluster: Cluster) -> None:
    with Client(cluster.address(FRONT)) as client:
        events = list(client.generate(PROMPT, max_tokens=32, cache_salt=SALT, timeout_s=120))
        text = "".join(getattr(event, "text", "") for event in events)
        ids = [i for event in events for i in getattr(event, "token_ids", ())]
        with pytest.raises(DiptychError):  # a refusal is logged, too
            list(client.generate(PROMPT, max_tokens=0, timeout_s=20))
    logs = logs_of(cluster)
    assert "decode ended" in logs and "prefill ended" in logs
    assert len(text) > 20 and len(ids) == 32
    for secret in ("Saxifrage", "quiet heron", text[:20], SALT, ", ".join(map(str, ids[:4]))):
        assert secret not in logs, secret


# --- a stack that generates its token


def test_local_workers_are_authenticated_by_default(tmp_path: Path) -> None:
    with Stack(tmp_path, *DEFAULT, "--log-level", "debug") as stack:
        flags = {
            word
            for pid in stack.pids()
            for word in Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            if "cluster-token-file" in word
        }
        (flag,) = flags
        path = flag.partition("=")[2]
        assert path.startswith(f"/proc/{stack.process.pid}/fd/")
        secret = Path(path).read_text()
        assert os.stat(path).st_mode & 0o777 == 0o600
        if os.getuid() == 0:
            command = ["cat", path]
            other = subprocess.run(command, capture_output=True, check=False, user=65534)
            assert other.returncode != 0 and not other.stdout
        for entry in ("cmdline", "environ"):
            assert not [p for p, text in everywhere(entry).items() if secret.encode() in text]
        asyncio.run(local_services(stack, secret))
        listening = [where for pid in stack.pids() for where in listeners(pid)]
        assert len(listening) >= 8, "gRPC and HTTP of three, UCX of two"
        assert {host for host, _ in listening} == {"127.0.0.1"}, "UCX checks no token"
        os.kill(stack.pid_of("prefill-0"), signal.SIGKILL)
        until(lambda: not stack.ready(), 10, "the prefill worker is missed")
        until(stack.ready, 60, "the prefill worker is back")
        _, _, done = stack.generate(PROMPT, max_tokens=8)
        assert done.usage.completion_tokens == 8
        assert stack.metrics("decode")["diptych_kv_transfer_blocks_total"] > 0
        stack.assert_at_rest()
        assert secret not in "".join(stack.logs().values())


def listeners(pid: int) -> list[tuple[str, int]]:
    """Addresses on which a process listens for TCP connections."""
    sockets = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            sockets.add(os.readlink(entry))
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in sockets:
                host, _, port = words[1].partition(":")
                raw = bytes.fromhex(host)
                if len(raw) == 4 or host.startswith("0000000000000000FFFF0000"):  # mapped
                    host = ".".join(str(byte) for byte in raw[-4:][::-1])
                found.append((host, int(port, 16)))
    return found


async def local_services(stack: Stack, secret: str) -> None:
    """Workers and the coordinator's internal port check the token; others do not."""
    places = {worker.worker_id: worker.address for worker in stack.workers()}
    places[FRONT] = stack.address
    for place, ask in GUARDED:
        for sent, code in ((None, CODES[None]), (WRONG, CODES[WRONG])):
            async with open_channel(places[place], token=token(sent)) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await messages(ask(channel))
                assert caught.value.code() is code, (place, ask)
    async with open_channel(places["decode-0"], token=token(secret)) as channel:
        assert (await holding(channel, b"nothing")).lease == b""
    async with open_channel(stack.address, token=token(secret)) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await draining(channel)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
