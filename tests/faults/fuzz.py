"""The fuzz of the public API.

    python -m tests.faults.fuzz --inputs 100000 --wire-inputs 3000 --seed 1     (make fuzz)
    python -m tests.faults.fuzz --seed 1 --first 25000 --inputs 25000           (a part of a run)
    python -m tests.faults.fuzz --seed 1 --only 4711                            (one input again)

Two levels. In process: a whole coordinator with its real doors and a decode worker that answers
anything, for volume. Over the wire: `coordinator start` with real workers. On both: no crash, only
documented statuses, well-formed answers, nothing held afterwards, memory bounded.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import grpc
import structlog
from google.protobuf import message_factory

from coordinator.cluster.worker import HEARTBEAT_S, Hello, Load
from coordinator.server import Coordinator
from coordinator.text.chat_template import ChatTemplate
from coordinator.text.served_model import ServedModel
from coordinator.text.tokenizer import Tokenizer
from engine.base.option_groups import FrontOptions, LogOptions
from engine.base.types import PROTOCOL_VERSION, ModelIdentity, Role
from engine.checkpoint.source import resolve
from engine.models.config import ModelConfig
from engine.rpc.channel import open_channel
from engine.telemetry.log import configure_logging
from tests.support.fuzz_checks import Model, Outcome, complaint
from tests.support.fuzz_decode import FuzzDecode
from tests.support.fuzz_messages import Input, make_input, make_input_beside
from tests.support.fuzz_values import MODEL, VOCAB_SIZE
from tests.support.stack import Stack
from tests.support.vitals import MIB, vitals

MAX_MODEL_LEN = 256  # an answer without a bound is short, and so is the run
PATIENCE_S = 60.0
_NUM_CHANNELS = 4
_NUM_SHOWN = 20


@dataclass
class Report:
    """What came of a run."""

    level: str
    seed: int
    num_inputs: int = 0
    num_malformed: int = 0
    num_answers: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    by_method: Counter[tuple[str, str]] = field(default_factory=Counter)
    by_kind: Counter[tuple[str, str]] = field(default_factory=Counter)
    by_constraint: Counter[tuple[str, str]] = field(default_factory=Counter)
    complaints: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)  # bytes, twenty times or so on the way

    def note(self, case: Input, outcome: Outcome, wrong: str | None) -> None:
        """One more input."""
        self.num_inputs += 1
        request: Any = case.parse()
        self.num_malformed += request is None
        name = outcome.code.name
        self.by_method[case.method, name] += 1
        self.by_kind[case.kind, name] += 1
        if request is not None and case.method in ("Generate", "Chat"):
            asked = request.constraint.WhichOneof("kind")
            tools = "tools" if getattr(request, "tools_json", "") else ""
            self.by_constraint[" and ".join(filter(None, (asked, tools))) or "none", name] += 1
        if case.method in ("Generate", "Chat") and name == "OK":
            self.num_answers += 1
            self.num_tokens += sum(len(m.delta.token_ids) for m in outcome.messages)
        if wrong:
            self.complaints.append(f"input {case.index} ({case.method}, {case.kind}): {wrong}")

    @property
    def growth_bytes(self) -> int:
        """How much larger the process was in the second half of the run than in the first: the
        medians, for peaks are those of single large messages.
        """
        half = len(self.resident) // 2
        if not half:
            return 0
        return int(median(self.resident[half:]) - median(self.resident[:half]))

    def table(self, counts: Counter[tuple[str, str]]) -> Iterator[str]:
        """Rows of Markdown: what, and how often each status."""
        statuses = sorted({status for _, status in counts})
        yield "| | " + " | ".join(statuses) + " |"
        yield "|---|" + "---|" * len(statuses)
        for name in sorted({name for name, _ in counts}):
            cells = [str(counts[name, status]) for status in statuses]
            yield f"| {name} | " + " | ".join(cells) + " |"

    def __str__(self) -> str:
        rate = self.num_inputs / max(self.seconds, 1e-9)
        wrong = self.complaints + self.leaks
        return "\n".join(
            (
                f"{self.level}: {self.num_inputs} inputs of seed {self.seed} in"
                f" {self.seconds:.0f} s ({rate:.0f} a second); {self.num_malformed} of them were no"
                f" message; {self.num_answers} answers of {self.num_tokens} tokens",
                f"memory: {max(self.resident, default=0) / MIB:.0f} MiB at its peak, in the second"
                f" half {self.growth_bytes / MIB:+.1f} MiB against the first",
                f"complaints: {len(self.complaints)}, leaks: {len(self.leaks)}",
                *(f"  {line}" for line in wrong[:_NUM_SHOWN]),
                "",
                *self.table(self.by_method),
                "",
                *self.table(self.by_kind),
                "",
                *self.table(self.by_constraint),
            )
        )


async def run(
    report: Report,
    address: str,
    pid: int,
    indexes: range,
    model: Model,
    concurrency: int,
    make: Callable[[int, int], Input] = make_input,
) -> None:
    """Send the inputs `indexes` and judge what comes back."""
    channels = [open_channel(address) for _ in range(_NUM_CHANNELS)]
    waiting = iter(indexes)
    every = max(1, len(indexes) // 20)

    async def sender(channel: grpc.aio.Channel) -> None:
        for index in waiting:
            case = make(report.seed, index)
            outcome = await call(channel, case, Random(f"caller {report.seed}:{index}"))
            report.note(case, outcome, complaint(case, outcome, model))
            if report.num_inputs % every == 0:
                report.resident.append(vitals(pid).resident_bytes)

    begun_s = time.monotonic()
    senders = (sender(channels[i % _NUM_CHANNELS]) for i in range(concurrency))
    await asyncio.gather(*senders)
    report.seconds = time.monotonic() - begun_s
    for channel in channels:
        await channel.close()


async def call(channel: grpc.aio.Channel, case: Input, random: Random) -> Outcome:
    """One call with raw bytes; now and then its caller goes away early."""
    drawn = random.random()
    given_up = drawn < 0.05
    timeout_s = random.choice((0.001, 0.01)) if drawn < 0.02 else PATIENCE_S
    response_class = message_factory.GetMessageClass(case.descriptor.output_type)
    deserialize = response_class.FromString
    messages = []
    try:
        if case.descriptor.server_streaming:
            if case.descriptor.client_streaming:
                both = channel.stream_stream(case.path, response_deserializer=deserialize)
                answer = both(iter((case.raw,)), timeout=timeout_s)
            else:
                stream = channel.unary_stream(case.path, response_deserializer=deserialize)
                answer = stream(case.raw, timeout=timeout_s)
            async for message in answer:
                messages.append(message)
                if given_up:
                    answer.cancel()
        else:
            unary = channel.unary_unary(case.path, response_deserializer=deserialize)
            answer = unary(case.raw, timeout=timeout_s)
            if given_up and timeout_s == PATIENCE_S:
                await asyncio.sleep(0)
                answer.cancel()
            messages.append(await answer)
    except grpc.aio.AioRpcError as error:
        metadata = dict(error.trailing_metadata() or ())
        return Outcome(error.code(), error.details() or "", metadata, messages, given_up)
    except asyncio.CancelledError:
        if not given_up:
            raise
        return Outcome(grpc.StatusCode.CANCELLED, given_up=True)
    return Outcome(grpc.StatusCode.OK, messages=messages, given_up=given_up)


@contextmanager
def errors_logged() -> Iterator[list[str]]:
    """Log records of level ERROR, and tracebacks, while the block runs."""
    found: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.ERROR or record.exc_info:
                found.append(f"{record.name}: {str(record.msg)[:300]} {record.exc_info or ''}")

    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    configure_logging(LogOptions(log_format="json", log_level="warning"))
    root.addHandler(Collector())
    try:
        yield found
    finally:
        structlog.reset_defaults()
        root.handlers[:], root.level = handlers, level


@asynccontextmanager
async def front() -> AsyncIterator[tuple[Coordinator, FuzzDecode, Model]]:
    """A coordinator whose one decode worker answers anything."""
    checkpoint = resolve(MODEL)
    config: ModelConfig = checkpoint.config
    served = ServedModel(
        MODEL,
        config,
        Tokenizer.load(checkpoint.folder),
        ChatTemplate.load(checkpoint.folder),
        MAX_MODEL_LEN,
        folder=checkpoint.folder,  # without it no constraint is compiled
    )
    coordinator = Coordinator(FrontOptions(listen="127.0.0.1:0", http="127.0.0.1:0"), served)
    identity = ModelIdentity(MODEL, "00", "exact", MAX_MODEL_LEN, 16, VOCAB_SIZE)
    decode = FuzzDecode(identity, config.eos_token_ids[0])
    await coordinator.start()
    peer = await decode.start()
    hello = Hello(peer, Role.DECODE, "", identity, PROTOCOL_VERSION)
    worker = coordinator.membership.register(hello)

    async def live() -> None:
        while True:
            coordinator.membership.heartbeat(worker, Load(total_blocks=1, free_blocks=1))
            await asyncio.sleep(HEARTBEAT_S)

    alive = asyncio.create_task(live())
    try:
        yield coordinator, decode, Model(MAX_MODEL_LEN, frozenset(config.eos_token_ids))
    finally:
        alive.cancel()
        await asyncio.gather(alive, return_exceptions=True)
        await coordinator.stop()
        await decode.stop()


def fuzz_in_process(seed: int, indexes: range, *, beside: bool = False) -> Report:
    """The level for volume. `beside`: the protocols of others on the same port.

    In a process that nothing else has used: gRPC's one poller in a process hands late events to
    event loops that have ended as well, and asyncio logs that as an error.
    """
    fresh = get_context("spawn")
    ours, theirs = fresh.Pipe(duplex=False)
    process = fresh.Process(target=_fuzz_and_tell, args=(theirs, seed, indexes, beside))
    process.start()
    theirs.close()  # so that its end is ours when it dies
    try:
        report: Report = ours.recv()
        return report
    except EOFError:
        process.join()
        raise AssertionError(f"the fuzz's process ended with {process.exitcode}") from None
    finally:
        process.kill()
        process.join()


def _fuzz_and_tell(answer_to: Connection, seed: int, indexes: range, beside: bool) -> None:
    raised: list[str] = []
    sys.unraisablehook = lambda told: raised.append(f"{told.exc_value!r} in {told.object!r}")
    threading.excepthook = lambda told: raised.append(f"{told.exc_value!r} in {told.thread!r}")
    report = asyncio.run(_fuzz_front(seed, indexes, beside))
    report.leaks += [f"raised and not handled: {what}" for what in raised]
    answer_to.send(report)


async def _fuzz_front(seed: int, indexes: range, beside: bool, concurrency: int = 32) -> Report:
    report = Report("In process, protocols beside" if beside else "In process", seed)
    make = make_input_beside if beside else make_input
    with errors_logged() as logged:
        async with front() as (coordinator, decode, model):
            await asyncio.sleep(0.1)
            tasks = len(asyncio.all_tasks())
            await run(report, coordinator.address, os.getpid(), indexes, model, concurrency, make)
            report.leaks += await _left_at_rest(coordinator, decode, tasks)
    report.leaks += [f"logged: {line}" for line in logged]
    report.leaks += [f"let through {n} times: {what}" for what, n in decode.breaches.items()]
    return report


async def _left_at_rest(coordinator: Coordinator, decode: FuzzDecode, tasks: int) -> list[str]:
    """What is still there after ten seconds."""
    for _ in range(200):
        if not (left := _left_behind(coordinator, decode, tasks)):
            break
        await asyncio.sleep(0.05)
    return left


def _left_behind(coordinator: Coordinator, decode: FuzzDecode, tasks: int) -> list[str]:
    """What the requests did not give back."""
    labels = {"model_name": MODEL}
    gauge = coordinator.registry.get_sample_value
    counts = {
        "admitted requests": coordinator.pipeline.num_requests,
        "waiting": gauge("diptych_num_requests_waiting", labels),
        "running": gauge("diptych_num_requests_running", labels),
        "calls of the decode worker": decode.num_running,
        "tasks": len(asyncio.all_tasks()) - tasks,
    }
    return [f"{count} {what}" for what, count in counts.items() if count and count > 0]


def fuzz_over_the_wire(seed: int, indexes: range, stack: Stack, concurrency: int = 16) -> Report:
    """The level for what is real: processes, blocks, NIXL."""
    report = Report("Over the wire", seed)
    pids = {name: stack.pid_of(name) for name in ("prefill-0", "decode-0")}
    served = stack.client.model()
    config: ModelConfig = resolve(MODEL).config
    model = Model(served.max_model_len, frozenset(config.eos_token_ids), holds_constraints=True)
    asyncio.run(run(report, stack.address, stack.process.pid, indexes, model, concurrency))
    stack.assert_at_rest()
    now = {name: stack.pid_of(name) for name in pids}
    report.leaks += [f"{name} is another process now" for name in pids if pids[name] != now[name]]
    if stack.process.poll() is not None:
        report.leaks.append("the coordinator has ended")
    for name, text in stack.logs().items():
        report.leaks += [
            f"{name}: {line[:500]}" for line in text.splitlines() if "Traceback" in line
        ]
    return report


def main() -> int:
    """The command; exit status 1 where something was wrong."""
    parser = argparse.ArgumentParser(prog="tests.faults.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000, help="in process")
    parser.add_argument("--first", type=int, default=0, help="index of the first input")
    parser.add_argument("--wire-inputs", type=int, default=3_000, help="to a real stack")
    parser.add_argument("--beside-inputs", type=int, default=20_000, help="of other protocols")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, default=-1, help="this input alone, shown in full")
    args = parser.parse_args()
    indexes = range(args.first, args.first + args.inputs)
    if args.only >= 0:
        print(make_input(args.seed, args.only))
        indexes = range(args.only, args.only + 1)
    reports = []
    if args.inputs or args.only >= 0:
        reports.append(fuzz_in_process(args.seed, indexes))
        print(reports[0], flush=True)
    if args.beside_inputs and args.only < 0:
        beside = range(args.first, args.first + args.beside_inputs)
        reports.append(fuzz_in_process(args.seed, beside, beside=True))
        print(f"\n{reports[-1]}", flush=True)
    if args.wire_inputs:
        with (
            tempfile.TemporaryDirectory() as folder,
            Stack(Path(folder), "--max-model-len", str(MAX_MODEL_LEN)) as stack,
        ):
            wire = range(args.first, args.first + args.wire_inputs) if args.only < 0 else indexes
            reports.append(fuzz_over_the_wire(args.seed, wire, stack))
            print(f"\n{reports[-1]}", flush=True)
    return int(any(report.complaints or report.leaks for report in reports))


if __name__ == "__main__":
    sys.exit(main())
