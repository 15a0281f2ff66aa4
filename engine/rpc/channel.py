"""Client channels whose limits match our servers', and a small pool of them keyed by address.

Keepalive finds a peer that vanished without closing its connection within `KEEPALIVE_TIME_MS` plus
its timeout; a process that was killed closes it at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection

import grpc

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
KEEPALIVE_TIME_MS = 15_000
KEEPALIVE_TIMEOUT_MS = 15_000

Option = tuple[str, int | str]

LENGTH_OPTIONS: tuple[Option, ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 64 * 1024),
)
KEEPALIVE_OPTIONS: tuple[Option, ...] = (
    ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),  # no limit: a silent decode is not cut
)
CHANNEL_OPTIONS: tuple[Option, ...] = (
    *LENGTH_OPTIONS,
    *KEEPALIVE_OPTIONS,
    ("grpc.per_rpc_retry_buffer_size", MAX_MESSAGE_BYTES),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),  # a closed channel's backoff ends with it
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


def open_channel(address: str, *options: Option) -> grpc.aio.Channel:
    """A channel to HOST:PORT; it connects with the first call."""
    return grpc.aio.insecure_channel(address, options=(*CHANNEL_OPTIONS, *options))


class ChannelPool:
    """One channel an address, for the calls of one event loop."""

    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._retired: dict[grpc.aio.Channel, asyncio.Task[None]] = {}

    def get(self, address: str) -> grpc.aio.Channel:
        """The channel to `address`, opened if there is none."""
        if (channel := self._channels.get(address)) is None:
            channel = self._channels[address] = open_channel(address)
        return channel

    def keep_only(self, addresses: Collection[str], grace_s: float = 600.0) -> None:
        """Forget the channels to all other peers; calls on them get `grace_s` to end."""
        for address in self._channels.keys() - addresses:
            channel = self._channels.pop(address)
            self._retired[channel] = asyncio.ensure_future(self._retire(channel, grace_s))

    async def _retire(self, channel: grpc.aio.Channel, grace_s: float) -> None:
        try:
            await channel.close(grace_s)
        finally:
            del self._retired[channel]

    async def close(self) -> None:
        """Close all channels; calls on them are cancelled."""
        channels, retiring = [*self._channels.values(), *self._retired], [*self._retired.values()]
        self._channels = {}
        for task in retiring:
            task.cancel()
        await asyncio.gather(*retiring, return_exceptions=True)
        await asyncio.gather(*(c.close() for c in channels), return_exceptions=True)
