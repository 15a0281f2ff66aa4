"""The code runs on each Python that README names, as far as one interpreter can tell.

What a run on 3.12 and 3.13 found is in docs/operations.md; here: syntax, modules that are gone.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from deploy.setup import machine
from tests.support.paths import ROOT

PACKAGES = (
    "coordinator",
    "decode",
    "deploy",
    "engine",
    "kvtransfer",
    "prefill",
    "protos",
    "tests",
    "worker",
)
FILES = [path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]
# Gone from the standard library in 3.12 and 3.13.
GONE = {
    *("asynchat", "asyncore", "distutils", "imp", "smtpd"),
    *(
        "aifc",
        "audioop",
        "cgi",
        "cgitb",
        "chunk",
        "crypt",
        "imghdr",
        "lib2to3",
        "mailcap",
        "msilib",
    ),
    *(
        "nis",
        "nntplib",
        "ossaudiodev",
        "pipes",
        "sndhdr",
        "spwd",
        "sunau",
        "telnetlib",
        "uu",
        "xdrlib",
    ),
}


def test_all_files_are_of_the_oldest_python() -> None:
    assert len(FILES) > 200
    for path in FILES:
        ast.parse(path.read_text(), str(path), feature_version=machine.OLDEST)


def test_no_module_is_used_that_a_newer_python_lacks() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [name.name for name in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [str(node.module)]
            assert not {name.partition(".")[0] for name in names} & GONE, path


@pytest.mark.parametrize("name", ["python3.11", "python3.12", "python3.13", "python3.14"])
def test_each_python_that_is_here_compiles_all_of_it(name: str, tmp_path: Path) -> None:
    found = machine.ask(name)
    if found is None:
        pytest.skip(f"{name} does not run here")
    script = (
        "import sys\n"
        "for path in sys.stdin.read().split('\\0'):\n"
        "    compile(open(path, encoding='utf-8').read(), path, 'exec', dont_inherit=True)\n"
    )
    subprocess.run(
        [found.executable, "-W", "error", "-c", script],
        input="\0".join(map(str, FILES)),
        text=True,
        check=True,
        timeout=100,
    )


def test_readme_pyproject_and_the_setup_name_the_same_versions() -> None:
    minors = range(machine.OLDEST[1], machine.NEWEST_TESTED[1] + 1)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [c.rpartition(" ")[2] for c in project["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert listed == [f"3.{minor}" for minor in minors]
    *most, last = listed
    assert f"Python {', '.join(most)} or {last}" in (ROOT / "README.md").read_text()
    assert sys.version_info[:2] >= machine.OLDEST
