"""What an attack runs in: 2 + 2 workers, unrelated answers beside it, and what is measured.

    quiet | attack, quiet | attack, quiet | ...     one run, the windows side by side

**The measure.** Two callers ask ordinary answers all the while. Of each window the p99 of the gaps
between their messages is taken; the median of the attack's windows may be at most twice the median
of the quiet ones. An attack is sent again and again within its window, so that a few gaps each time
are enough to be seen; a window has some hundred gaps, so that its p99 is the second to fifth
longest. More bounds see what a p99 does not: no gap is longer than `LONGEST_S`, and no wait for a
first token than `FIRST_S`; the first window, before any attack, is one of the quiet
ones; and after the last answer the stack has to come to rest (nothing held, no CPU time).

The full form (`--full`) measures each scenario alone; the shortened form a group of them, sent in
turn without a pause. The caller that measures and the one that attacks stand for other machines:
the first comes before the stack's processes on the cores, the second behind them.

What the measure does not see is harm that is smaller than the machine's noise. Other programs make
p99 of a window up to ten times longer. A window in which they took more than `MOST_FOREIGN` cores
does not count (it is printed with a star), and where no other is left the ratio is not held against
the bound, which is printed too; all other bounds are. A scenario whose ratio is above the bound is
measured once more, with twice the rounds, before it fails; both results are printed.
`SLACK_S` is added to the bound: p99 of two quiet halves of one run, on the two shared cores of the
test machine, differed by up to that much.
"""

from __future__ import annotations

import os
import re
import signal
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.faults.checks import holds, tracebacks
from tests.faults.greed.attack import End, Send, Target
from tests.faults.greed.bystander import Bystander
from tests.faults.greed.scenarios import Scenario, constrained_by
from tests.support.stack import Stack, metrics_of, until
from tests.support.vitals import MIB

NUM_STREAMS = 2
RATIO = 2.0
SLACK_S = 0.010
MOST_FOREIGN = 0.3  # cores that other programs may take in a window that counts
LONGEST_S = 2.0
FIRST_S = 5.0
HEALTH_S = 1.0
REST_S = 20.0
DRAIN_S = 5
ATTACK_PAUSE_S = 0.3
SEND_S = 200.0
MOST_WRONG = 8
HELPERS = "helpers"
FLAGS = (
    # One thread a worker: with more, workers on two cores wait for each other's threads, and p99 of
    # a quiet run varies by a factor of five.
    *("--num-threads", "1", "--max-num-seqs", "16", "--drain-s", str(DRAIN_S)),
    # What bodies and messages may take at once, and so what memory is held against.
    *("--client-timeout-s", "10", "--max-request-bytes-in-flight", "128MiB"),
)


@dataclass(frozen=True, slots=True)
class Windows:
    """How long a measurement is."""

    num_rounds: int
    quiet_s: float
    attack_s: float


FULL = Windows(num_rounds=3, quiet_s=2.5, attack_s=4.0)
SHORT = Windows(num_rounds=2, quiet_s=1.5, attack_s=2.0)


class _Window:
    """Gaps between the bystander's messages while a block runs, and for `seconds` at least."""

    def __init__(self, bystander: Bystander, seconds: float) -> None:
        self._bystander = bystander
        self._begun_s = time.monotonic()
        self._until_s = self._begun_s + seconds
        self._foreign_s = foreign_cpu_s()
        self.gaps: list[float] = []
        self.foreign = 0.0  # cores that other programs took

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            time.sleep(max(0.0, self._until_s - time.monotonic()))
            now_s = time.monotonic()
            self.foreign = (foreign_cpu_s() - self._foreign_s) / (now_s - self._begun_s)
            self.gaps = [
                min(gap.end_s, now_s) - gap.begin_s
                for gap in self._bystander.gaps()
                if gap.overlaps(self._begun_s, now_s)
            ]

    @property
    def over(self) -> bool:
        """Whether so much time has passed."""
        return time.monotonic() >= self._until_s

    @property
    def p99(self) -> float:
        """The gap that one in a hundred is longer than, s."""
        found = sorted(self.gaps)
        return found[min(len(found) - 1, int(0.99 * len(found)))] if found else float("inf")


