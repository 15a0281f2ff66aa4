"""`.venv`: whether it can be used as it is, and making it anew where it cannot.

none, or no Python in it, or no pip, or made for another folder  -->  made anew
an installation in it was interrupted                            -->  half-written packages go,
                                                                      pip does the rest
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

from deploy.setup.machine import NEWEST, OLDEST
from deploy.setup.pip import Failed, run

_STAMP = ".diptych"  # JSON: what was installed, by name of the step
_BUSY = ".installing"  # is there while pip is at work
_ASK = "import sys, pip; print('%d.%d' % sys.version_info[:2])"


class Venv:
    """One virtual environment on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"

    def problem(self) -> str:
        """Why it cannot be used; "" where it can."""
        if not self.folder.exists():
            return "is a link to nothing" if self.folder.is_symlink() else "does not exist"
        if not self.python.exists():
            return "has no Python, or one that has gone"
        version = self._version()
        if version is None:
            return "has no pip, or a Python that does not run"
        if not OLDEST <= version <= NEWEST:
            return "has Python %d.%d" % version
        if not self._is_of_this_folder():
            return "was made in another folder"
        return ""

    def _version(self) -> tuple[int, int] | None:
        try:
            done = subprocess.run(
                [str(self.python), "-c", _ASK],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=60,
                check=True,
            )
            major, _, minor = done.stdout.decode().strip().partition(".")
            return int(major), int(minor)
        except (OSError, ValueError, subprocess.SubprocessError):
            return None

    def _is_of_this_folder(self) -> bool:
        """Whether its commands name its own Python: they do not after the folder was moved."""
        try:
            head = (self.folder / "bin" / "pip").read_bytes()[:4096]
        except OSError:
            return True  # no command that could be wrong
        here = (self.folder.absolute(), self.folder.resolve())
        return any(os.fsencode(str(path / "bin")) in head for path in here)

    def make(self, python: str) -> None:
        """From nothing, with `python`. Raises Failed."""
        if self.folder.is_symlink() or self.folder.is_file():
            self.folder.unlink()  # never what a link points to
        elif self.folder.exists():
            shutil.rmtree(str(self.folder))
        try:
            run([python, "-m", "venv", str(self.folder)], "Making %s" % self.folder.name)
        except Failed as error:
            raise Failed("%s -m venv: %s" % (python, error)) from None

    # -- what was installed ------------------------------------------------------------------------

    def stamps(self) -> dict[str, str]:
        """What was installed, by name of the step."""
        try:
            found = json.loads((self.folder / _STAMP).read_text())
            return found if isinstance(found, dict) else {}
        except (OSError, ValueError):
            return {}

    def begin(self) -> None:
        """pip goes to work."""
        (self.folder / _BUSY).touch()

    def done(self, step: str, fingerprint: str) -> None:
        """A step is complete."""
        text = json.dumps({**self.stamps(), step: fingerprint})
        part = self.folder / (_STAMP + ".part")
        part.write_text(text)
        os.replace(str(part), str(self.folder / _STAMP))
        try:
            (self.folder / _BUSY).unlink()
        except OSError:
            pass

    @property
    def was_interrupted(self) -> bool:
        """Whether pip was stopped in the middle."""
        return (self.folder / _BUSY).exists()

    def sweep(self) -> int:
        """Remove the entries of packages that pip had not written whole; returns their number.

        pip takes a package for installed that has an entry, and writes RECORD last.
        """
        num = 0
        for packages in self.folder.glob("lib/python*/site-packages"):
            for entry in packages.glob("*.dist-info"):
                if not (entry / "RECORD").exists():
                    shutil.rmtree(str(entry), ignore_errors=True)
                    num += 1
            for left in packages.glob("~*"):
                shutil.rmtree(str(left), ignore_errors=True)
        return num
