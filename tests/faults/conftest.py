"""The clusters of the fault suite, shared by as many scenarios as can share one.

    bench    2 + 2 workers with fault injection, 2 coordinators, one loopback device: most scenarios
    net      2 + 2 plain workers, 1 coordinator, each on a network of its own, reads over TCP

`--full` runs every scenario at its full length.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from tests.faults.bench import Bench, SharedBench
from tests.faults.clock_skew import ClockSkew
from tests.faults.oracle import Differs, Oracle
from tests.faults.scenario import NOTES, Missed, Scenario, TooLate
from tests.faults.tcp_proxy import TcpProxy
from tests.support.cluster import Cluster, Shape
from tests.support.network import Namespaces
from tests.support.timeouts import CLUSTER

_HERE = Path(__file__).parent
_oracles: list[Oracle] = []
_RETRIED = (Missed, TooLate, Differs)
_FAILED = pytest.StashKey[bool]()
# Small enough that a scenario reaches them: overload, no decode worker in sight, an endless read.
# A read that does not end is abandoned, and its memory taken back, while the scenario waits.
TIMEOUTS = replace(CLUSTER, pull_timeout_s=5.0, quarantine_s=3.0)
SPARE = replace(CLUSTER, worker_wait_s=2.0)
SPARE_FLAGS = (
    *SPARE.coordinator_flags,
    *("--max-queued-requests", "8", "--max-queued-tokens", "1500"),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="the fault suite at its full length")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A scenario that missed its moment is tried again, and one whose answers may be recorded on
    another machine; in the short form one that was late too.
    """
    again = [Missed, Differs, *([] if config.getoption("--full", default=False) else [TooLate])]
    for item in items:
        if item.path.is_relative_to(_HERE):
            item.add_marker(pytest.mark.flaky(reruns=2, only_rerun=again))


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--full", default=False))


@pytest.fixture(scope="package")
def benches(
    tmp_path_factory: pytest.TempPathFactory, record_answers: bool
) -> Iterator[SharedBench]:
    @contextmanager
    def start() -> Iterator[Bench]:
        folder = tmp_path_factory.mktemp("bench")
        skew = ClockSkew(folder) if ClockSkew.usable() else None
        shape = Shape(
            fault_injection=True,
            env=skew.env if skew else None,
            timeouts=TIMEOUTS,
            spare_flags=SPARE_FLAGS,
        )
        with Cluster(folder, shape) as cluster:
            yield Bench(cluster, _oracle(cluster, record=record_answers), skew)

    shared = SharedBench(start)
    yield shared
    shared.discard()


@pytest.fixture
def bench(benches: SharedBench) -> Bench:
    return benches.get()


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedBench]:
    """Reads go over TCP, so that a cut stops them as well."""
    spaces = Namespaces.usable()
    env = {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "eth0"} if spaces else {}

    @contextmanager
    def start() -> Iterator[Bench]:
        network = Namespaces() if spaces else TcpProxy()
        shape = Shape(coordinators=1, env=env)
        with Cluster(tmp_path_factory.mktemp("net"), shape, network) as cluster:
            yield Bench(cluster, _oracle(cluster))

    shared = SharedBench(start)
    yield shared
    shared.discard()


@pytest.fixture
def net(nets: SharedBench) -> Bench:
    return nets.get()


def _oracle(cluster: Cluster, *, record: bool = False) -> Oracle:
    """One for the session."""
    if not _oracles:
        address = cluster.address(cluster.coordinators[0])
        _oracles.append(Oracle.ask(address) if record else Oracle.load(address))
        if record:
            _oracles[0].record()
    return _oracles[0]


async def _scenario(
    request: pytest.FixtureRequest, shared: SharedBench, *, load: bool
) -> AsyncIterator[Scenario]:
    bench, full = shared.get(), bool(request.config.getoption("--full", default=False))
    scenario = Scenario(request.node.name, bench.cluster, bench.oracle, full=full)
    request.node.stash[_FAILED] = True  # until a report shows another result
    try:
        await scenario.begin(load=load)
        yield scenario
    finally:
        await scenario.give_up()
        await scenario.sender.close()
        if request.node.stash[_FAILED]:
            await asyncio.to_thread(shared.discard)


@pytest_asyncio.fixture
async def scenario(
    request: pytest.FixtureRequest, bench: Bench, benches: SharedBench
) -> AsyncIterator[Scenario]:
    """A scenario on the bench, with unrelated requests beside it."""
    async for it in _scenario(request, benches, load=True):
        yield it


@pytest_asyncio.fixture
async def alone(
    request: pytest.FixtureRequest, bench: Bench, benches: SharedBench
) -> AsyncIterator[Scenario]:
    """A scenario on the bench that must not be disturbed by unrelated requests."""
    async for it in _scenario(request, benches, load=False):
        yield it


@pytest_asyncio.fixture
async def net_scenario(
    request: pytest.FixtureRequest, net: Bench, nets: SharedBench
) -> AsyncIterator[Scenario]:
    """A scenario on the network that can be cut."""
    async for it in _scenario(request, nets, load=True):
        yield it


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    ours = [
        report
        for reports in terminalreporter.stats.values()
        for report in reports
        if isinstance(report, pytest.TestReport) and report.nodeid.startswith("tests/faults/")
    ]
    if ours:
        seconds = sum(report.duration for report in ours)
        terminalreporter.write_line(f"fault suite: {seconds / 60:.1f} minutes")
    for name, notes in NOTES.items():
        for note in notes:
            terminalreporter.write_line(f"{name.removeprefix('test_')}: {note}")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """A failed scenario shows its lines in the cluster's logs; the reason of a new try is noted."""
    outcome = yield
    if call.excinfo and isinstance(call.excinfo.value, _RETRIED):
        why = f"{type(call.excinfo.value).__name__}: {call.excinfo.value}"
        NOTES.setdefault(item.name, []).append(why)
    report = outcome.get_result()  # type: ignore[attr-defined]
    retried = call.excinfo is not None and isinstance(call.excinfo.value, _RETRIED)
    item.stash[_FAILED] = report.failed and not retried
    if not report.failed:
        return
    for value in getattr(item, "funcargs", {}).values():
        if isinstance(value, Scenario):
            for place in value.cluster.places:
                report.sections.append((f"log of {place.name}", value.telling_lines(place.name)))