@dataclass
class Measured:
    """One measurement of one scenario."""

    quiet: list[_Window] = field(default_factory=list)
    attack: list[_Window] = field(default_factory=list)

    @property
    def quiet_p99(self) -> float:
        """Of the middle one of the windows."""
        return _middle(self.quiet)

    @property
    def attack_p99(self) -> float:
        """The same, attacked."""
        return _middle(self.attack)

    @property
    def comparable(self) -> bool:
        """Whether the machine was ours in a window of each kind."""
        return any(map(_ours, self.quiet)) and any(map(_ours, self.attack))

    @property
    def in_bounds(self) -> bool:
        """Whether the ratio is met, as far as it can be measured."""
        return not self.comparable or self.attack_p99 <= RATIO * self.quiet_p99 + SLACK_S

    def __str__(self) -> str:
        def listed(windows: Sequence[_Window]) -> str:
            return ", ".join(f"{1000 * w.p99:.0f}{'' if _ours(w) else '*'}" for w in windows)

        return (
            f"p99 {1000 * self.quiet_p99:.0f} -> {1000 * self.attack_p99:.0f} ms, ratio"
            f" {self.attack_p99 / self.quiet_p99:.2f} (quiet {listed(self.quiet)};"
            f" attacked {listed(self.attack)}; {sum(len(w.gaps) for w in self.attack)} gaps)"
            + ("" if self.comparable else "; not compared: other programs took the cores (*)")
        )


def _ours(window: _Window) -> bool:
    return window.foreign <= MOST_FOREIGN


def _middle(windows: Sequence[_Window]) -> float:
    """The median p99 of the windows in which the machine was ours, or of all where it never was."""
    return statistics.median(w.p99 for w in [*filter(_ours, windows)] or windows)


class Arena:
    """A stack and the process that attacks it; begun anew where a scenario has harmed it."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self._folder = folder
        self._flags = (*FLAGS, *flags)
        self._stack: Stack | None = None
        self._num_stacks = 0
        self._attacker = ProcessPoolExecutor(1, get_context("spawn"), initializer=_apart)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._attacker.shutdown(wait=False, cancel_futures=True)
        for process in list((self._attacker._processes or {}).values()):
            process.kill()
        self.end()

    def end(self) -> None:
        """The stack's, if there is one."""
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.__exit__(None, None, None)

    @property
    def stack(self) -> Stack:
        """The one that runs, or a new one."""
        if self._stack is None:
            folder = self._folder / f"stack-{self._num_stacks}"
            folder.mkdir()
            self._num_stacks += 1
            self._stack = Stack(folder, *self._flags, prefill=2, decode=2).__enter__()
            # Processes that compile are started with the first constraint.
            first = partial(constrained_by, kind="json_schema", source='{"type": "boolean"}')
            assert [end.code for end in self.send(first)] == ["OK"]
        return self._stack

    def send(self, send: Send) -> list[End]:
        """From the attacker's process, to the end."""
        stack = self.stack
        ends = self._attacker.submit(send, Target(stack.address, stack.http_address))
        time.sleep(ATTACK_PAUSE_S)
        return ends.result(SEND_S)

    def check(self, scenarios: Sequence[Scenario], windows: Windows) -> list[str]:
        """Run them in turn, as one attack, and hold all that must hold.

        Returns what was measured, a line each.
        """
        stack, notes = self.stack, []
        compared = all(scenario.compared for scenario in scenarios)
        try:
            with _Checked(stack, scenarios) as checked:
                measured = self._measure(stack, scenarios, windows, checked)
                notes.append(str(measured))
                if compared and not measured.in_bounds:
                    longer = replace(windows, num_rounds=2 * windows.num_rounds)
                    measured = self._measure(stack, scenarios, longer, checked)
                    notes.append(f"again: {measured}")
            if compared and not measured.in_bounds:
                checked.wrong.append(f"others are slower: {'; '.join(notes)}")
            notes.append(str(checked))
            assert not checked.wrong, "\n".join([*checked.wrong, *notes])
        except BaseException:
            stack.print_logs()
            self._stack = None
            _end_now(stack)
            raise
        return notes

    def _measure(
        self,
        stack: Stack,
        scenarios: Sequence[Scenario],
        windows: Windows,
        checked: _Checked,
    ) -> Measured:
        measured = Measured()
        controls = [s.control for s in scenarios if s.control is not None]
        with Bystander(stack.address, stack.http_address, NUM_STREAMS) as bystander:
            until(lambda: bystander.num_answers() >= 1, 30, "ordinary answers")
            for i in range(windows.num_rounds + 1):
                with _Window(bystander, windows.quiet_s) as window:
                    for send in controls:
                        self.send(send)
                measured.quiet.append(window)
                if i == windows.num_rounds:
                    break
                with _Window(bystander, windows.attack_s) as window:
                    while True:
                        for scenario in scenarios:
                            checked.ended(scenario, self.send(scenario.send))
                        if window.over:
                            break
                measured.attack.append(window)
        checked.beside(bystander)
        return measured


