"""Whether the packages of a worker are there; nothing of them is imported. A coordinator asks too,
before it starts local workers that could only fail.
"""

from __future__ import annotations

from importlib.util import find_spec

from engine.base.errors import ConfigError

_PACKAGES = ("torch", "nixl")
REMEDY = "pip install 'diptych[worker]'"


def require_worker_packages(subject: str, otherwise: str = "") -> None:
    """Raise ConfigError where `subject` cannot run here; `otherwise`: what would do instead."""
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        verb = "is" if len(missing) == 1 else "are"
        raise ConfigError(
            f"{subject} need {names}, which {verb} not installed: {REMEDY}{otherwise}"
        )


def unusable(error: ImportError | OSError) -> ConfigError:
    """What an import failed for: a package that is missing, or one whose libraries are."""
    name = getattr(error, "name", None)
    if isinstance(error, ModuleNotFoundError) and name:
        return ConfigError(f"the package {name} is not installed: {REMEDY}")
    return ConfigError(f"a package cannot be loaded ({error}): {REMEDY}")
