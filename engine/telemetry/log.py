"""Logging by structlog to stderr: readable on a terminal, JSON elsewhere.

Lines of libraries (grpc, uvicorn, asyncio) pass through the same processors. `engine.rpc.server`
binds the request id as a context variable; the engine thread has no such context, and passes
`request_id=`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any, TextIO

import structlog

from engine.base.option_groups import LogOptions

Logger = structlog.stdlib.BoundLogger


def configure_logging(
    options: LogOptions, *, stream: TextIO | None = None, **process_fields: str
) -> None:
    """Set up logging of this process (may be repeated); all lines have `process_fields`."""
    stream = stream or sys.stderr
    log_format = options.log_format
    if log_format == "auto":
        log_format = "console" if stream.isatty() else "json"

    def add_process_fields(
        _logger: Any, _method: str, event: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        for key, value in process_fields.items():
            event.setdefault(key, value)
        return event

    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        add_process_fields,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    render: list[structlog.typing.Processor] = [
        structlog.stdlib.ProcessorFormatter.remove_processors_meta
    ]
    if log_format == "json":
        render += [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(default=str),
        ]
    else:
        render.append(
            structlog.dev.ConsoleRenderer(
                colors=stream.isatty(), exception_formatter=structlog.dev.plain_traceback
            )
        )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=render)
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(options.log_level.upper())
    logging.getLogger("httpx").setLevel(logging.WARNING)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


def get_logger(name: str) -> Logger:
    """A logger whose lines have `logger: name`; usable before `configure_logging` too."""
    return structlog.stdlib.get_logger(name)


def current_request() -> str:
    """The request id that is bound to the current task, or ""."""
    return str(structlog.contextvars.get_contextvars().get("request_id", ""))


def library_logger(name: str) -> Logger:
    """A logger for code that also runs in foreign processes.

    If structlog is not configured, lines go to `logging`: structlog would print to stdout.
    """
    if structlog.is_configured():
        return get_logger(name)
    logger: Logger = structlog.wrap_logger(
        logging.getLogger(name),
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.processors.KeyValueRenderer(key_order=["event"]),
        ],
        wrapper_class=Logger,
    )
    return logger


def bind_request(request_id: str) -> None:
    """Add `request_id` to all further lines of the current task."""
    structlog.contextvars.bind_contextvars(request_id=request_id)