class _Checked:
    """All but the ratio: ends, memory, health, the same processes, at rest, quiet logs.

    `wrong` has a line of each that does not hold.
    """

    def __init__(self, stack: Stack, scenarios: Sequence[Scenario]) -> None:
        self.wrong: list[str] = []
        self._stack = stack
        self._scenarios = scenarios
        self._ends: dict[str, int] = {}
        self._slowest_s = 0.0
        self._longest_s = 0.0
        self._first_s = 0.0
        self._slowest_health_s = 0.0

    def __enter__(self) -> Self:
        stack = self._stack
        stack.assert_at_rest()
        self._pids = _pids(stack)
        self._read = {name: len(text) for name, text in stack.logs().items()}
        self._memory = MemoryWatch(stack.process.pid, {p: n for n, p in self._pids.items()})
        self._memory.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._memory.__exit__(kind, error, traceback)
        if error is None:
            self._check()

    def ended(self, scenario: Scenario, ends: Sequence[End]) -> None:
        """Of the attack's requests; each has a documented end."""
        for end in ends:
            key = f"{end.code} {end.field}".strip()
            self._ends[key] = self._ends.get(key, 0) + 1
            self._slowest_s = max(self._slowest_s, end.seconds)
        odd = [str(end) for end in ends if (end.code, end.field) not in scenario.ends]
        if odd and len(self.wrong) < MOST_WRONG:
            self.wrong.append(f"{scenario.name}: an end that is not documented: {odd[0]}")

    def beside(self, bystander: Bystander) -> None:
        """The unrelated answers are right, none waited long, and the coordinator was well."""
        if wrong := bystander.wrong():
            self.wrong.append(f"{len(wrong)} answers are wrong: {wrong[:3]}")
        self._longest_s = max(self._longest_s, *(g.end_s - g.begin_s for g in bystander.gaps()))
        firsts = bystander.first_tokens()
        self._first_s = max(self._first_s, *(g.end_s - g.begin_s for g in firsts))
        if all(scenario.compared for scenario in self._scenarios):
            if self._longest_s > LONGEST_S:
                self.wrong.append(f"an answer waited {self._longest_s:.1f} s for a token")
            if self._first_s > FIRST_S:
                self.wrong.append(f"an answer waited {self._first_s:.1f} s for its first token")
        slow = [found for found in bystander.health if found[2] != "200" or found[1] > HEALTH_S]
        if slow or not bystander.health:
            self.wrong.append(f"/health: {len(slow)} of {len(bystander.health)}: {slow[:3]}")
        self._slowest_health_s = max(
            self._slowest_health_s, *(seconds for _, seconds, _ in bystander.health)
        )

    def __str__(self) -> str:
        growth = self._memory.growth().items()
        peaks = ", ".join(f"{name} +{mib} MiB" for name, mib in growth if mib)
        return (
            f"ends {self._ends}, the slowest {self._slowest_s:.1f} s; longest wait for a token"
            f" {self._longest_s:.2f} s, for a first one {self._first_s:.2f} s; /health"
            f" {1000 * self._slowest_health_s:.0f} ms; {peaks}"
        )

    def _check(self) -> None:
        stack = self._stack
        try:
            self._at_rest()
        except Exception as error:  # a process that is gone cannot be asked
            self.wrong.append(f"not at rest: {error}")
            return
        pool_mib = int(max(w.total_blocks for w in stack.workers()) * BLOCK_BYTES / MIB)
        for name, mib in self._memory.growth().items():
            is_worker = name.startswith(("prefill", "decode"))
            own = [s.helpers_mib if name == HELPERS else s.process_mib for s in self._scenarios]
            bound = max(own) + (pool_mib if is_worker else 0)
            if mib > bound:
                self.wrong.append(f"{name} grew by {mib} MiB, the bound is {bound}")
        if (pids := _pids(stack)) != self._pids:
            self.wrong.append(f"processes: {self._pids} before, {pids} now")
        for name, text in stack.logs().items():
            if found := tracebacks(text[self._read.get(name, 0) :]):
                self.wrong.append(f"{name} logged a traceback:\n{found[0]}")

    def _at_rest(self) -> None:
        until(self._nothing_held, REST_S, "nothing is held")
        until(lambda: demand(self._stack) < 0.7, REST_S, "no process computes any more")
        self._stack.assert_at_rest(REST_S)

    def _nothing_held(self) -> bool:
        stack = self._stack
        seen = metrics_of(stack.http_address)
        held = seen["diptych_num_requests_running"] + seen["diptych_num_requests_waiting"]
        for address in (stack.http_address, *(w.http_address for w in stack.workers())):
            held += len(holds(address)["holds"])
        return not held


