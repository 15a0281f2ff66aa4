"""vLLM on the CPU: one tuned server, settings swept, and two servers split by NIXL."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.plan import Endpoint
from benchmarks.systems.base import (
    PEERS,
    ROOT,
    Command,
    Launch,
    System,
    free_port,
    http_ok,
    scrape,
)
from benchmarks.workloads import Needs

VENV = PEERS / "vllm"
FOLDER = PEERS / "models" / "smollm2-hf"
_SERVED = "smollm2"
_EXTRA = {"return_token_ids": True}
_NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}
_TRANSFER = {
    "kv_connector": "NixlConnector",
    "kv_role": "kv_both",
    "kv_buffer_device": "cpu",
}
_COUNTERS = (
    "vllm:spec_decode_num_draft_tokens_total",
    "vllm:spec_decode_num_accepted_tokens_total",
)


def systems() -> tuple[System, ...]:
    """As it comes (tuned), the sweep of the prompt budget, n-gram drafts, and P/D."""
    found = [_system("vllm", ())]
    for size in (128, 256, 512):
        flags = ("--max-num-batched-tokens", str(size))
        only = ("W2", "W3", "W3-undisturbed", "W4")
        found.append(_system(f"vllm-b{size}", flags, only=only))
    drafts = ("--speculative-config", json.dumps(_NGRAM))
    found.append(_system("vllm-ngram", drafts, speculative=True, only=("W2", "W5")))
    found.append(System("vllm-pd", "vLLM P/D over NIXL, one worker a core", _launch_pair, _missing))
    return tuple(found)


def _system(
    name: str, flags: tuple[str, ...], speculative: bool = False, only: tuple[str, ...] = ()
) -> System:
    title = "vLLM CPU, bf16" + (f", `{flags[0]} {flags[1]}`" if flags else "")
    return System(name, title, partial(_launch, flags), _missing, speculative, only)


def _missing() -> str:
    absent = [path for path in (VENV / "bin" / "vllm", FOLDER) if not path.exists()]
    return f"{absent[0].name} is not there; run `make bench-peers`" if absent else ""


def _library(folder: Path, pattern: str) -> str:
    found = sorted(folder.glob(pattern))
    return str(found[0]) if found else ""


def environment(cores: str) -> dict[str, str]:
    """The variables of a tuned server on these cores, such as `0-1`."""
    preload = (
        _library(PEERS / "tcmalloc", "**/libtcmalloc_minimal.so.4"),
        _library(VENV / "lib", "**/libiomp5.so"),
    )
    return {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(PEERS / "vllm-cache"),
        "HF_HUB_OFFLINE": "1",
        "LD_PRELOAD": ":".join(path for path in preload if path),
    }


def _serve(port: int, needs: Needs, flags: tuple[str, ...]) -> tuple[str, ...]:
    argv = [str(VENV / "bin" / "vllm"), "serve", str(FOLDER), "--served-model-name", _SERVED]
    argv += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"]
    argv += ["--max-model-len", str(needs.max_model_len)]
    argv += ["--max-num-seqs", str(max(16, needs.max_streams)), *flags]
    return tuple(argv)


def _counters(url: str) -> dict[str, float]:
    return scrape((url,), _COUNTERS)


def _launch(flags: tuple[str, ...], needs: Needs, folder: Path) -> Launch:
    cores = f"0-{(os.cpu_count() or 1) - 1}"
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    return Launch(
        Endpoint("openai", f"127.0.0.1:{port}", _SERVED, dict(_EXTRA)),
        (Command("vllm", _serve(port, needs, flags), environment(cores)),),
        is_ready=partial(http_ok, f"{base}/health"),
        counters=partial(_counters, f"{base}/metrics"),
    )


def _launch_pair(needs: Needs, folder: Path) -> Launch:
    """Prompts on the first half of the cores, answers on the second, a proxy before both."""
    num_cores = os.cpu_count() or 2
    half = num_cores // 2
    halves = (_span(0, half), _span(half, num_cores))
    transfer: dict[str, Any] = _TRANSFER
    flags = ("--kv-transfer-config", json.dumps(transfer))
    ports = (free_port(), free_port())
    commands = []
    for name, cores, port in zip(("vllm-prefill", "vllm-decode"), halves, ports, strict=True):
        env = environment(cores) | {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())}
        commands.append(Command(name, _serve(port, needs, flags), env))
    proxy = f"127.0.0.1:{free_port()}"
    argv = (sys.executable, "-m", "benchmarks.systems.vllm_proxy", proxy)
    argv += tuple(f"127.0.0.1:{port}" for port in ports)
    commands.append(Command("proxy", argv, {"PYTHONPATH": str(ROOT)}))
    return Launch(
        Endpoint("openai", proxy, _SERVED, dict(_EXTRA)),
        tuple(commands),
        is_ready=partial(http_ok, *(f"http://127.0.0.1:{port}/health" for port in ports)),
    )


def _span(start: int, end: int) -> str:
    return f"{start}-{end - 1}" if end - start > 1 else str(start)
