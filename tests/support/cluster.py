"""A whole Diptych of real processes for the fault suite: coordinators, prefill and decode workers.

    Cluster -> Places (processes that come back) on Network (a network that can be cut)

Workers keep their ids, ports and log files over restarts. Answers are exact: on a CPU with our
kernels bit for bit, elsewhere in float32.
"""

from __future__ import annotations

import json
import random
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from coordinator.client import Client
from engine.base.errors import DiptychError
from engine.kernels import kernels
from engine.pb.diptych.v1 import admin_pb2
from tests.support.network import Loopback, Network
from tests.support.process_slots import Keeper, ProcessSlot
from tests.support.timeouts import CLUSTER, Timeouts

NATIVE = kernels() is not None
BLOCK_BYTES = 30 * 2 * 3 * 16 * 64 * (2 if NATIVE else 4)  # of the default model
NUM_BLOCKS = 108  # one longest request takes 65, two long cases begin and do not end in it
MAX_MODEL_LEN = 1024
SPARE = "coordinator-spare"


@dataclass(frozen=True, slots=True)
class Shape:
    """How many of each, and with which further flags."""

    prefill: int = 2
    decode: int = 2
    coordinators: int = 2
    fault_injection: bool = (
        False  # workers whose reads and messages a test may break: see `fault_injection`
    )
    worker_flags: tuple[str, ...] = ()
    coordinator_flags: tuple[str, ...] = ()
    spare_flags: tuple[
        str, ...
    ] = ()  # of one more coordinator, which a scenario may start: `SPARE`
    env: Mapping[str, str] | None = None  # of workers
    timeouts: Timeouts = CLUSTER


