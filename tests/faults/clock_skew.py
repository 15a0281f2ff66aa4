"""A wall clock that jumps: `clock_skew.c` compiled, and the file with its offset."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

_SOURCE = Path(__file__).with_name("clock_skew.c")


class ClockSkew:
    """Processes that got `env` see the wall clock that `jump` sets."""

    def __init__(self, folder: Path) -> None:
        """Raises CalledProcessError; `usable` is whether there is a compiler."""
        self._offset = folder / "skew.offset"
        self._library = folder / "skew.so"
        self.jump(0.0)
        compiler = shutil.which("cc") or shutil.which("gcc")
        assert compiler, "needs a C compiler"
        subprocess.run(
            [compiler, "-O2", "-shared", "-fPIC", "-o", self._library, _SOURCE, "-ldl"],
            check=True,
            capture_output=True,
            timeout=60,
        )

    @staticmethod
    def usable() -> bool:
        """Whether it can be compiled here."""
        return bool(shutil.which("cc") or shutil.which("gcc"))

    @property
    def env(self) -> dict[str, str]:
        """For a process that is to follow."""
        return {"LD_PRELOAD": str(self._library), "SKEW_FILE": str(self._offset)}

    def jump(self, seconds: float) -> None:
        """From now on the wall clock is so far off; in place, for the file is mapped."""
        with self._offset.open("r+b" if self._offset.exists() else "wb") as file:
            file.write(struct.pack("=q", round(seconds * 1e9)))
