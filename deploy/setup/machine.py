"""Checks the machine before anything is installed. All but `look` is pure."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Mapping, Sequence, Tuple

from deploy.setup.pip import end

Version = Tuple[int, int]
OLDEST: Version = (3, 11)  # as in pyproject.toml
NEWEST_TESTED: Version = (3, 13)
NEWEST: Version = (3, 14)  # of which every pinned package has a wheel; no test ran on it
# What the kernels are compiled for: engine/kernels/precision.py has the same list.
KERNEL_FLAGS = ("avx512_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl", "f16c")
TIMES_SLOWER = 8  # as in engine/kernels
GLIBC: Version = (2, 28)  # torch's wheels
_NAMES = ("python3", "python3.12", "python3.13", "python3.11", "python3.14", "python")
_ASK_S = 60.0

# Runs in a candidate, which may be of any version from 3.
_QUESTION = """
import json, platform, sys, sysconfig
def has(name):
    try:
        __import__(name)
        return True
    except Exception:
        return False
print(json.dumps({
    "version": list(sys.version_info[:3]),
    "executable": getattr(sys, "_base_executable", None) or sys.executable,
    "kind": platform.python_implementation(),
    "bits": 64 if sys.maxsize > 2 ** 32 else 32,
    "no_gil": bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
    "missing": [name for name in ("venv", "ensurepip", "ssl", "ctypes", "zlib") if not has(name)],
}))
"""
# The instructions and headers that the kernels need, in a few lines.
_PROBE = """
#include <immintrin.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
int probe(int *to) {
    __m512i a = _mm512_set1_epi16(1);
    _mm512_storeu_si512(to, _mm512_dpwssd_epi32(a, a, a));
    return (int)sqrtf((float)to[0]);
}
"""


@dataclass(frozen=True)
class Python:
    """An interpreter that was found, and why it cannot be used ("": it can)."""

    name: str
    executable: str
    version: tuple[int, int, int]
    problem: str = ""
    remedy: str = ""

    @property
    def is_tested(self) -> bool:
        """Whether the tests run on this version."""
        return OLDEST <= self.version[:2] <= NEWEST_TESTED


@dataclass
class Findings:
    """What the checks found: errors stop the setup, notes do not."""

    python: Python | None = None
    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def look(wanted: str, root: Path, need_gb: float, has_venv_python: bool = False) -> Findings:
    """All checks at once, so one run names everything that is missing."""
    found = Findings()
    found.errors += check_platform(
        platform.system(), platform.machine(), platform.libc_ver(sys.executable)
    )
    if not has_venv_python:
        found.python, problem, note = pick_python(candidates(wanted), wanted)
        found.errors += [problem] if problem else []
        found.notes += [note] if note else []
    found.errors += check_disk(places(root), need_gb)
    found.errors += check_home(os.path.expanduser("~"), os.environ)
    if found.errors:
        return found
    found.notes += check_cpu(platform.machine(), cpu_flags(), compiler_problem)
    return found


# -- Python ----------------------------------------------------------------------------------------


def candidates(wanted: str) -> list[Python]:
    """The interpreters to choose from, in the order of preference."""
    found = []
    for name in (wanted,) if wanted else _NAMES:
        python = ask(name)
        if python is not None:
            found.append(python)
    return found


def ask(name: str) -> Python | None:
    """The interpreter's description of its version and modules; None if it does not run."""
    path = shutil.which(os.path.expanduser(name))
    if path is None:
        return None
    try:
        done = subprocess.run(
            [path, "-c", _QUESTION],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_ASK_S,
            check=True,
        )
        return judge(name, json.loads(done.stdout.decode()))
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def judge(name: str, said: dict[str, object]) -> Python:
    """Whether an interpreter that described itself can be used."""
    numbers = [int(n) for n in said["version"]]  # type: ignore[attr-defined]
    version = (numbers[0], numbers[1], numbers[2])
    shown = "%d.%d" % version[:2]
    missing = [str(m) for m in said["missing"]]  # type: ignore[attr-defined]
    problem = remedy = ""
    if version[:2] < OLDEST:
        problem = "is too old"
    elif version[:2] > NEWEST:
        problem = "is newer than the packages that Diptych needs"
    elif said["kind"] != "CPython" or said["no_gil"] or said["bits"] != 64:
        what = (
            "a free-threaded build"
            if said["no_gil"]
            else "%s, %s bits"
            % (
                said["kind"],
                said["bits"],
            )
        )
        problem = "is %s, for which packages that Diptych needs are not published" % what
    elif missing:
        problem = "lacks the module %s" % ", ".join(missing)
        remedy = "Debian, Ubuntu: apt-get install python%s-venv" % shown
    return Python(name, str(said["executable"]), version, problem, remedy)


def pick_python(found: Sequence[Python], wanted: str) -> tuple[Python | None, str, str]:
    """(the interpreter to use, why there is none, a note). Tested versions go first."""
    good = [p for p in found if not p.problem]
    tested = [p for p in good if p.is_tested]
    versions = "3.%d to 3.%d" % (OLDEST[1], NEWEST_TESTED[1])
    if not good:
        return None, _no_python(found, wanted, versions), ""
    python = (tested or good)[0]
    note = ""
    if not python.is_tested:
        note = "%s is Python %d.%d: its packages are there, but Diptych is tested with %s" % (
            python.name,
            *python.version[:2],
            versions,
        )
    elif found[0] is not python:
        note = "%s is Python %d.%d, which %s: %s is used instead" % (
            found[0].name,
            *found[0].version[:2],
            found[0].problem or "was not tested",
            python.name,
        )
    return python, "", note


