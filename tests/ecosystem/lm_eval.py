"""lm-evaluation-harness with its `local-completions` model on two small local tasks.

Log-likelihoods need echoed prompts with log-probabilities; generations have to be the very text
that our gRPC API gives.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

from coordinator.client import Client as DiptychClient
from coordinator.client import TextDelta
from tests.ecosystem.client import Client, Target
from tests.ecosystem.environments import HERE, Environment
from tests.ecosystem.runner import main

PROMPTS = (
    "The river was wide and slow, and",
    "In the year 1850 a young man",
    "The recipe needs flour, butter and",
    "def fibonacci(n):",
)
MAX_TOKENS = 16  # as in the task
NUM_CHOICES = 8
LEAST_ACCURACY = 0.75  # choosing blindly gives a third


def greedy(address: str, prompt: str) -> str:
    with DiptychClient(address) as client:
        events = client.generate(prompt, timeout_s=60, max_tokens=MAX_TOKENS)
        return "".join(event.text for event in events if isinstance(event, TextDelta))


def check(target: Target, environment: Environment) -> str:
    with tempfile.TemporaryDirectory() as folder:
        tasks = Path(folder) / "tasks"
        shutil.copytree(HERE / "tasks", tasks)
        cases = [{"prompt": p, "target": greedy(target.grpc, p)} for p in PROMPTS]
        (tasks / "generate.jsonl").write_text("".join(json.dumps(c) + "\n" for c in cases))
        arguments = {
            "model": target.model,
            "base_url": f"{target.url}/v1/completions",
            "tokenizer": target.folder,
            "tokenizer_backend": "huggingface",
            "num_concurrent": 4,
            "max_retries": 1,
        }
        environment.run(
            *("run", "--model", "local-completions", "--model_args"),
            ",".join(f"{key}={value}" for key, value in arguments.items()),
            *("--include_path", tasks, "--tasks", "diptych_choice,diptych_generate"),
            *("--batch_size", "2", "--output_path", Path(folder) / "out", "--log_samples"),
            command="lm-eval",
            timeout_s=300,
            variables={"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(Path(folder) / "cache")},
            cwd=tasks,
        )
        (report,) = Path(folder).glob("out/**/results_*.json")
        results = json.loads(report.read_text())["results"]
    accuracy = results["diptych_choice"]["acc,none"]
    assert accuracy >= LEAST_ACCURACY, results
    assert results["diptych_generate"]["exact_match,none"] == 1.0, results
    return (
        f"log-likelihood: {accuracy:.2f} of {NUM_CHOICES} questions right;"
        f" generation: {len(PROMPTS)} of {len(PROMPTS)} texts equal to gRPC's"
    )


# transformers, without torch, for the tokenizer alone.
CLIENT = Client("lm-eval", "lm_eval", check, ("lm-eval[api]==0.4.13", "transformers==5.19.0"))

if __name__ == "__main__":
    sys.exit(main(only=[CLIENT.name]))
