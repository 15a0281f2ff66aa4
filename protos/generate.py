"""Rebuild the Python stubs in engine/pb from the .proto files: `make protos`.

Generated modules import each other by their proto path (`diptych.v1...`, `inference...`); they
live under `engine.pb`, so that prefix is put in front. With `--check` nothing is written and the
exit status tells whether the committed stubs are stale.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).parent
TARGET = ROOT.parent / "engine" / "pb"
_PACKAGES = "|".join(sorted(p.name for p in ROOT.iterdir() if p.is_dir()))
_IMPORT = re.compile(rf"^(from|import) ({_PACKAGES})\b", re.MULTILINE)


def generate(out: Path) -> dict[str, str]:
    """Run protoc into `out`; return {path relative to engine/pb: text} of every module."""
    sources = sorted(str(p.relative_to(ROOT)) for p in ROOT.rglob("*.proto"))
    args = ["protoc", f"-I{ROOT}", f"--python_out={out}", f"--pyi_out={out}", *sources]
    if protoc.main(args) != 0:
        raise SystemExit("protoc failed")
    args = ["protoc", f"-I{ROOT}", f"--grpc_python_out={out}", *sources]
    if protoc.main(args) != 0:
        raise SystemExit("protoc failed")
    files = {}
    for path in sorted(out.rglob("*.py*")):
        files[str(path.relative_to(out))] = _IMPORT.sub(r"\1 engine.pb.\2", path.read_text())
    for name in list(files):
        for parent in Path(name).parents:
            files.setdefault(str(parent / "__init__.py"), "")
    return files


def main() -> int:
    """Write the stubs, or with --check compare them; returns the exit status."""
    with tempfile.TemporaryDirectory() as tmp:
        fresh = generate(Path(tmp))
    if "--check" in sys.argv:
        committed = {
            str(p.relative_to(TARGET)): p.read_text()
            for p in TARGET.rglob("*.py*")
            if p.suffix != ".pyc"
        }
        stale = sorted(
            n for n in fresh.keys() | committed.keys() if fresh.get(n) != committed.get(n)
        )
        if stale:
            print("stale stubs, run `make protos`:", *stale, sep="\n  ")
        return 1 if stale else 0
    for old in TARGET.rglob("*.py*"):
        old.unlink()
    for name, text in fresh.items():
        (TARGET / name).parent.mkdir(parents=True, exist_ok=True)
        (TARGET / name).write_text(text)
    print(f"{len(fresh)} files in {TARGET}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