def _no_python(found: Sequence[Python], wanted: str, versions: str) -> str:
    mend = [p for p in found if p.remedy]
    if mend:
        return "%s %s; %s" % (mend[0].name, mend[0].problem, mend[0].remedy)
    remedy = (
        "Debian 12 or later, Ubuntu 24.04 or later: apt-get install python3 python3-venv; "
        "one that lies elsewhere: make demo PYTHON=/path/to/python3.12"
    )
    if not found:
        return "%s: no such Python runs here; Diptych needs Python %s. %s" % (
            wanted or "python3",
            versions,
            remedy,
        )
    first = found[0]
    return "%s is Python %d.%d, which %s; Diptych needs Python %s, and no other was found. %s" % (
        first.name,
        *first.version[:2],
        first.problem,
        versions,
        remedy,
    )


# -- the machine -----------------------------------------------------------------------------------


def check_platform(system: str, machine: str, libc: tuple[str, str]) -> list[str]:
    """Whether torch's and NIXL's wheels run here."""
    if system != "Linux":
        return ["this is %s; Diptych needs Linux (on Windows: WSL)" % system]
    if machine not in ("x86_64", "aarch64"):
        return ["this processor is %s; Diptych needs x86_64 or aarch64" % machine]
    name, version = libc
    if name != "glibc":
        return [
            "this system's C library is not glibc, for which torch and NIXL are published; "
            "use Debian, Ubuntu, Fedora or another with glibc"
        ]
    numbers = version.split(".")
    if len(numbers) > 1 and (int(numbers[0]), int(numbers[1])) < GLIBC:
        return ["glibc is %s; torch needs %d.%d or newer: use a newer system" % (version, *GLIBC)]
    return []


def places(root: Path) -> list[Path]:
    """The folders that an installation fills."""
    cache = os.environ.get("DIPTYCH_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    # tempfile's own function raises where the disk is full.
    temporary = os.environ.get("TMPDIR", "")
    temporary = temporary if os.path.isdir(temporary) else "/tmp"
    return [root, Path(temporary), Path(os.path.expanduser(cache)).absolute()]


def check_home(home: str, environment: Mapping[str, str]) -> list[str]:
    """Whether caches and logs have a place: a container's user may have no home folder."""
    for kind in ("CACHE", "STATE"):
        named = any(environment.get(n) for n in ("DIPTYCH_%s_DIR" % kind, "XDG_%s_HOME" % kind))
        if home == "~" and not named:
            return [
                "this user has no home folder: set HOME, or DIPTYCH_CACHE_DIR and DIPTYCH_STATE_DIR"
            ]
    return []


def check_disk(folders: Sequence[Path], need_gb: float) -> list[str]:
    """Whether they can be written to, the first folder has room, and the others a part of it."""
    out = []
    seen = set()
    for at, folder in enumerate(folders):
        while not os.path.exists(str(folder)):  # a Path's raises where we may not look
            folder = folder.parent
        if not os.access(str(folder), os.W_OK):
            out.append("%s cannot be written to: change its rights%s" % (folder, _elsewhere(at)))
            continue
        device = folder.stat().st_dev
        if device in seen:
            continue
        seen.add(device)
        least = need_gb if at == 0 else need_gb / 4
        free = shutil.disk_usage(str(folder)).free / 1e9
        if free < least:
            out.append(
                "%s has %.1f GB of free disk space; about %.1f GB are needed: free some%s"
                % (folder, free, least, _elsewhere(at))
            )
    return out


def _elsewhere(at: int) -> str:
    return (
        "",
        ", or set TMPDIR to another folder",
        ", or set DIPTYCH_CACHE_DIR to another folder",
    )[at]


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """The instructions of this CPU by the kernel's names."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip().lower() in ("flags", "features"):
            return value.split()
    return []


def check_cpu(machine: str, flags: Sequence[str], compiler_problem: Callable[[], str]) -> list[str]:
    """What makes answers slower here: torch takes the place of the kernels."""
    missing = sorted(set(KERNEL_FLAGS) - set(flags))
    if missing:
        reason = "this CPU lacks the instructions %s" % ", ".join(missing)
        reason = "the kernels are for x86_64" if machine != "x86_64" else reason
    else:
        reason = compiler_problem()
    if not reason:
        return []
    return ["on the CPU answers come about %d times slower: %s" % (TIMES_SLOWER, reason)]


def compiler_problem() -> str:
    """Why the kernels cannot be compiled here; "" where they can.

    A compiler that is slow is none: the first start waits for it.
    """
    remedy = "Debian, Ubuntu: apt-get install build-essential; Fedora: dnf install gcc"
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return "there is no C compiler (%s)" % remedy
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.c"
        source.write_text(_PROBE)
        command = [compiler, "-march=native", "-shared", "-fPIC", "-pthread", str(source), "-lm"]
        try:
            process = subprocess.Popen(
                [*command, "-o", str(Path(folder) / "probe.so")],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return "%s: %s (%s)" % (compiler, error.strerror, remedy)
        try:
            output, _ = process.communicate(timeout=_ASK_S)
        except subprocess.TimeoutExpired:
            return ""
        finally:
            if process.poll() is None:
                end(process)
    if process.returncode == 0:
        return ""
    lines = output.decode("utf-8", "replace").splitlines()
    telling = [line for line in lines if "error" in line] or lines or ["it fails"]
    return "%s cannot compile them: %s (%s)" % (compiler, telling[0].strip()[-200:], remedy)
