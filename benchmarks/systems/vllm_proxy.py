"""The proxy before a split pair of vLLM servers: `... vllm_proxy LISTEN PREFILL DECODE`.

client -- prompt --> A: max_tokens 1, keep the blocks      answers with where they are
       -- prompt --> B: read them from A, write the answer  bytes passed on untouched
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import uvloop

_REMOTE_DECODE = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
_READ_BYTES = 1 << 16


async def _open(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def _post(
    address: str, body: dict[str, Any]
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await _open(address)
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {address}\r\n"
    head += "Content-Type: application/json\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return reader, writer


async def _read_request(reader: asyncio.StreamReader) -> dict[str, Any]:
    head = await reader.readuntil(b"\r\n\r\n")
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length":
            body: dict[str, Any] = json.loads(await reader.readexactly(int(value)))
            return body
    raise ValueError("a request without a length")


async def _prefill(address: str, body: dict[str, Any]) -> dict[str, Any]:
    """Compute the prompt on A; where its blocks are."""
    wanted = {k: v for k, v in body.items() if k not in ("stream_options", "return_token_ids")}
    wanted |= {"stream": False, "max_tokens": 1, "kv_transfer_params": _REMOTE_DECODE}
    reader, writer = await _post(address, wanted)
    try:
        head, _, content = (await reader.read()).partition(b"\r\n\r\n")
    finally:
        writer.close()
    if b" 200 " not in head.partition(b"\r\n")[0] + b" ":
        raise ValueError(f"prefill: {content[:300]!r}")
    where: dict[str, Any] = json.loads(content)["kv_transfer_params"]
    return where


async def _serve(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, prefill: str, decode: str
) -> None:
    try:
        body = await _read_request(reader)
        where = await _prefill(prefill, body)
        upstream, to_decode = await _post(decode, {**body, "kv_transfer_params": where})
        try:
            while data := await upstream.read(_READ_BYTES):
                writer.write(data)
                await writer.drain()
        finally:
            to_decode.close()
    except (OSError, ValueError, KeyError, asyncio.IncompleteReadError) as error:
        text = f"{type(error).__name__}: {error}"
        print(text, file=sys.stderr, flush=True)
        writer.write(f"HTTP/1.1 502 Bad Gateway\r\nConnection: close\r\n\r\n{text}".encode())
    finally:
        writer.close()


async def _main(listen: str, prefill: str, decode: str) -> None:
    host, _, port = listen.rpartition(":")
    server = await asyncio.start_server(
        lambda reader, writer: _serve(reader, writer, prefill, decode),
        host,
        int(port),
        limit=1 << 26,
    )
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_main(*sys.argv[1:4]))
