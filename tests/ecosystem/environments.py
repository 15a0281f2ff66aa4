"""Environments of the clients: each with exactly its own packages, made once by the command that
needs it, under `tests/ecosystem/.environments/`.

A client that needs nothing but the project's own packages uses the interpreter that runs this.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
FOLDER = HERE / ".environments"
INSTALL_S = 1800.0
_LAST_LINES = 25


class Failed(Exception):
    """A client that failed; the message has the details."""


class LeftOut(Exception):
    """A client that cannot be installed here; the message has the reason."""


@dataclass(frozen=True)
class Environment:
    """An interpreter and the commands beside it."""

    python: Path

    @classmethod
    def own(cls) -> Environment:
        """The one that runs this."""
        return cls(Path(sys.executable))

    @classmethod
    def make(cls, name: str, packages: Sequence[str]) -> Environment:
        """One with these packages, in order; a stamp marks it as whole.

        Raises LeftOut where they cannot be installed.
        """
        folder = FOLDER / name
        made = cls(folder / "bin" / "python")
        stamp, wanted = folder / ".installed", "\n".join(packages)
        if stamp.exists() and stamp.read_text() == wanted:
            return made
        print(f"ecosystem: installing {', '.join(packages)}", file=sys.stderr, flush=True)
        try:
            if not made.python.exists():
                Environment.own().run("-m", "venv", folder, timeout_s=INSTALL_S)
            for package in packages:  # one by one: what comes first decides what the next needs
                made.run(
                    *("-m", "pip", "install", "-q", "--disable-pip-version-check", package),
                    timeout_s=INSTALL_S,
                )
        except Failed as error:
            raise LeftOut(f"cannot be installed: {error}") from None
        stamp.write_text(wanted)
        return made

    def version(self, distribution: str) -> str:
        """Of an installed distribution."""
        code = f"from importlib.metadata import version; print(version({distribution!r}))"
        return self.run("-c", code, timeout_s=60).strip()

    def run(
        self,
        *arguments: str | Path,
        timeout_s: float,
        command: str = "python",
        variables: dict[str, str] | None = None,
        cwd: Path | None = None,
    ) -> str:
        """What a command of this environment prints. Raises Failed with its last lines."""
        program = self.python if command == "python" else self.python.parent / command
        argv = [str(program), *map(str, arguments)]
        try:
            done = subprocess.run(
                argv,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_s,
                env={**os.environ, **(variables or {})},
                cwd=cwd,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise Failed(f"{' '.join(argv[:4])} ... took longer than {timeout_s:.0f} s") from None
        if done.returncode != 0:
            lines = (done.stdout + done.stderr).splitlines()[-_LAST_LINES:]
            raise Failed(
                f"{' '.join(argv[:4])} ... ended with {done.returncode}: " + "\n".join(lines)
            )
        return done.stdout

    def script(self, name: str, *arguments: str, timeout_s: float = 300.0) -> str:
        """Run one of `scripts/`; its last line is its result."""
        out = self.run(HERE / "scripts" / name, *arguments, timeout_s=timeout_s)
        return out.strip().splitlines()[-1]
