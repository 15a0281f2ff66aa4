"""lm-evaluation-harness with its `local-completions` model on two small local tasks.

Log-likelihoods need echoed prompts with log-probabilities. They, and the generations, have to be
those that our gRPC API gives.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import grpc

from coordinator.client import Client as DiptychClient
from coordinator.client import TextDelta
from engine.pb.diptych.v1 import inference_pb2, inference_pb2_grpc
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
LEAST_ACCURACY = 0.6  # choosing blindly gives a third
CLOSE = 1e-4  # of log-likelihoods, on their way through JSON


def likelihood(stub: Any, context: str, continuation: str) -> float:
    """The log-probability of a continuation after its context."""

    def ids(text: str) -> list[int]:
        return list(stub.Tokenize(inference_pb2.TokenizeRequest(text=text)).token_ids)

    whole, before = ids(context + continuation), len(ids(context))
    request = inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=whole),
        stop=inference_pb2.Stop(max_tokens=0),
        output=inference_pb2.Output(prompt_logprobs=0),
    )
    first = next(iter(stub.Generate(request, timeout=60)))
    return sum(token.chosen.logprob for token in first.prompt.logprobs[before - 1 :])


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
        (log,) = Path(folder).glob("out/**/samples_diptych_choice_*.jsonl")
        samples = [json.loads(line) for line in log.read_text().splitlines()]
    count = 0
    with grpc.insecure_channel(target.grpc) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for sample in samples:
            case = sample["doc"]
            for choice, ((theirs, _),) in zip(case["choices"], sample["resps"], strict=True):
                ours = likelihood(stub, case["question"], choice)
                assert abs(float(theirs) - ours) < CLOSE, (case, choice, theirs, ours)
                count += 1
    accuracy = results["diptych_choice"]["acc,none"]
    assert accuracy >= LEAST_ACCURACY, results
    assert results["diptych_generate"]["exact_match,none"] == 1.0, results
    return (
        f"{count} log-likelihoods and {len(PROMPTS)} generations equal to gRPC's;"
        f" {accuracy:.2f} of {len(samples)} questions right"
    )


# transformers, without torch, for the tokenizer alone.
CLIENT = Client("lm-eval", "lm_eval", check, ("lm-eval[api]==0.4.13", "transformers==5.19.0"))

if __name__ == "__main__":
    sys.exit(main(only=[CLIENT.name]))
