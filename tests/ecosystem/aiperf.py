"""NVIDIA's AIPerf end to end: streamed chat, its report, our metrics scraped beside it."""

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
        environment.run(
            *("profile", "--model", target.model, "--url", target.url, "--streaming"),
            *("--endpoint-type", "chat", "--tokenizer", target.folder, "--concurrency", "2"),
            *("--request-count", str(NUM_REQUESTS), "--synthetic-input-tokens-mean", "32"),
            *("--output-tokens-mean", str(OUTPUT_TOKENS), "--ui", "none"),
            *("--artifact-dir", folder),
            command="aiperf",
            timeout_s=300,
            cwd=Path(folder),
        )
        report = json.loads((Path(folder) / "profile_export_aiperf.json").read_text())
        metrics = (Path(folder) / "server_metrics_export.json").read_text()
    assert report["request_count"]["avg"] == NUM_REQUESTS, report["request_count"]
    assert not report["error_summary"], report["error_summary"]
    assert report["time_to_first_token"]["avg"] > 0
    assert "diptych_time_to_first_token_seconds" in metrics
    return f"{NUM_REQUESTS} streamed chats, none failed; /metrics scraped"


CLIENT = Client("aiperf", "aiperf", check, ("aiperf==0.13.0",))

if __name__ == "__main__":
    sys.exit(main(only=[CLIENT.name]))
