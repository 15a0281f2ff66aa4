"""What a scenario on the public port works with: a real stack, and what must hold after each.

before noted -> unrelated requests begin -> the scenario -> they were right and in time
    -> at rest, no process ended, descriptors, threads and memory as before, no traceback
"""

from __future__ import annotations

import itertools
import json
import re
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from engine.pb.diptych.v1 import inference_pb2 as pb
from engine.rpc.channel import CHANNEL_OPTIONS
from tests.faults.checks import tracebacks
from tests.support.http2 import RawConnection, connect
from tests.support.http_get import http_get
from tests.support.stack import Stack, metrics_of, until
from tests.support.vitals import MIB, Bystander, Vitals, vitals

GENERATE = b"/diptych.v1.InferenceService/Generate"
PROMPT = list(range(1000, 1040))  # two whole blocks, which travel, and a tail
_NUM_TOKENS = 4
_FEW_BLOCKS = 8
SETTLE_S = 15.0
MAX_MODEL_LEN = 1600
_ids = itertools.count(1)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long the port waits for its clients, and answers (float32 is slow) that outlast it."""

    client_timeout_s: int
    sleeper_tokens: int
    stopped_tokens: int
    # Pools that hold all waiting requests at once and are filled before anything else: their memory
    # is taken with the first use of each block, and would look like a leak later.
    pool: str

    @property
    def flags(self) -> tuple[str, ...]:
        """Of `coordinator start`."""
        return (
            *("--dtype", "float32", "--kv-cache-memory", self.pool),
            *("--max-model-len", str(MAX_MODEL_LEN)),
            *("--client-timeout-s", str(self.client_timeout_s)),
        )

    @property
    def gone_s(self) -> float:
        """Until a client that lets the port wait is disconnected, on a shared machine."""
        return self.client_timeout_s + 20.0


FULL = RetryPolicy(30, sleeper_tokens=1200, stopped_tokens=1500, pool="192MiB")
SHORT = RetryPolicy(10, sleeper_tokens=300, stopped_tokens=350, pool="84MiB")


def request(
    max_tokens: int, *, request_id: str = "", salt: str | None = None
) -> pb.GenerateRequest:
    """An answer of exactly `max_tokens`, its prompt new to every cache."""
    return pb.GenerateRequest(
        request_id=request_id or f"row-{next(_ids)}",
        token_ids=pb.TokenIds(ids=PROMPT),
        stop=pb.Stop(max_tokens=max_tokens, ignore_eos=True),
        cache_salt=f"salt-{next(_ids)}" if salt is None else salt,
    )


class Port:
    """The public port of a stack."""

    def __init__(self, stack: Stack, patience: RetryPolicy) -> None:
        self.stack = stack
        self.patience = patience
        self.address = stack.address
        self.pids = {name: stack.pid_of(name) for name in ("prefill-0", "decode-0")}
        self.pids["coordinator"] = stack.process.pid
        self._http = {"coordinator": stack.http_address}
        self._http |= {w.worker_id: w.http_address for w in stack.workers()}
        self._fill_pools()
        self._right = self._ask()
        with Bystander(self._ask, self._right, 60.0) as alone:
            until(lambda: len(alone.seconds) >= 3, 60, "three answers")
        alone.check()
        self.typical_s = sorted(alone.seconds)[len(alone.seconds) // 2]
        # Others compute beside it, and the abuser takes one of two cores.
        self.limit_s = 5.0 + 10 * self.typical_s

    @contextmanager
    def scenario(
        self,
        *,
        growth_bytes: int = 64 * MIB,
        explained: Sequence[str] = (),
        num_told_to_ask_again: int = 0,
    ) -> Iterator[Bystander]:
        """Around the abuse. `explained`: patterns of tracebacks that it may leave in a log;
        `num_told_to_ask_again`: at most so many unrelated requests are refused for want of a worker
        """
        self.stack.assert_at_rest()
        before = {name: vitals(pid) for name, pid in self.pids.items()}
        read = {name: len(text) for name, text in self.stack.logs().items()}
        try:
            with Bystander(self._ask, self._right, self.limit_s) as bystander:
                yield bystander
            told = [c for c in bystander.complaints if c.startswith("Unavailable(")]
            for complaint in told[:num_told_to_ask_again]:
                bystander.complaints.remove(complaint)
            bystander.check()
            self._check(before, growth_bytes)
            for name, text in self.stack.logs().items():
                for found in tracebacks(text[read.get(name, 0) :]):
                    known = any(re.search(pattern, found) for pattern in explained)
                    assert known, f"{name} logged a traceback:\n{found}"
        except BaseException:
            self.stack.print_logs()
            raise

    def raw(self, *, polite: bool = True) -> RawConnection:
        """A connection that has not said a word."""
        return RawConnection(self.address, polite=polite)

    def channel(self, *options: tuple[str, Any]) -> grpc.Channel:
        """A channel of an ordinary client, which sends as much as it is asked to."""
        mine = [(k, v) for k, v in CHANNEL_OPTIONS if k != "grpc.max_send_message_length"]
        return grpc.insecure_channel(
            self.address, options=(*mine, ("grpc.max_send_message_length", -1), *options)
        )

    def answers(self) -> bool:
        """Whether a proper call on a new connection is answered."""
        with self.channel() as channel:
            call = channel.unary_unary(
                "/diptych.v1.InferenceService/GetModel",
                response_deserializer=pb.Model.FromString,
            )
            try:
                return bool(call(b"", timeout=10).ready)
            except grpc.RpcError:
                return False

    def health(self) -> bytes:
        """The answer of /health to a proper request on a new connection."""
        with connect(self.stack.http_address) as sock:
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            return sock.recv(65536)

    def held_for(self, name: str, *request_ids: str) -> bool:
        """Whether a process holds something for one of these requests."""
        response = http_get(f"http://{self._http[name]}/debug/holds", headers=self.stack.operator)
        response.raise_for_status()
        held = json.dumps(response.json())
        return any(request_id in held for request_id in request_ids)

    def vitals(self, name: str = "coordinator") -> Vitals:
        """Of one of the stack's processes."""
        return vitals(self.pids[name])

    def memory(self) -> dict[str, int]:
        """Resident bytes of each of the stack's processes."""
        return {name: self.vitals(name).resident_bytes for name in self.pids}

    def failures(self, code: str) -> float:
        """Calls of the public port that ended with `code`, so far."""
        seen = metrics_of(self.stack.http_address)
        return seen.get(f"diptych_rpc_failures_total{{code={code}}}", 0.0)

    def _fill_pools(self) -> None:
        """Until every block of every pool has been used once."""
        for i in range(10):
            free = max(worker.free_blocks for worker in self.stack.workers())
            if free <= _FEW_BLOCKS:
                return
            length = min(16 * free, MAX_MODEL_LEN - 100)
            prompt = [1000 + (i + j) % 5000 for j in range(length)]
            self.stack.generate(prompt, max_tokens=1, cache_salt=f"fill-{i}")
        raise AssertionError("the pools do not become full")

    def _ask(self) -> list[int]:
        salt = f"salt-{next(_ids)}"
        tokens, _, _ = self.stack.generate(
            PROMPT, timeout_s=60, max_tokens=_NUM_TOKENS, ignore_eos=True, cache_salt=salt
        )
        return tokens

    def _check(self, before: dict[str, Vitals], growth_bytes: int) -> None:
        assert self.stack.process.poll() is None, "the coordinator has ended"
        self.stack.assert_at_rest()
        for name, pid in self.pids.items():
            if name != "coordinator":
                assert self.stack.pid_of(name) == pid, f"{name} was replaced"
        until(self._idle, SETTLE_S, "no request is inside")
        for name, was in before.items():
            until(
                lambda name=name, was=was: not self.vitals(name).grew(was, growth_bytes),  # type: ignore[misc]
                SETTLE_S,
                f"{name} is as it was ({was}, now {self.vitals(name)})",
            )

    def _idle(self) -> bool:
        seen = metrics_of(self.stack.http_address)
        return not seen["diptych_num_requests_running"] + seen["diptych_num_requests_waiting"]


@contextmanager
def file_limit(soft: int) -> Iterator[int]:
    """Our soft limit of descriptors, as near to `soft` as the hard one lets it come."""
    before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = soft if hard == resource.RLIM_INFINITY else min(soft, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    try:
        yield allowed
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, hard))
