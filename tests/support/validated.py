"""Public messages through the same reading and checks as a call's."""

from __future__ import annotations

from coordinator.api.grpc.requests import read_request
from coordinator.api.validation.request import validate
from coordinator.generation.request import GenerationRequest
from coordinator.text.served_model import Limits
from engine.pb.diptych.v1 import inference_pb2


def validated(
    request: inference_pb2.GenerateRequest | inference_pb2.ChatRequest, limits: Limits
) -> GenerationRequest:
    """What the pipeline gets of a message. Raises what `validate` does."""
    return validate(read_request(request), limits)
