"""transformers `generate`, in the process of its own loader: no server."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.plan import Endpoint
from benchmarks.systems.base import PEERS, Launch, System
from benchmarks.systems.vllm import FOLDER
from benchmarks.workloads import Needs

PYTHON = PEERS / "transformers" / "bin" / "python"
_LOOKUP = {"prompt_lookup_num_tokens": 4}


def systems() -> tuple[System, ...]:
    """Plain, and with drafts from the prompt."""
    return (
        System(
            "transformers",
            "transformers generate, bf16",
            partial(_launch, {}),
            _missing,
            only=("W1", "W2", "W5"),
        ),
        System(
            "transformers-lookup",
            "transformers generate, `prompt_lookup_num_tokens=4`",
            partial(_launch, _LOOKUP),
            _missing,
            speculative=True,
            only=("W5",),
        ),
    )


def _missing() -> str:
    absent = [path for path in (PYTHON, FOLDER) if not path.exists()]
    return f"{absent[0].name} is not there; run `make bench-peers`" if absent else ""


def _launch(options: dict[str, Any], needs: Needs, folder: Path) -> Launch:
    endpoint = Endpoint("", model=str(FOLDER), extra=options)
    return Launch(endpoint, loader=(str(PYTHON), "-m", "benchmarks.systems.transformers_load"))
