"""`coordinator start`: the process from its options to its end.

    resolve the model -> listen -> start local workers -> serve
        SIGTERM, SIGINT: drain -> stop workers -> exit 0
        a second signal: stop at once          -> exit 130 after Ctrl-C, else 0
        a local worker cannot use its options from the start: exit 2

Loaded only for this command: the others need neither a model nor a server.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import resource
import signal
import time
from functools import partial
from pathlib import Path
from types import FrameType

import uvloop

from coordinator.cluster.auth import Trust
from coordinator.cluster.local_workers import Supervisor, doing, process_options
from coordinator.cluster.watchdog import Watchdog
from coordinator.cluster.worker import Worker
from coordinator.server import Coordinator, dialable
from coordinator.text.served_model import ServedModel
from engine.base.gpus import deal_gpus, find_gpus
from engine.base.installed import require_worker_packages
from engine.base.memory import host_memory, readable_size
from engine.base.option_groups import AuthOptions, StartOptions, WorkerOptions
from engine.base.options import state_dir, to_flags
from engine.base.types import Role
from engine.checkpoint.source import resolve
from engine.kernels.backend_selection import check_length, prepare_weights
from engine.process.core_dumps import forbid_core_dumps
from engine.process.core_share import shared_page
from engine.process.gc_control import freeze_heap, shorten_switch_interval
from engine.rpc.address import check_free
from engine.rpc.auth import OPERATOR_NAME, SHARED_NAME, ClusterToken, stays_on_this_machine
from engine.telemetry.log import configure_logging, get_logger
from engine.telemetry.progress import LINE_S, print_line

_log = get_logger(__name__)

_STOP_S = 5.0  # for local workers, after their requests have ended


def serve(options: StartOptions) -> int:
    """Run a coordinator until a signal; returns the exit status.

    Raises ConfigError, CheckpointError.
    """
    model, front, log = options.model, options.front, options.log
    local = options.fleet.workers == "local"
    configure_logging(log, role="coordinator")
    if not log.core_dumps:
        forbid_core_dumps()
    _take_descriptors()
    shorten_switch_interval()
    trusted = Trust.of(options.auth, front, local_workers=local)
    signal.signal(signal.SIGTERM, _terminated)  # until the loop takes it: compilers end too
    trusted.operator.share(SHARED_NAME if trusted.cluster else OPERATOR_NAME)  # for commands
    check_free(front.listen, front.internal_listen, front.http)
    if local:
        require_worker_packages("local workers", "; workers on other machines: --workers external")
        options.draft.check(model)
    # Configuration and tokenizer are checked before weights are fetched or read.
    checkpoint = resolve(model.model, weights=False)
    check_length(checkpoint.config, model.max_model_len)
    name = model.model_name or checkpoint.name
    served = ServedModel.load(
        checkpoint,
        name,
        model.max_model_len,
        front.tool_format,
        front.parse_special,
        front.reasoning_parser,
        front.generation_config,
    )
    served.prepare()
    gpus = tuple(find_gpus()) if local and model.device != "cpu" else ()
    if local:
        checkpoint = resolve(model.model)
    if local and model.seed_weights < 0:
        # Here, where the user sees the progress.
        prepare_weights(checkpoint, model, options.cache, on_gpu=bool(gpus))
    model = dataclasses.replace(model, model_name=name)
    options = dataclasses.replace(options, model=model, gpus=gpus)
    try:
        return uvloop.run(_serve(options, served, trusted))
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # no traceback at the very end


def _terminated(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def _take_descriptors() -> None:
    """Raise the soft limit of file descriptors: every connection takes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:  # "unlimited" may be above the kernel's own limit
        _log.info("the limit of file descriptors stays", soft=soft, reason=str(error))


async def _serve(options: StartOptions, served: ServedModel, trust: Trust) -> int:
    signals = _Signals()
    stop, hurry = signals.stop, signals.hurry
    coordinator = Coordinator(options.front, served, trust)
    supervisor, watching = None, None
    try:
        await coordinator.start()
        freeze_heap()
        if options.fleet.workers == "local":
            supervisor = make_supervisor(options, coordinator.internal_address, trust.cluster)
            supervisor.start()
            watching = asyncio.create_task(make_watchdog(options, coordinator, supervisor).run())
        await _until_stop(coordinator, supervisor, options, stop)
        num_requests = coordinator.pipeline.num_requests
        _log.info("draining", num_requests=num_requests)
        _tell(f"stopping; {num_requests} requests may finish; Ctrl-C again to stop now")
        await _first(hurry.wait(), coordinator.drain(options.front.drain_s))
        await coordinator.end_requests()
    finally:
        if watching:
            watching.cancel()
        # Workers before the servers: what they still send is received.
        if supervisor:
            await supervisor.stop(0.0 if hurry.is_set() else _STOP_S)
        await coordinator.stop()
    return 130 if hurry.is_set() and signals.interrupted else 0


