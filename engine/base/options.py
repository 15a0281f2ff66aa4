"""Resolves options: flags > environment (DIPTYCH_...) > TOML file (--config) > defaults.

This module alone reads the environment. A field `kv_cache_memory` is the flag `--kv-cache-memory`,
the variable `DIPTYCH_KV_CACHE_MEMORY` and the TOML key `kv_cache_memory` (or with dashes).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.base.errors import ConfigError
from engine.base.option_values import parse_bool

ENV_PREFIX = "DIPTYCH_"


def _parse(field: dataclasses.Field[Any], base: type, raw: Any, where: str) -> Any:
    """A checked value from any source. Raises ConfigError that names the source."""
    meta = field.metadata
    if meta.get("repeated") and isinstance(raw, list) and all(isinstance(r, str) for r in raw):
        raw = ",".join(raw)
    try:
        if base is bool:
            value = parse_bool(raw)
        elif not isinstance(raw, str) and not _is_number(raw, base):  # only TOML has typed values
            raise ValueError(f"expected {base.__name__}")
        elif meta.get("parse"):
            value = meta["parse"](raw)
        else:
            value = base(raw)
    except (TypeError, ValueError) as error:
        reason = str(error) if "expected" in str(error) else f"expected {base.__name__}"
        raise ConfigError(f"{where}: {reason}, got {raw!r}") from None
    if meta.get("choices") and value not in meta["choices"]:
        raise ConfigError(f"{where}: expected one of {', '.join(meta['choices'])}, got {raw!r}")
    low, high = meta.get("min"), meta.get("max")
    if low is not None and not value >= low:
        raise ConfigError(f"{where}: expected at least {low:g}, got {raw!r}")
    if high is not None and not value <= high:
        raise ConfigError(f"{where}: expected at most {high:g}, got {raw!r}")
    return value


def _is_number(raw: Any, base: type) -> bool:
    """Whether a TOML value converts to a number of type `base` without loss."""
    if isinstance(raw, bool) or base not in (int, float):
        return False
    return isinstance(raw, int) or (base is float and isinstance(raw, float))


def _read_toml(path: str) -> dict[str, Any]:
    try:
        data = tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: {error}") from None
    return {key.replace("-", "_"): value for key, value in data.items()}


class _Parser(argparse.ArgumentParser):
    """Raises ConfigError for bad usage, so that every command ends the same way."""

    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(message)


def add_flags(parser: argparse.ArgumentParser, *groups: type) -> None:
    """Add one flag a field to `parser`, in one section a dataclass, with defaults in the help."""
    parser.add_argument("--config", metavar="FILE", help="TOML file with any of these options")
    for cls in groups:
        section = parser.add_argument_group((cls.__doc__ or "").strip().rstrip("."))
        for field in dataclasses.fields(cls):
            meta = field.metadata
            text = meta["help"] + (f" ({', '.join(meta['choices'])})" if meta["choices"] else "")
            if field.default not in ("", None):
                text += f" [{field.default}]"
            flag = "--" + field.name.replace("_", "-")
            switch: dict[str, Any] = {"action": "append"} if meta.get("repeated") else {}
            if isinstance(field.default, bool):  # a flag without value means true
                switch = {"nargs": "?", "const": "true"}
            section.add_argument(
                flag, dest=field.name, metavar="X", help=text.replace("%", "%%"), **switch
            )


def resolve(
    args: argparse.Namespace, *groups: type[Any], environ: Mapping[str, str] | None = None
) -> tuple[Any, ...]:
    """One instance of each group, from flags, environment, file, defaults. Raises ConfigError."""
    environ = os.environ if environ is None else environ
    path = args.config or environ.get(ENV_PREFIX + "CONFIG")
    file = _read_toml(path) if path else {}
    known = {field.name for cls in groups for field in dataclasses.fields(cls)}
    for key in file:
        if key not in known:
            raise ConfigError(f"--config {path}: unknown option {key!r}")
    out = []
    for cls in groups:
        hints = typing.get_type_hints(cls)
        values = {}
        for field in dataclasses.fields(cls):
            flag, env = "--" + field.name.replace("_", "-"), ENV_PREFIX + field.name.upper()
            base = hints[field.name]
            if getattr(args, field.name, None) is not None:
                values[field.name] = _parse(field, base, getattr(args, field.name), flag)
            elif env in environ:
                values[field.name] = _parse(field, base, environ[env], env)
            elif field.name in file:
                values[field.name] = _parse(field, base, file[field.name], f"{path}: {field.name}")
        out.append(cls(**values))
    return tuple(out)


def parser(prog: str, description: str) -> argparse.ArgumentParser:
    """An argument parser that raises ConfigError instead of exiting on bad usage."""
    return _Parser(prog=prog, description=description)


def to_flags(*options: Any) -> list[str]:
    """The flags of a child process that has these options; defaults are omitted."""
    flags: list[str] = []
    for group in options:
        for field in dataclasses.fields(group):
            value = getattr(group, field.name)
            if value != field.default:
                # With "=", as a value may begin with a dash.
                flags.append(f"--{field.name.replace('_', '-')}={value}")
    return flags


def cache_dir() -> Path:
    """Folder of converted models: $DIPTYCH_CACHE_DIR, else in the user's cache folder."""
    return _user_folder("CACHE_DIR", "XDG_CACHE_HOME", ".cache")


def state_dir() -> Path:
    """Folder of logs: $DIPTYCH_STATE_DIR, else in the user's state folder."""
    return _user_folder("STATE_DIR", "XDG_STATE_HOME", ".local/state")


def _user_folder(own: str, xdg: str, in_home: str) -> Path:
    """ConfigError if there is no home folder, as for a container's user."""
    if base := os.environ.get(ENV_PREFIX + own):
        return Path(base)
    try:
        return Path(os.environ.get(xdg) or Path.home() / in_home) / "diptych"
    except RuntimeError:
        raise ConfigError(f"this user has no home folder: set HOME or {ENV_PREFIX}{own}") from None


def set_default_env(defaults: Mapping[str, str]) -> dict[str, str]:
    """Set unset variables of libraries (OMP_*, UCX_*); returns the values in effect."""
    for key, value in defaults.items():
        os.environ.setdefault(key, value)
    return {key: os.environ[key] for key in defaults}


def environment_with(**changes: str) -> dict[str, str]:
    """This process's environment with `changes`, for a tool that runs as a child."""
    return {**os.environ, **changes}


def extend_path(folder: str) -> None:
    """Append `folder` to PATH, unless it is there already."""
    path = os.environ.get("PATH", os.defpath)
    if folder not in path.split(os.pathsep):
        os.environ["PATH"] = f"{path}{os.pathsep}{folder}"


def unset_env(name: str) -> None:
    """Remove a variable that libraries of this process need, but its children must not get."""
    os.environ.pop(name, None)


def visible_devices() -> str | None:
    """CUDA_VISIBLE_DEVICES: the GPUs that this process may use; None: all."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def child_environment() -> dict[str, str]:
    """This environment without option variables, for a child that gets its options as flags."""
    kept = (ENV_PREFIX + "CACHE_DIR", ENV_PREFIX + "STATE_DIR")
    return {k: v for k, v in os.environ.items() if not k.startswith(ENV_PREFIX) or k in kept}
