"""A coordinator that checks constraints, over real gRPC with scripted decode workers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from coordinator.server import Coordinator
from coordinator.text.served_model import ServedModel
from engine.base.option_groups import FrontOptions
from tests.support.grpc_front import Front

TEXT = '{"name": "Ann", "age": 7}'
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}


@asynccontextmanager
async def front(checkpoint: Any) -> AsyncIterator[Front]:
    """A coordinator whose workers answer `TEXT`; every request has ended when the block does."""
    found, tokenizer, template = checkpoint
    model = ServedModel("smollm2", found.config, tokenizer, template, folder=found.folder)
    options = FrontOptions(listen="127.0.0.1:0", http="127.0.0.1:0", worker_wait_s=5.0)
    coordinator = Coordinator(options, model)
    await coordinator.start()
    it = Front(coordinator, tokenizer.encode(TEXT))
    try:
        yield it
        assert coordinator.pipeline.num_requests == 0
    finally:
        await it.close()
