"""Client channels whose limits match our servers', and a pool of them by address.

Keepalive detects within `KEEPALIVE_S` a peer that vanished without closing its connection; a killed
process closes it at once.

With a cluster token all calls of a channel carry it as plain metadata: gRPC's call credentials need
TLS, and its interceptors replace the call by an object that is cancelled in another way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Any, Self, cast

import grpc

from engine.rpc.auth import ClusterToken

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
MAX_REQUEST_BYTES = 16 * 1024 * 1024  # of a message to a coordinator, and of an HTTP body
KEEPALIVE_S = 30.0
_CALLS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")

Option = tuple[str, int | str]

LENGTH_OPTIONS: tuple[Option, ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 64 * 1024),
)


def keepalive_options(silence_s: float) -> tuple[Option, ...]:
    """Ping after half of `silence_s` without data, close if the other half brings no response."""
    half_ms = max(1, round(silence_s * 500))
    return (
        ("grpc.keepalive_time_ms", half_ms),
        ("grpc.keepalive_timeout_ms", half_ms),
        ("grpc.http2.ping_timeout_ms", half_ms),  # default: a minute
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),  # unlimited: a decode may be silent for long
    )


CHANNEL_OPTIONS: tuple[Option, ...] = (
    *LENGTH_OPTIONS,
    *keepalive_options(KEEPALIVE_S),
    ("grpc.per_rpc_retry_buffer_size", MAX_MESSAGE_BYTES),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),  # reconnect backoff is not shared between channels
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


def open_channel(
    address: str, *options: Option, token: ClusterToken | None = None
) -> grpc.aio.Channel:
    """A channel to HOST:PORT whose calls carry `token`; it connects on the first call."""
    channel = grpc.aio.insecure_channel(address, options=(*CHANNEL_OPTIONS, *options))
    return channel if token is None else cast(grpc.aio.Channel, _TokenChannel(channel, token))


class _TokenChannel:
    """A channel that adds the token to the metadata of each call, and returns gRPC's call."""

    def __init__(self, channel: grpc.aio.Channel, token: ClusterToken) -> None:
        self._channel = channel
        self._metadata = token.metadata

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._channel, name)
        if name not in _CALLS:
            return attribute

        def stub(*method: Any, **how: Any) -> Callable[..., Any]:
            make_call = attribute(*method, **how)

            def call(*request: Any, metadata: Any = None, **options: Any) -> Any:
                return make_call(*request, metadata=(*self._metadata, *(metadata or ())), **options)

            return call

        return stub


class ChannelPool:
    """One channel an address, for the calls of one event loop; all calls carry `token`."""

    def __init__(self, token: ClusterToken | None = None) -> None:
        self._token = token
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._retired: dict[grpc.aio.Channel, asyncio.Task[None]] = {}

    def get(self, address: str) -> grpc.aio.Channel:
        """The channel to `address`, opened if there is none."""
        if (channel := self._channels.get(address)) is None:
            channel = self._channels[address] = open_channel(address, token=self._token)
        return channel

    def keep_only(self, addresses: Collection[str], grace_s: float = 600.0) -> None:
        """Drop the channels to all other addresses; calls on them get `grace_s` to end."""
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
