"""Lanes from UCX's own tables, speeds from pulls, and where an operator sees both."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from rich.console import Console

from coordinator.api.grpc.admin import _row
from coordinator.cluster.registry_service import _load
from coordinator.commands.status import links_table
from engine.base.types import KVLink, KVPool, Peer, Role, machine_id
from engine.pb.diptych.internal.v1 import registry_pb2
from engine.rpc.convert import to_pb
from engine.telemetry.metrics import WorkerMetrics
from kvtransfer.links import LinkMeter
from kvtransfer.nixl_transport import DEFAULT_ENV
from kvtransfer.peers import PeerTable
from kvtransfer.transport import Agent, MemoryRegion, Region, RemotePool
from kvtransfer.ucx_lanes import LaneTables
from tests.support.fake_decode import identity
from tests.support.gated import Rig

MIB = 1 << 20


def table(where: str, operation: str, *rows: str) -> str:
    """As UCX 1.20 logs one."""
    lines = ["+---", f"| 39017aa8b17d4e48.1 {where} cfg#1   |", f"| {operation}  |", "+---"]
    lines += ["| Range  | Description |  Config  |", "+---", *rows, "+---"]
    return "".join(f"[1796026804.978666] [vm:14325:0]   {line}\n" for line in lines)


READ = "remote memory read by ucp_get*(multi) into {} memory from {}"
HOST = READ.format("host", "host")
GPU = READ.format("cuda/GPU0", "cuda")
CMA = table("intra-node", HOST, "| 0..inf | zero-copy   | cma/memory |")
IPC = table(
    "intra-node",
    GPU,
    "|  0      | no data fetch |         |",
    "| 1..inf  | zero-copy     | cuda_ipc/cuda   |",
)
TCP = table("inter-node", GPU, "| 0..inf | software emulation | tcp/eth0 |")
WRITE = table("intra-node", "remote memory write by ucp_put* from host", "| 0..inf | x | no |")


def fed(*texts: str) -> LaneTables:
    tables = LaneTables()
    for text in texts:
        assert all(tables.feed(line) for line in text.splitlines(keepends=True))
    return tables


def test_lanes_by_memory_and_by_machine() -> None:
    tables = fed(CMA, IPC, TCP, WRITE, CMA.replace("intra-node", "self").replace("cma", "self"))
    assert tables.lane("DRAM", same_machine=True) == "cma/memory"
    assert tables.lane("DRAM", same_machine=False) == "cma/memory", "the only one there is"
    assert tables.lane("VRAM", same_machine=True) == "cuda_ipc/cuda"
    assert tables.lane("VRAM", same_machine=False) == "tcp/eth0, emulated"
    assert fed().lane("DRAM", same_machine=True) == fed(WRITE).lane("VRAM", same_machine=True) == ""
    rails = "| 0..inf | zero-copy | 50% on rc_mlx5/mlx5_0:1/path0 and 50% on rc_mlx5/mlx5_1:1 |"
    found = fed(table("inter-node", GPU, rails)).lane("VRAM", same_machine=False)
    assert found.startswith("50% on rc_mlx5/mlx5_0:1/path0")


def test_what_is_no_table_is_passed_on() -> None:
    line = "[1796026804.97] [vm:14325:0]  tcp_ep.c:12  UCX  ERROR tcp_ep: connection reset\n"
    assert not fed(CMA).feed(line)


def pool(name: str = "i1", kind: str = "VRAM", machine: str = "here") -> RemotePool:
    region = MemoryRegion(0, 1 << 30, kind)  # type: ignore[arg-type]
    regions = (Region("blocks", 0, name, 8, region), Region("generations", 0, name, 8, region))
    return RemotePool(name, 8, regions, (Agent(name, b""),), machine)


def meter() -> LinkMeter:
    return LinkMeter("here", lambda peer, here: f"{peer.memory_kind} {'near' if here else 'far'}")


def test_pulls_that_overlap_share_their_time() -> None:
    links = meter()
    links.note(pool(), 1000, seconds=1.0, ended_s=10.0)
    links.note(pool(), 1000, seconds=1.9, ended_s=11.0)  # begun beside the first
    found = links.links()["i1"]
    assert found.bytes_per_s == pytest.approx(1000)
    assert (found.num_bytes, found.lane, found.memory) == (2000, "VRAM near", "VRAM")
    links.note(pool("i2", "DRAM", "there"), 5, 0.0, 12.0)
    assert links.links()["i2"].lane == "DRAM far"


def test_the_speed_follows_what_pulls_show_lately() -> None:
    links = meter()
    for i in range(100):
        links.note(pool(), 1000, 1.0, ended_s=10.0 * i)
    for i in range(100, 140):
        links.note(pool(), 9000, 1.0, ended_s=10.0 * i)
    assert links.links()["i1"].bytes_per_s == pytest.approx(9000, rel=0.05)
    for i in range(200):
        links.note(pool(f"p{i}"), 1, 1.0, 1.0)
    assert len(links.links()) == 64


@pytest.mark.parametrize(
    ("kind", "num_bytes", "rate", "warns"),
    [
        ("VRAM", 64 * MIB, 0.5e9, 1),
        ("VRAM", 64 * MIB, 49e9, 0),
        ("VRAM", MIB // 4, 0.5e9, 0),  # latency
        ("DRAM", 64 * MIB, 0.5e9, 0),
    ],
)
def test_slow_reads_of_gpu_memory_are_logged_once(
    kind: str, num_bytes: int, rate: float, warns: int, caplog: pytest.LogCaptureFixture
) -> None:
    links = meter()
    with caplog.at_level(logging.WARNING):
        for i in range(5):
            links.note(pool(kind=kind), num_bytes, num_bytes / rate, ended_s=100.0 * i)
    assert len(caplog.records) == warns
    if warns:
        assert "0.5 GB/s over VRAM near" in caplog.text


def test_the_data_plane_measures_its_pulls() -> None:
    rig = Rig()
    try:
        peer = replace(rig.peer("p"), machine="elsewhere")
        for _ in range(3):
            rig.plane.pull(peer, [1, 2], [1, 2], rig.expected([1, 2]), 5).done.result(5)
        link = rig.plane.links()["p"]
        assert link.num_bytes == 3 * 2 * 64 and link.bytes_per_s > 0
        assert link.lane == "test/wire"
    finally:
        assert rig.plane.stop()


def test_a_peer_that_has_started_again_has_one_link() -> None:
    """Prometheus would refuse a second series of the same name, and the whole scrape."""
    links = meter()
    links.note(pool("old"), 1000, 1.0, 1.0)
    links.note(pool("new"), 3000, 1.0, 2.0)
    links.note(pool("other"), 10, 1.0, 3.0)
    table = PeerTable(links, digest="d", stub_factory=lambda address: None)  # type: ignore[arg-type,return-value]
    peers = (Peer("p0", "old", "a:1"), Peer("p1", "other", "a:3"), Peer("p0", "new", "a:2"))
    table._peers.update({peer.incarnation: (peer, pool(peer.incarnation)) for peer in peers})
    assert {link.worker_id: link.num_bytes for link in table.links()} == {"p0": 3000, "p1": 10}
    assert len(table.links()) == 2


LINK = KVLink("prefill-0", "tcp/eth0", 0.5e9, 64 * MIB, "VRAM")


def test_links_reach_status_and_metrics() -> None:
    load = _load(registry_pb2.Load(links=[to_pb(registry_pb2.KVLink, LINK)]))
    assert load.links == (LINK,)
    from coordinator.cluster.worker import Worker, WorkerState

    limit = KVPool(3 * MIB, "the cgroup's 2 GiB")
    peer = Peer("decode-0", "i", "a")
    row = _row(
        Worker(peer, Role.DECODE, "", identity(), WorkerState.READY, load, 1, 0, 0, kv_pool=limit),
        1.0,
    )
    assert (row.max_model_len, row.kv_pool_bytes, row.kv_pool_limit) == (
        8192,
        3 * MIB,
        "the cgroup's 2 GiB",
    )
    out = io.StringIO()
    Console(file=out, width=160).print(links_table([row]))
    for word in ("decode-0", "prefill-0", "GPU", "tcp/eth0", "64 MiB", "0.5 GB/s: slow"):
        assert word in out.getvalue()
    registry = CollectorRegistry()
    WorkerMetrics(registry, "m").watch_links(lambda: [LINK, replace(LINK, worker_id="p1", lane="")])
    text = generate_latest(registry).decode()
    name = "diptych_kv_transfer_bytes_per_second"
    assert f'{name}{{lane="tcp/eth0",memory="VRAM",model_name="m",peer="prefill-0"}} 5e+08' in text
    assert 'lane="unknown"' in text


def test_only_gpu_memory_is_called_slow() -> None:
    assert LINK.slow and not replace(LINK, memory="DRAM").slow
    assert not replace(LINK, bytes_per_s=5e9).slow


def test_a_machine_is_named_by_its_boot(tmp_path: Path) -> None:
    (tmp_path / "boot_id").write_text("one")
    assert machine_id(tmp_path / "boot_id") == machine_id(tmp_path / "boot_id") != machine_id()
    assert machine_id(tmp_path / "missing") == ""


def test_ucx_reads_between_gpus_without_nvlink_by_zero_copy() -> None:
    assert DEFAULT_ENV["UCX_CUDA_IPC_ENABLE_GET_ZCOPY"] == "on"


SETTINGS = """
import os
from kvtransfer.nixl_transport import NixlTransport, _load_bindings
_load_bindings()
for name in ("UCX_CUDA_IPC_ENABLE_GET_ZCOPY", "UCX_PROTO_INFO", "UCX_LOG_FILE"):
    print(os.environ.get(name))
NixlTransport("me").close()
print(os.environ.get("UCX_LOG_FILE"))
"""


def test_a_users_own_settings_of_ucx_go_first() -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("UCX_")}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)

    def settings(**changes: str) -> list[str]:
        command = [sys.executable, "-c", SETTINGS]
        done = subprocess.run(
            command, env={**env, **changes}, capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout.split()

    ours = settings()
    assert ours[:2] == ["on", "*get*"] and ours[2].startswith("/proc/self/fd/")
    assert ours[3] == "None", "UCX of a child process could not open it, and would end"
    theirs = {"UCX_CUDA_IPC_ENABLE_GET_ZCOPY": "off", "UCX_LOG_FILE": "/dev/null"}
    assert settings(**theirs) == ["off", "None", "/dev/null", "/dev/null"]
