"""Entries of the cache: made once, kept, and checked at each use.

    <cache>/<kind>/<name>/        the files, and diptych.json: size and digest of each, sealed
    <cache>/<kind>/.<name>.part/  while it is made; renamed when all of it is on the disk
    <cache>/<kind>/<name>.lock    held meanwhile

Every use reads all bytes, so an entry that was changed by a disk, a crash or a person is never
served. It is counted, logged and made again. An entry of another version is made again without
being counted. This guards against damage, not against forgery: the folder belongs to the user that
starts the processes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from engine.base.errors import CheckpointError
from engine.checkpoint.digest import whole_file
from engine.checkpoint.files import read_sealed, sync, write_sealed
from engine.checkpoint.lock import exclusive
from engine.checkpoint.places import in_a_place
from engine.telemetry.cache import count_damaged
from engine.telemetry.log import get_logger
from engine.telemetry.progress import byte_bar

_log = get_logger(__name__)
MANIFEST = "diptych.json"
_VERSION = 1  # of the manifest
_WAIT_S = 1800.0


def kept(
    kind: str,
    name: str,
    make: Callable[[Path], None],
    *,
    wait_s: float = _WAIT_S,
    what: str = "converting this model",
    read: bool = True,
) -> Path:
    """The folder of an entry, each file as it was written; `make` fills an empty folder.

    One process at a time makes an entry, the others wait for at most `wait_s`. `read=False`
    compares sizes only: for a process that does not use the bytes.
    Raises CheckpointError, and what `make` raises but for OSError.
    """

    def find(base: Path) -> Path | None:
        folder = base / kind / name
        good = folder.exists() and not _damage(folder, f"{kind}/{name}", read)
        return folder if good else None

    def build(base: Path) -> Path:
        folder = base / kind / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(folder.with_name(f"{name}.lock"), wait_s, what=what):
            if find(base) is None:
                _build(folder, kind, make)
        return folder

    return in_a_place(find, build)


def _build(folder: Path, kind: str, make: Callable[[Path], None]) -> None:
    """Make the entry anew. The caller holds the lock."""
    if folder.exists():
        version = (read_sealed(folder / MANIFEST) or {}).get("version", _VERSION)
        if version != _VERSION:
            _log.info("making again what another version kept", path=str(folder), version=version)
        else:
            reason = _damage(folder, f"{kind}/{folder.name}")
            _log.warning("the cache is damaged: making it again", path=str(folder), reason=reason)
            count_damaged(kind)
    part = folder.with_name(f".{folder.name}.part")
    _remove(part)  # of a process that was killed
    try:
        part.mkdir()
        make(part)
        files = {}
        for path in sorted(part.iterdir()):
            sync(path)
            size, digest = whole_file(path)
            files[path.name] = [size, digest]
        entry = {"version": _VERSION, "entry": f"{kind}/{folder.name}", "files": files}
        write_sealed(part / MANIFEST, entry)
        _remove(folder)
        part.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _damage(folder: Path, entry: str, read: bool = True) -> str:
    """What is wrong with an entry; "" if nothing is."""
    manifest = read_sealed(folder / MANIFEST)
    if manifest is None or manifest.get("version") != _VERSION:
        return f"{MANIFEST} is missing or damaged"
    if manifest.get("entry") != entry:
        return f"this is {manifest['entry']}"  # the folder was moved here
    files = manifest["files"]
    try:
        # An additional file is damage, too: a tokenizer would read optional files.
        present = {path.name for path in folder.iterdir()} - {MANIFEST}
        if differing := present.symmetric_difference(files):
            name = min(differing)
            return f"{name} is {'unexpected' if name in present else 'missing'}"
        total = sum(size for size, _ in files.values())
        with byte_bar(f"Checking {entry}", total) as shown:
            for name, (size, digest) in files.items():
                if (folder / name).stat().st_size != size:
                    return f"{name} has another size"
                if read and whole_file(folder / name, shown.update) != (size, digest):
                    return f"{name} has other bytes"
    except (OSError, CheckpointError) as error:
        return str(error)
    return ""


def _remove(path: Path) -> None:
    """Remove a folder, or what lies in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
