"""All systems by name."""

from __future__ import annotations

from benchmarks.systems import diptych, llamacpp, transformers, vllm
from benchmarks.systems.base import System

OURS = ("ours", "ours-nospec")


def all_systems(model: str, our_flags: tuple[str, ...] = ()) -> dict[str, System]:
    """Ours on `model`, the peers on the default one."""
    found = (
        *diptych.systems(model, our_flags),
        *llamacpp.systems(),
        *vllm.systems(),
        *transformers.systems(),
    )
    return {system.name: system for system in found}


def pick(names: str, systems: dict[str, System]) -> tuple[System, ...]:
    """Systems from a list such as `ours,llamacpp-q4_0`; `peers` and `all` are groups.

    Raises ValueError naming an unknown one.
    """
    groups = {"all": tuple(systems), "peers": tuple(n for n in systems if n not in OURS)}
    picked: dict[str, System] = {}
    for name in names.split(","):
        for member in groups.get(name, (name,)):
            if member not in systems:
                known = ", ".join((*groups, *systems))
                raise ValueError(f"unknown system {member!r}; known: {known}")
            picked[member] = systems[member]
    return tuple(picked.values())
