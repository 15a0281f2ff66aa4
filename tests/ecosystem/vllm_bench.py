"""vLLM's own load generator, `vllm bench serve`, on completions and chat.

Out of the environment that `python -m benchmarks.peers --only vllm` makes; without it left out.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.systems.base import PEERS
from tests.ecosystem.client import Client, Target
from tests.ecosystem.environments import Environment, LeftOut
from tests.ecosystem.runner import main

NUM_PROMPTS, OUTPUT_TOKENS = 8, 12
BACKENDS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}


@dataclass(frozen=True)
class VllmBench(Client):
    """Its environment is the peers'."""

    def prepare(self) -> Environment:
        python = PEERS / "vllm" / "bin" / "python"
        if not python.exists():
            raise LeftOut("vLLM is not installed: python -m benchmarks.peers --only vllm")
        return Environment(python)


def check(target: Target, environment: Environment) -> str:
    for backend, path in BACKENDS.items():
        with tempfile.TemporaryDirectory() as folder:
            environment.run(
                *("bench", "serve", "--backend", backend, "--base-url", target.url),
                *("--endpoint", path, "--model", target.model, "--tokenizer", target.folder),
                *("--dataset-name", "random", "--random-input-len", "48"),
                *("--random-output-len", str(OUTPUT_TOKENS), "--num-prompts", str(NUM_PROMPTS)),
                *("--max-concurrency", "4", "--ignore-eos", "--seed", "1", "--save-result"),
                *("--result-dir", folder, "--result-filename", "result.json"),
                command="vllm",
                timeout_s=300,
            )
            result = json.loads((Path(folder) / "result.json").read_text())
        assert (result["completed"], result["failed"]) == (NUM_PROMPTS, 0), (backend, result)
        assert result["total_output_tokens"] == NUM_PROMPTS * OUTPUT_TOKENS, (backend, result)
        assert result["mean_ttft_ms"] > 0 and result["mean_itl_ms"] > 0, (backend, result)
    return f"backends {' and '.join(BACKENDS)}: {NUM_PROMPTS} requests each, every token counted"


CLIENT = VllmBench("vllm-bench", "vllm", check)

if __name__ == "__main__":
    sys.exit(main(only=[CLIENT.name]))
