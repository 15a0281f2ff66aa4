"""What each packing of the weights costs in quality: perplexity of a fixed public text.

    python -m benchmarks.quality [--model M] [--text T] [--tokens 4096] [--choices auto,bf16]
                                 [--llamacpp]

Every choice reads the same text in windows of 512 tokens. Beside the perplexity stand its
difference from fp32 (the file's values dequantised, computed by torch), the mean KL divergence
from fp32's distributions, and how often the likeliest token is another one.

`--llamacpp` adds what llama.cpp computes of a GGUF file, beside what it computes of the same values
in fp32, by its own `llama-perplexity`: it judges the second half of each window.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.corpus import DEFAULT_TEXT
from benchmarks.systems.llamacpp import tool
from coordinator.text.tokenizer import Tokenizer
from engine.attention import BackendChoice, make_backend
from engine.attention.batch import Row
from engine.base.kv_layout import KVLayout
from engine.cache.kv_cache import KVCache
from engine.checkpoint.packaged import DEFAULT_MODEL
from engine.checkpoint.packed import packed_file, read_packed
from engine.checkpoint.source import Checkpoint, resolve, weights
from engine.kernels import kernels
from engine.runner.loader import load_model
from engine.runner.native_model import NativeModel
from engine.runner.runner import Runner

WINDOW, BLOCK = 512, 16
CPU = torch.device("cpu")
Forward = Callable[[list[int]], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Quality:
    """Of one choice, over all windows; logarithms are natural."""

    choice: str
    perplexity: float
    against_fp32: float  # relative
    kl: float  # nats a token
    other_argmax: float  # share of positions


def _cache(checkpoint: Checkpoint, dtype: str) -> KVCache:
    c = checkpoint.config
    layout = KVLayout(c.num_layers, c.num_kv_heads, c.head_dim, BLOCK, dtype)
    return KVCache(layout, WINDOW // BLOCK, CPU)


def by_torch(checkpoint: Checkpoint, dtype: str) -> Forward:
    """The model in torch, weights and activations in `dtype`."""
    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    model = load_model(checkpoint.config, weights(checkpoint, dtype), kind, CPU)
    cache, c = _cache(checkpoint, dtype), checkpoint.config
    runner = Runner(model, cache, make_backend(BackendChoice("torch", "", ""), cache, c))
    return lambda ids: runner.run([Row(ids, 0, list(range(WINDOW // BLOCK)), len(ids))])


def by_kernels(checkpoint: Checkpoint, choice: str) -> Forward:
    """The model in our kernels, weights packed as `choice`."""
    library = kernels()
    if library is None:
        sys.exit("no native kernels on this machine")
    path = packed_file(checkpoint, choice)
    model = NativeModel(checkpoint.config, read_packed(path, checkpoint.config), library)
    cache = _cache(checkpoint, "bfloat16")
    return lambda ids: model.forward([Row(ids, 0, list(range(WINDOW // BLOCK)), len(ids))], cache)


def _windows(ids: list[int]) -> Iterator[list[int]]:
    for start in range(0, len(ids) - WINDOW + 1, WINDOW):
        yield ids[start : start + WINDOW]


def judge(choice: str, forward: Forward, exact: list[torch.Tensor], ids: list[int]) -> Quality:
    """Compare with fp32's log-probabilities, one tensor [WINDOW, vocab] a window."""
    loss = expected = kl = 0.0
    others = count = 0
    for window, log_p in zip(_windows(ids), exact, strict=True):
        log_q = torch.log_softmax(forward(window), -1)
        following = torch.tensor(window[1:])[:, None]
        loss -= float(log_q[:-1].gather(1, following).sum())
        expected -= float(log_p[:-1].gather(1, following).sum())
        kl += float((log_p.exp() * (log_p - log_q)).sum(-1).sum())
        others += int((log_p.argmax(-1) != log_q.argmax(-1)).sum())
        count += len(window) - 1
    positions = len(exact) * WINDOW
    ratio = torch.tensor((loss - expected) / count).exp().item() - 1
    perplexity = torch.tensor(loss / count).exp().item()
    return Quality(choice, perplexity, ratio, kl / positions, others / positions)


def by_llamacpp(model: Path, text: Path, num_windows: int) -> dict[str, float | str]:
    """Mean KL divergence of llama.cpp's distributions from those of its fp32.

    Raises FileNotFoundError where it is not installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        exact, logits = Path(folder) / "f32.gguf", Path(folder) / "logits"
        quantize = [tool("llama-quantize"), "--allow-requantize", model, exact, "F32"]
        subprocess.run([str(a) for a in quantize], check=True, capture_output=True)
        common = ["-f", text, "-c", WINDOW, "--chunks", num_windows, "-t", os.cpu_count() or 1]
        common += ["--kl-divergence-base", logits]
        found = ""
        for argv in (["-m", exact], ["-m", model, "--kl-divergence"]):
            command = [str(a) for a in (tool("llama-perplexity"), *argv, *common)]
            found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    numbers = {}
    for key, label in (("kl", "Mean    KLD"), ("same_argmax_percent", "Same top p")):
        match = re.search(rf"^{label}:\s*([-\d.]+)", found, re.MULTILINE)
        numbers[key] = float(match[1]) if match else math.nan
    return {"choice": "llama.cpp"} | numbers


def main() -> int:
    """Print one line of JSON a choice."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--text", default=DEFAULT_TEXT)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--choices", default="auto,bf16,int8,int4")
    parser.add_argument("--llamacpp", action="store_true")
    args = parser.parse_args()
    checkpoint = resolve(args.model)
    tokenizer = Tokenizer.load(checkpoint.folder)
    ids = tokenizer.encode(Path(args.text).read_text(), False)[: args.tokens // WINDOW * WINDOW]
    fp32 = by_torch(checkpoint, "float32")
    exact = [torch.log_softmax(fp32(window), -1) for window in _windows(ids)]
    ways: dict[str, Callable[[], Forward]] = {"fp32 (torch)": lambda: fp32}
    for choice in args.choices.split(","):
        ways[f"--weights {choice}"] = lambda choice=choice: by_kernels(checkpoint, choice)
    ways["bfloat16 (torch)"] = lambda: by_torch(checkpoint, "bfloat16")
    for name, make in ways.items():
        print(json.dumps(asdict(judge(name, make(), exact, ids))), flush=True)
    if args.llamacpp and checkpoint.gguf is not None:
        num_windows = len(ids) // WINDOW
        print(json.dumps(by_llamacpp(checkpoint.gguf, Path(args.text), num_windows)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
