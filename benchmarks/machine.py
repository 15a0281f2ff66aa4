"""Describes what a result was measured on: machine, limits, the model's cost, commit."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.limits import ModelCost
from engine.checkpoint.source import Checkpoint
from engine.models.architecture import architecture_of
from engine.models.config import ModelConfig

_BF16_BYTES = 2


def describe_machine(limits: bool = True) -> dict[str, Any]:
    """Processor, memory, versions; with what `benchmarks.limits` measures."""
    found: dict[str, Any] = {
        "processor": _field("/proc/cpuinfo", "model name"),
        "num_cores": os.cpu_count(),
        "memory": _field("/proc/meminfo", "MemTotal"),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "commit": _commit(),
    }
    if limits:
        argv = [sys.executable, "-m", "benchmarks.limits"]
        output = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
        found["limits"] = json.loads(output)
    return found


def describe_model(checkpoint: Checkpoint) -> dict[str, Any]:
    """What one step must read and compute."""
    config = checkpoint.config
    num_params = count_params(config)
    if checkpoint.gguf is not None:
        weight_bytes = checkpoint.gguf.stat().st_size
    else:
        weight_bytes = num_params * _BF16_BYTES
    kv = config.num_layers * 2 * config.num_kv_heads * config.head_dim * _BF16_BYTES
    cost = ModelCost(weight_bytes, num_params, kv)
    return {"name": checkpoint.name, **dataclasses.asdict(cost)}


def count_params(config: ModelConfig) -> int:
    """Weights that one token is multiplied with: all layers and the vocabulary projection."""
    specs = list(architecture_of(config).tensors(config))
    head = "embedding" if config.tie_word_embeddings else "head"
    matrices = (s for s in specs if len(s.shape) == 2 and ("." in s.name or s.name == head))
    return sum(math.prod(s.shape) for s in matrices)


def _field(path: str, name: str) -> str:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    return next((x.partition(":")[2].strip() for x in lines if x.startswith(name)), "")


def _commit() -> str:
    try:
        argv = ["git", "describe", "--always", "--dirty"]
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
