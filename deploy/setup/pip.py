"""Runs pip and compilers as child processes: progress lines, and their output on failure."""

from __future__ import annotations

import json
import os
import re
import selectors
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Sequence

LINE_S = 4.0
_DOWNLOAD = re.compile(r"Downloading (\S+)")
_BYTES = re.compile(r"Progress (\d+) of (\d+)")
_NAME = re.compile(r"[^A-Za-z0-9_.]")


class Failed(Exception):
    """A step that did not work, in one sentence or pip's last lines."""


class State:
    """Progress of a running pip, from its lines. Pure.

    >>> state = State(); state.take("Progress 500000 of 2000000"); state.text
    '0 of 2 MB'
    """

    def __init__(self) -> None:
        self.text = ""
        self._file = ""

    def take(self, line: str) -> None:
        """One line of pip's output."""
        line = line.strip()
        found = _DOWNLOAD.search(line)
        moved = _BYTES.search(line)
        if found:
            self._file = os.path.basename(found.group(1)).split("-")[0]
            self.text = "downloading %s" % self._file
        elif moved:
            done, total = (round(int(n) / 1e6) for n in moved.groups())
            start = "downloading %s: " % self._file if self._file else ""
            self.text = "%s%d of %d MB" % (start, done, total)
        elif line.startswith("Collecting "):
            self.text = "looking for %s" % _NAME.split(line.split()[1])[0]
        elif line.startswith("Installing collected packages:"):
            self.text = "unpacking %d packages" % (line.count(",") + 1)
        elif line.startswith(("Building", "Preparing", "Getting requirements", "Installing build")):
            self.text = line.rstrip(". ").split(":")[0].lower()


class Lines:
    """Progress lines of silent work: "  looking at this machine, 4 s"."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._show, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _show(self) -> None:
        began = time.monotonic()
        while not self._ended.wait(LINE_S):
            print("  %s, %.0f s" % (self._text, time.monotonic() - began), flush=True)


def run(command: Sequence[str], title: str, **how: object) -> list[str]:
    """Run to the end and show what it is at; returns its lines. Raises Failed."""
    began = shown = time.monotonic()
    lines: list[str] = []
    state = State()
    print(title, flush=True)
    process = subprocess.Popen(
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C is for us, and we end it
        close_fds=False,  # where we are killed the lock of .venv is held until it has ended
        **how,  # type: ignore[call-overload]
    )
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            rest = b""
            while True:
                if selector.select(0.5):
                    piece = os.read(process.stdout.fileno(), 65536)
                    if not piece:
                        break
                    *whole, rest = (rest + piece.replace(b"\r", b"\n")).split(b"\n")
                    for raw in whole:
                        lines.append(raw.decode("utf-8", "replace"))
                        state.take(lines[-1])
                if time.monotonic() - shown >= LINE_S:
                    shown = time.monotonic()
                    at = "%s, " % state.text if state.text else ""
                    print("  %s%.0f s" % (at, shown - began), flush=True)
        status = process.wait()
    finally:
        if process.poll() is None:
            end(process)
    if status:
        raise Failed(_why(lines, status))
    return lines


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a session, with all that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(5)
            return
        except subprocess.TimeoutExpired:
            continue


def _why(lines: Sequence[str], status: int) -> str:
    """pip's errors, or its last lines. Without a network it tells of packages that do not exist."""
    errors = [line for line in lines if line.startswith("ERROR")]
    if errors and any("after connection broken by" in line for line in lines):
        errors.append("The package index was not reached: look at the network, or pip's proxy")
    return "\n".join(errors[-3:] or list(lines)[-8:] or ["exit status %d" % status])


class Pip:
    """pip of one virtual environment."""

    def __init__(self, python: Path, cwd: Path) -> None:
        self._python = python
        self._cwd = cwd
        self._version = self._ask_version()

    def _ask_version(self) -> tuple[int, ...]:
        done = subprocess.run(
            [str(self._python), "-m", "pip", "--version"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        words = done.stdout.decode().split()
        return tuple(int(n) for n in re.findall(r"\d+", words[1])) if len(words) > 1 else (0,)

    def _command(self, *arguments: str) -> list[str]:
        bar = ["--progress-bar", "raw" if self._version >= (24, 1) else "off"]
        return [
            *(str(self._python), "-m", "pip", "--disable-pip-version-check", "--no-input"),
            *("install", *bar, *arguments),
        ]

    def upgrade_itself(self) -> None:
        """A pip that shows progress; the one that is there does where none can be had."""
        if self._version >= (24, 1):
            return
        try:
            run(self._command("--upgrade", "pip"), "Installing a current pip", cwd=self._cwd)
        except Failed:
            print("  no newer pip could be had; going on with %d" % self._version[0], flush=True)
        self._version = self._ask_version()

    def install(self, title: str, *arguments: str) -> None:
        """Install packages. Raises Failed."""
        run(self._command(*arguments), title, cwd=self._cwd)

    def would_install(self, requirement: str, *arguments: str) -> dict[str, object] | None:
        """Metadata of the package that pip would take for `requirement`.

        None where it is installed already, or pip cannot tell.
        """
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.json"
            more = ["--dry-run", "--no-deps", "--quiet", "--report", str(report)]
            try:
                run(
                    self._command(*more, *arguments, requirement),
                    "Asking the package index for %s" % requirement,
                    cwd=self._cwd,
                )
                items = json.loads(report.read_text())["install"]
                metadata: dict[str, object] = items[0]["metadata"] if items else None
                return metadata
            except (Failed, OSError, ValueError, KeyError, IndexError):
                return None
