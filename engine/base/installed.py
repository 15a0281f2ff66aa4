"""Checks that the packages of a worker are installed, without importing them.

A coordinator checks too, before it starts local workers.
"""

from __future__ import annotations

from importlib.util import find_spec

from engine.base.errors import ConfigError

_PACKAGES = ("torch", "nixl")
REMEDY = "pip install 'diptych[worker]'"


def require_worker_packages(subject: str, otherwise: str = "") -> None:
    """Raise ConfigError if `subject` cannot run here; `otherwise` ends the message."""
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        verb = "is" if len(missing) == 1 else "are"
        raise ConfigError(
            f"{subject} need {names}, which {verb} not installed: {REMEDY}{otherwise}"
        )


def unusable(error: ImportError | OSError) -> ConfigError:
    """The error for a failed import: a package, or a library that a package needs, is missing."""
    name = getattr(error, "name", None)
    if isinstance(error, ModuleNotFoundError) and name:
        return ConfigError(f"the package {name} is not installed: {REMEDY}")
    return ConfigError(f"a package cannot be loaded ({error}): {REMEDY}")