BLOCK_BYTES = 30 * 2 * 3 * 16 * 64 * 4  # of the default model, in float32: an upper bound


class MemoryWatch:
    """The largest memory of the stack's processes while a block runs; those that the coordinator
    has started beside its workers are counted together, as `HELPERS`.
    """

    def __init__(self, coordinator: int, names: dict[int, str], interval_s: float = 0.1) -> None:
        self._coordinator = coordinator
        self._names = names
        self._interval_s = interval_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._first = self._now()
        self._peak = dict(self._first)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()

    def growth(self) -> dict[str, int]:
        """MiB by process."""
        return {n: (peak - self._first.get(n, 0)) // MIB for n, peak in self._peak.items()}

    def _now(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for pid in descendants(self._coordinator):
            name = self._names.get(pid, HELPERS)
            size = shared_out_bytes(pid) if name == HELPERS else resident_bytes(pid)
            found[name] = found.get(name, 0) + size
        return found

    def _run(self) -> None:
        while not self._over.wait(self._interval_s):
            for name, size in self._now().items():
                self._peak[name] = max(self._peak.get(name, 0), size)


def descendants(pid: int) -> list[int]:
    """A process and all that it started, and they."""
    found, todo = [], [pid]
    while todo:
        found.append(now := todo.pop())
        for task in _listed(Path(f"/proc/{now}/task")):
            try:
                todo += map(int, (task / "children").read_text().split())
            except OSError:
                pass  # has ended
    return found


def _listed(folder: Path) -> Iterator[Path]:
    try:
        yield from list(folder.iterdir())
    except OSError:
        return


def resident_bytes(pid: int) -> int:
    """0 of a process that has ended."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def shared_out_bytes(pid: int) -> int:
    """Its memory, of what it shares with others its part: helpers are forks of each other."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    found = re.search(r"^Pss:\s+(\d+) kB", rollup, re.M)
    return int(found[1]) * 1024 if found else 0


def foreign_cpu_s() -> float:
    """Processor time so far of all that this test did not start, and of other machines."""
    ticks = os.sysconf("SC_CLK_TCK")
    user, nice, system, _, _, irq, softirq, steal, *_ = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    )
    ours = 0
    for pid in descendants(os.getpid()):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ours += sum(map(int, fields[11:15]))  # and of children that have ended
    return (user + nice + system + irq + softirq + steal - ours) / ticks


def demand(stack: Stack, seconds: float = 0.5) -> float:
    """Cores that all threads of the stack's processes use, or wait for, at this moment.

    Waiting counts: on a busy machine a thread that computes without end gets a part of a core.
    """

    def so_far() -> int:
        total = 0
        for pid in descendants(stack.process.pid):
            for task in _listed(Path(f"/proc/{pid}/task")):
                try:
                    running_ns, waiting_ns, _ = (task / "schedstat").read_text().split()
                except OSError:
                    continue  # has ended
                total += int(running_ns) + int(waiting_ns)
        return total

    before = so_far()
    time.sleep(seconds)
    return max(0, so_far() - before) / (seconds * 1e9)


def _apart() -> None:
    """Leave the cores to the stack and to the bystander, as a caller on another machine does."""
    os.setsid()
    os.nice(5)
    with suppress(OSError):  # where the kernel shares cores by session
        Path("/proc/self/autogroup").write_text("5")


def _pids(stack: Stack) -> dict[str, int]:
    """The coordinator and its workers by name."""
    workers = {w.worker_id: stack.pid_of(w.worker_id) for w in stack.workers()}
    return {"coordinator": stack.process.pid, **workers}


def _end_now(stack: Stack) -> None:
    """A stack that may not listen to SIGTERM any more."""
    left = descendants(stack.process.pid)
    stack.client.close()
    for pid in left:
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            pass
    stack.process.wait(10)
    stack._log.close()