class _Signals:
    """The first signal asks for an orderly end, the second one for an immediate end."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()
        self.interrupted = False  # by Ctrl-C, not by a supervisor's SIGTERM
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._take, number)

    def _take(self, number: signal.Signals) -> None:
        self.interrupted = self.interrupted or number == signal.SIGINT
        (self.hurry if self.stop.is_set() else self.stop).set()


def make_supervisor(
    options: StartOptions, coordinator_address: str, token: ClusterToken | None = None
) -> Supervisor:
    """A supervisor for the local workers of `options`; they get `token` in memory."""
    fleet = options.fleet
    places = [(f"prefill-{i}", Role.PREFILL) for i in range(fleet.prefill_workers)]
    places += [(f"decode-{i}", Role.DECODE) for i in range(fleet.decode_workers)]
    log_dir = Path(fleet.log_dir) if fleet.log_dir else state_dir() / "logs" / str(os.getpid())
    worker = WorkerOptions(
        coordinator=dialable(coordinator_address), allowed_hosts=options.front.allowed_hosts
    )
    trust = AuthOptions(token.share() if token else "")
    # Once: a worker that starts again has the share and the GPU of its predecessor.
    memory = str(host_memory().share(len(places)))
    cache = dataclasses.replace(options.cache, memory_share=memory)
    shared = to_flags(options.model, options.step, options.transfer, options.log, worker, trust)
    draft = to_flags(options.draft)
    board = shared_page()
    seats = {name: f"{board}:{i}:{len(places)}" for i, (name, _) in enumerate(places)}

    dealt = deal_gpus(options.gpus, [name for name, _ in places])

    def command(worker_id: str, role: Role) -> list[str]:
        flags = [*shared, *draft] if role is Role.DECODE else shared
        own = cache
        if part := dealt.get(worker_id):
            share = cache.gpu_memory_utilization / part.num_sharing
            own = dataclasses.replace(cache, gpu_memory_utilization=share)
        flags = [*flags, *to_flags(own)]
        flags += [f"--cores={seats[worker_id]}", "--worker-id", worker_id]
        return ["worker.cli", role.value, "start", *flags]

    alone = stays_on_this_machine(coordinator_address)
    options_of = partial(process_options, alone=alone)
    assigned = {name: {"CUDA_VISIBLE_DEVICES": part.device} for name, part in dealt.items()}
    for name, part in dealt.items():
        _log.info("GPU dealt", worker=name, gpu=part.device, num_sharing=part.num_sharing)
    return Supervisor(places, log_dir, command, options_of, assigned)


def make_watchdog(
    options: StartOptions, coordinator: Coordinator, supervisor: Supervisor
) -> Watchdog:
    """A watchdog for the supervisor's workers."""
    return Watchdog(
        supervisor.workers,
        coordinator.membership.last_beat_s,
        hang_s=options.fleet.worker_hang_s,
        start_s=options.fleet.worker_start_s,
        on_hang=coordinator.metrics.worker_hung,
    )


async def _until_stop(
    coordinator: Coordinator,
    supervisor: Supervisor | None,
    options: StartOptions,
    stop: asyncio.Event,
) -> None:
    """Announce readiness and serve; raises ConfigError where a worker cannot use its options."""
    announce = asyncio.create_task(_announce(coordinator, supervisor, options))
    try:
        await _first(stop.wait(), *([supervisor.fatal] if supervisor else []))
        if supervisor and not supervisor.fatal.cancelled():
            raise supervisor.fatal.result()
    finally:
        announce.cancel()
        await asyncio.gather(announce, return_exceptions=True)


async def _announce(
    coordinator: Coordinator, supervisor: Supervisor | None, options: StartOptions
) -> None:
    """One line on stdout when requests can be served."""
    where = f"{coordinator.model.name} on {coordinator.address} (HTTP {coordinator.http_address})"
    if supervisor is None:
        _say(f"coordinator: serving {where}; workers dial {coordinator.internal_address}")
        return
    names = ", ".join(w.worker_id for w in supervisor.workers) or "none"
    logs = supervisor.workers[0].log_path.parent if supervisor.workers else "nowhere"
    _tell(f"starting {names}; logs in {logs}")
    began_s = time.monotonic()
    for role, count in (
        (Role.PREFILL, options.fleet.prefill_workers),
        (Role.DECODE, options.fleet.decode_workers),
    ):
        while not await coordinator.membership.wait_for(role, LINE_S, count):
            waited_s = time.monotonic() - began_s
            _tell(f"waiting for {count} {role.value} workers to load the model, {waited_s:.0f} s")
            for worker in supervisor.workers:
                if worker.role is role and (what := doing(worker)):
                    _tell(f"{worker.worker_id}: {what}")
    context = describe_context(coordinator.pipeline.max_model_len, coordinator.membership.longest)
    _say(f"coordinator: serving {where}; {context}; workers: {names}; logs in {logs}")


def describe_context(max_model_len: int, longest: Worker | None) -> str:
    """The context of the service, and what limits it."""
    text = f"context {max_model_len:,} tokens"
    if longest is None:
        return text
    text += f": KV pool {readable_size(longest.kv_pool.num_bytes)}"
    limit = longest.kv_pool.limit
    return f"{text}, limited by {limit}" if limit else text


def _say(line: str) -> None:
    print(line, flush=True)


def _tell(line: str) -> None:
    print_line(f"coordinator: {line}")


async def _first(*awaitables: object) -> None:
    """Until one of them is done; the others are cancelled."""
    tasks = [asyncio.ensure_future(a) for a in awaitables]  # type: ignore[call-overload]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
