"""A packed GGUF file beside llama.cpp, in turn: `python -m benchmarks.packed --model FILE.gguf`.

    decode     at 1 row and at 8 rows after 128 tokens each: tokens a second
    prompt     of 512 tokens: tokens a second
    resident   bytes of the weights in memory, over the size of the file
    packing    seconds from the file to the kernels' layout, without a cache

The ratio is ours over llama.cpp's of the same round.

`--requantise Q4_K_M` first makes the file of the default model, by way of fp32. llama.cpp runs as
`llama-batched-bench`, on as many threads; both compute logits and sample nothing. `--cpu-time`
counts CPU time of one thread in place of time, for a machine that other programs use as well.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.systems.base import PEERS
from benchmarks.systems.llamacpp import tool
from engine.attention.batch import Row
from engine.base.kv_layout import KVLayout
from engine.cache.kv_cache import KVCache
from engine.checkpoint.packaged import DEFAULT_MODEL
from engine.checkpoint.packed import packed_file, read_packed
from engine.checkpoint.source import Checkpoint, resolve
from engine.kernels import kernels
from engine.kernels.threads import Threads
from engine.runner.native_model import NativeModel

CONTEXT, PROMPT, STEPS, BLOCK = 128, 512, 128, 16
ROWS = (1, 8)
Rates = dict[str, float]  # tokens a second: "decode 1", "decode 8", "prompt"


def requantised(kind: str) -> Path:
    """The default model in a type of llama.cpp, made once from its values in fp32."""
    target = PEERS / "models" / f"smollm2-from-f32-{kind.lower()}.gguf"
    source = resolve(DEFAULT_MODEL).gguf
    if not target.exists() and source is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            exact, made = Path(folder) / "f32.gguf", Path(folder) / "made.gguf"
            quantise = [str(tool("llama-quantize")), "--allow-requantize"]
            for argv in ([source, exact, "F32"], [exact, made, kind]):
                subprocess.run([*quantise, *map(str, argv)], check=True, capture_output=True)
            made.replace(target)
    return target


@dataclass
class Ours:
    """The kernels over one file, and KV blocks for eight rows."""

    model: NativeModel
    cache: KVCache
    packed: Path
    clock: Callable[[], float] = time.perf_counter

    @classmethod
    def load(cls, checkpoint: Checkpoint, threads: int) -> Ours:
        """Pack the file if need be, and fill each row's context."""
        library = kernels()
        if library is None:
            sys.exit("no native kernels on this machine")
        Threads(library, threads)
        c, packed = checkpoint.config, packed_file(checkpoint, "auto")
        layout = KVLayout(c.num_layers, c.num_kv_heads, c.head_dim, BLOCK, "bfloat16")
        cache = KVCache(layout, max(ROWS) * PROMPT // BLOCK, torch.device("cpu"))
        return cls(NativeModel(c, read_packed(packed, c), library), cache, packed)

    def row(self, index: int, start: int, count: int) -> Row:
        """`count` random tokens of a request."""
        size = PROMPT // BLOCK
        rng = np.random.default_rng(index + start)
        tokens = rng.integers(0, self.model.config.vocab_size, count).tolist()
        return Row(tokens, start, list(range(size * index, size * (index + 1))), 1)

    def measure(self) -> Rates:
        """One round."""
        found = {"prompt": PROMPT / self._seconds([self.row(0, 0, PROMPT)])}
        for rows in ROWS:
            for index in range(rows):
                self._seconds([self.row(index, 0, CONTEXT)])
            total = 0.0
            for step in range(STEPS):
                total += self._seconds([self.row(i, CONTEXT + step, 1) for i in range(rows)])
            found[f"decode {rows}"] = rows * STEPS / total
        return found

    def _seconds(self, rows: list[Row]) -> float:
        start = self.clock()
        self.model.forward(rows, self.cache)
        return self.clock() - start

    def resident_bytes(self) -> int:
        """Of the mapped weights."""
        inside = False
        total = 0
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if "-" in line.split(" ")[0]:
                inside = line.endswith(str(self.packed))
            elif inside and line.startswith("Rss:"):
                total += int(line.split()[1]) * 1024
        return total


def theirs(model: Path, threads: int) -> Rates:
    """One round of llama.cpp: prompts of 512 tokens alone, then both batches."""
    sizes = ((PROMPT, 1, 1), (CONTEXT, STEPS, ",".join(map(str, ROWS))))
    found: Rates = {}
    for prompt, tokens, rows in sizes:
        for line in _batched_bench(model, threads, prompt, tokens, str(rows)):
            if prompt == PROMPT:
                found["prompt"] = line["speed_pp"]
            else:
                found[f"decode {int(line['pl'])}"] = line["speed_tg"]
    return found


def theirs_by_cpu_time(model: Path) -> Rates:
    """One round of llama.cpp on one thread: the difference of runs of two lengths."""

    def seconds(prompt: int, tokens: int, rows: int) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        list(_batched_bench(model, 1, prompt, tokens, str(rows)))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    found = {"prompt": PROMPT / (seconds(CONTEXT + PROMPT, 1, 1) - seconds(CONTEXT, 1, 1))}
    for rows in ROWS:
        took = seconds(CONTEXT, 1 + STEPS, rows) - seconds(CONTEXT, 1, rows)
        found[f"decode {rows}"] = rows * STEPS / took
    return found


def _batched_bench(
    model: Path, threads: int, prompt: int, tokens: int, rows: str
) -> Iterator[dict[str, float]]:
    argv = [str(tool("llama-batched-bench")), "-m", str(model), "-c", str(max(ROWS) * PROMPT)]
    argv += ["-npp", str(prompt), "-ntg", str(tokens), "-npl", rows, "--output-format", "jsonl"]
    argv += ["-t", str(threads), "-tb", str(threads)]
    done = subprocess.run(argv, check=True, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            yield json.loads(line)


def packing_seconds(checkpoint: Checkpoint) -> float:
    """In a cache of its own, kernels and configuration being there already."""
    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get("DIPTYCH_CACHE_DIR")
        os.environ["DIPTYCH_CACHE_DIR"] = folder
        try:
            start = time.perf_counter()
            packed_file(checkpoint, "auto", read=False)
            return time.perf_counter() - start
        finally:
            os.environ.pop("DIPTYCH_CACHE_DIR")
            if before is not None:
                os.environ["DIPTYCH_CACHE_DIR"] = before


def summary(rounds: list[tuple[Rates, Rates]]) -> Iterator[str]:
    """A line of JSON a measure: medians, and the quartiles of the ratios within rounds."""
    for name in rounds[0][0]:
        ratios = sorted(ours[name] / other[name] for ours, other in rounds)
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        line = {
            "measure": name,
            "ours": round(statistics.median(ours[name] for ours, _ in rounds), 1),
            "llama.cpp": round(statistics.median(other[name] for _, other in rounds), 1),
            "ratio": round(middle, 2),
            "quartiles": [round(low, 2), round(high, 2)],
            "rounds": len(rounds),
        }
        yield json.dumps(line)


def main() -> int:
    """Print lines of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--requantise", metavar="TYPE", default="Q4_K_M")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--cpu-time", action="store_true")
    args = parser.parse_args()
    path = args.model or requantised(args.requantise)
    checkpoint = resolve(str(path))
    ours = Ours.load(checkpoint, 1 if args.cpu_time else args.threads)
    if args.cpu_time:
        ours.clock = time.thread_time
    rounds = []
    for number in range(args.rounds):
        found = theirs_by_cpu_time(path) if args.cpu_time else theirs(path, args.threads)
        rounds.append((ours.measure(), found))
        line = {"round": number, "ours": rounds[-1][0], "theirs": found, "load": os.getloadavg()}
        print(json.dumps(line), flush=True)
    print("\n".join(summary(rounds)), flush=True)
    size = path.stat().st_size
    memory = {"resident": ours.resident_bytes(), "file": size}
    print(json.dumps(memory | {"ratio": round(memory["resident"] / size, 3)}), flush=True)
    print(json.dumps({"packing_s": round(packing_seconds(checkpoint), 2), "mb": size // 10**6}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
