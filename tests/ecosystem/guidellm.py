"""GuideLLM end to end: synthetic prompts, chat completions, its report."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from tests.ecosystem.client import Client, Target
from tests.ecosystem.environments import Environment
from tests.ecosystem.runner import main

NUM_REQUESTS, OUTPUT_TOKENS = 8, 12


def check(target: Target, environment: Environment) -> str:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        environment.run(
            *("run", "--backend", f"kind=openai_http,target={target.url},model={target.model}"),
            *("--profile", "kind=concurrent,streams=2"),
            *("--constraint", f"kind=max_requests,count={NUM_REQUESTS}"),
            *("--data", f"kind=synthetic_text,prompt_tokens=32,output_tokens={OUTPUT_TOKENS}"),
            *("--tokenizer", f"kind=huggingface_auto,model={target.folder}"),
            *("--output", f"kind=json,path={report}", "--disable-console"),
            command="guidellm",
            timeout_s=300,
            variables={"HF_HUB_OFFLINE": "1"},
        )
        (benchmark,) = json.loads(report.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert totals["successful"] == totals["total"] == NUM_REQUESTS, totals
    for request in benchmark["requests"]["successful"]:
        assert request["output_metrics"]["text_tokens"] == OUTPUT_TOKENS, request["output_metrics"]
    return f"{NUM_REQUESTS} requests of {OUTPUT_TOKENS} tokens on 2 streams, none failed"


# The open torch range brings CUDA: the CPU's build goes in first.
CLIENT = Client("guidellm", "guidellm", check, ("torch==2.13.0", "guidellm==0.8.1"))

if __name__ == "__main__":
    sys.exit(main(only=[CLIENT.name]))
