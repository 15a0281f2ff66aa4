"""What the services of a worker use of the process around them: the seam between both.

worker.process.WorkerProcess  is a  ServiceHost  <-- prefill.service, decode.service
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

from engine.base.option_groups import TransferOptions
from engine.base.types import ModelIdentity
from engine.constraints import Vocabulary
from engine.rpc.channel import ChannelPool
from engine.scheduling.request import EngineRequest
from engine.step.engine_thread import EngineThread, Stream
from engine.telemetry.metrics import WorkerMetrics
from kvtransfer.checksum import Checksums
from kvtransfer.data_plane import DataPlane
from kvtransfer.kv_service import BlockHost, KvServicer
from kvtransfer.peers import PeerTable

_T = TypeVar("_T")


class ServiceCalls(Protocol):
    """Which calls the worker takes."""

    def check_takes(self, request: EngineRequest) -> None:
        """Raise Unavailable where this worker takes no such request now."""

    def serving(self, request: EngineRequest) -> AbstractContextManager[Stream]:
        """Submit a call's request; the call counts as inside until the block is left."""


class ServiceHost(Protocol):
    """The parts of a running worker. Lives on the asyncio loop."""

    incarnation: str
    identity: ModelIdentity
    vocabulary: Vocabulary | None
    transfer: TransferOptions
    engine: EngineThread
    metrics: WorkerMetrics
    channels: ChannelPool
    plane: DataPlane
    peers: PeerTable
    blocks: BlockHost
    checksums: Checksums
    kv: KvServicer

    @property
    def calls(self) -> ServiceCalls:
        """Which calls it takes."""

    def in_background(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        """Run a task that outlives the call that started it."""

    def salt(self, cache_salt: str) -> bytes:
        """Return the root of the block hashes of requests with this salt."""

    def check_incarnation(self, incarnation: str) -> None:
        """Raise Mismatch where a caller addresses another process; "" addresses any."""

    def check_token_ids(self, token_ids: Sequence[int]) -> None:
        """Raise InvalidRequest for ids that the model has no embedding for."""
