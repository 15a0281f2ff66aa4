"""The place of the cache: its folder, or a temporary one if that cannot be written.

On a read-only or full disk a start takes longer but does not fail. A cache that cannot be written
is read.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from engine.base.errors import CheckpointError
from engine.base.options import cache_dir
from engine.telemetry.log import get_logger

_log = get_logger(__name__)
_UNWRITABLE = {
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EIO, errno.ESTALE, errno.ENOLCK, errno.ENOTSUP),  # a broken disk, a server's share
}
_T = TypeVar("_T")


class CacheError(CheckpointError):
    """Neither the cache nor the temporary folder can be written."""


def in_a_place(find: Callable[[Path], _T | None], make: Callable[[Path], _T]) -> _T:
    """What `find` finds in the cache or in the temporary folder; else what `make` makes there.

    Raises CacheError that names the folder and the remedy.
    """
    base = cache_dir()
    with_remedy = "DIPTYCH_CACHE_DIR names another place for converted models and kernels"
    try:
        if (found := find(base)) is not None:
            return found
        try:
            return make(base)
        except FileNotFoundError:  # the cache may be deleted at any time
            return make(base)
    except OSError as error:
        first = f"{error.filename or base}: {error.strerror}"
        if error.errno not in _UNWRITABLE:
            raise CacheError(f"{first}; {with_remedy}") from None
    try:
        second = _temporary()
        _log.warning("the cache cannot be written", reason=first, instead=str(second))
        if (found := find(second)) is not None:
            return found
        return make(second)
    except OSError as error:
        raise CacheError(
            f"{first}; and {error.filename or tempfile.gettempdir()}: {error.strerror}; "
            f"{with_remedy}"
        ) from None


def _temporary() -> Path:
    """A private folder of this user under the system's temporary folder. Raises OSError."""
    folder = Path(tempfile.gettempdir()) / f"diptych-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(errno.EPERM, "not a folder of this user alone", str(folder))
    return folder