class Cluster:
    """A context manager; inside, every worker has registered at every coordinator."""

    def __init__(
        self, folder: Path, shape: Shape | None = None, network: Network | None = None
    ) -> None:
        self.folder = folder
        self.trusted_at = (
            0.0  # when coordinators have forgotten the last scenario's failures, monotonic
        )
        self.shape = shape = shape or Shape()
        self.network = network or Loopback()
        self._keeper = Keeper(self.network.started)
        self._ports: dict[str, tuple[int, int]] = {}
        self._places: dict[str, ProcessSlot] = {}
        self.token_file = folder / "cluster.token"
        self.token_file.write_text(secrets.token_hex(32))
        self.token_file.chmod(0o600)
        self.coordinators = [f"coordinator-{i}" for i in range(shape.coordinators)]
        self.prefill = [f"prefill-{i}" for i in range(shape.prefill)]
        self.decode = [f"decode-{i}" for i in range(shape.decode)]
        self.workers = [*self.prefill, *self.decode]
        for name in self.coordinators:
            self.add_coordinator(name, *shape.coordinator_flags)
        if shape.spare_flags:
            self.add_coordinator(SPARE, *shape.spare_flags)
        for name in self.workers:
            self.add_worker(name)

    def __enter__(self) -> Self:
        try:
            for name in (*self.coordinators, *self.workers):
                self[name].held = False
            self.until_whole(self.shape.timeouts.start_s)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._keeper.close()
        finally:
            self.network.close()

    # -- places ------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> ProcessSlot:
        return self._places[name]

    @property
    def places(self) -> list[ProcessSlot]:
        """All there are."""
        return list(self._places.values())

    def add_coordinator(self, name: str, *flags: str) -> ProcessSlot:
        """One more place, held; workers dial only those that were there before them."""
        place = self._join(name, "coordinator.cli")
        place.args = [
            *("start", "--workers", "external", "--model", "smollm2"),
            *("--max-model-len", str(MAX_MODEL_LEN), *self.shape.timeouts.coordinator_flags),
            *self._doors(name),
            *flags,
        ]
        return place

    def add_worker(
        self, name: str, *flags: str, role: str = "", env: Mapping[str, str] | None = None
    ) -> ProcessSlot:
        """One more place, held; `role` where the name does not begin with it."""
        role = role or name.partition("-")[0]
        faults = self.shape.fault_injection
        place = self._join(name, "tests.faults.fault_injection" if faults else "worker.cli")
        orders = ["--orders", str(self.orders(name))] if faults else []
        port = self._ports[name][0]
        place.args = [
            *orders,
            *(role, "start", "--model", "smollm2", "--worker-id", name, *exact()),
            *("--max-model-len", str(MAX_MODEL_LEN), "--num-threads", "1"),
            *("--kv-cache-memory", str(NUM_BLOCKS * BLOCK_BYTES)),
            *self.shape.timeouts.worker_flags,
            *("--coordinator", ",".join(self.address(c) for c in self._all_coordinators())),
            *("--advertise", self.network.reach(name, port)),
            *self._doors(name),
            *self.shape.worker_flags,
            *flags,
        ]
        place.env = {**(self.shape.env or {}), **(env or {})}
        return place

    def orders(self, name: str) -> Path:
        """Where a lab worker looks for what to break."""
        return self.folder / f"{name}.orders"

    def address(self, name: str) -> str:
        """HOST:PORT of a process's gRPC, as others reach it."""
        port = self._ports[name][0]
        return f"{self.network.reach(name, port)}:{port}"

    @property
    def token(self) -> tuple[tuple[str, str], ...]:
        """Metadata of a call by a member of the cluster."""
        return (("authorization", f"Bearer {self.token_file.read_text()}"),)

    def forget(self, name: str) -> None:
        """Take a place that was added, and has ended, out again."""
        self._keeper.remove(self._places.pop(name))

    def http(self, name: str) -> str:
        """HOST:PORT of its HTTP, from the tests."""
        return f"{self.network.host(name)}:{self._ports[name][1]}"

    def _join(self, name: str, module: str) -> ProcessSlot:
        self.network.join(name)
        self._ports[name] = (fixed_port(), fixed_port())
        place = ProcessSlot(
            name, module, [], self.folder / f"{name}.log", prefix=self.network.prefix(name)
        )
        self._places[name] = place
        self._keeper.add(place)
        return place

    def _doors(self, name: str) -> list[str]:
        host, (port, http_port) = self.network.host(name), self._ports[name]
        doors = ["--listen", f"{host}:{port}", "--http", f"{host}:{http_port}"]
        return [*doors, "--cluster-token-file", str(self.token_file), "--log-format", "json"]

    def _all_coordinators(self) -> list[str]:
        return [name for name in self._places if name.startswith("coordinator-")]

    # -- its state ------------------------------------------------------------------------

    def rows(self, coordinator: str = "coordinator-0") -> dict[str, admin_pb2.Worker]:
        """ListWorkers by worker id; nothing while the coordinator does not answer."""
        with Client(self.address(coordinator)) as client:
            try:
                return {row.worker_id: row for row in client.workers(timeout_s=3)}
            except (DiptychError, grpc.RpcError):
                return {}

    def whole(self) -> bool:
        """Whether every coordinator knows the process that is in each worker's place now."""
        for place in self.places:
            if not place.held and not place.alive:
                return False
        wanted = [name for name in self.workers if not self[name].held]
        for coordinator in self._all_coordinators():
            if self[coordinator].held:
                continue
            rows = self.rows(coordinator)
            for name in wanted:
                row, age_s = rows.get(name), time.monotonic() - self[name].started_s
                if row is None or row.state != "ready" or row.uptime_s > age_s:
                    return False
        return True

    def until_whole(self, timeout_s: float = 60.0) -> None:
        """Wait for that; a worker that cannot use its options ends the wait at once."""
        deadline = time.monotonic() + timeout_s
        while not self.whole():
            for place in self.places:
                bad = [end.status for end in place.ends if end.status in (1, 2)]
                assert not bad, f"{place.name} cannot start:\n{self.tail(place.name)}"
            assert time.monotonic() < deadline, self._missing()
            time.sleep(0.1)

    def tail(self, name: str, num_lines: int = 40) -> str:
        """The end of a log."""
        return "\n".join(self.log_text(name).splitlines()[-num_lines:])

    def log_text(self, name: str, since: int = 0) -> str:
        """A log from a byte offset on; "" before its process has started."""
        if not self[name].log.exists():
            return ""
        with self[name].log.open("rb") as log:
            log.seek(since)
            return log.read().decode(errors="replace")

    def log_lines(self, name: str, since: int = 0) -> list[dict[str, Any]]:
        """The JSON lines of the same."""
        lines = self.log_text(name, since).splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def _missing(self) -> str:
        seen = {c: {n: r.state for n, r in self.rows(c).items()} for c in self._all_coordinators()}
        dead = [place.name for place in self.places if not place.held and not place.alive]
        tails = "\n".join(f"-- {name}\n{self.tail(name, 15)}" for name in dead)
        return f"not whole: coordinators see {seen}, not running: {dead}\n{tails}"


def exact() -> tuple[str, ...]:
    """Flags under which an answer is one and the same."""
    return () if NATIVE else ("--dtype", "float32")


def fixed_port() -> int:
    """A free port below those that the kernel gives to clients: also free after a restart."""
    rng = random.SystemRandom()
    for _ in range(200):
        port = rng.randrange(20000, 32000)
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port between 20000 and 32000")
