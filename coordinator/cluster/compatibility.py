"""Which workers a coordinator accepts: those that mean the same by the same block.

The first worker fixes what all must agree on (digest, numeric profile, block size, vocabulary);
when the last one is gone it may change. The context length may differ: it depends on each worker's
memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from coordinator.cluster.worker import Hello, Worker, WorkerState
from engine.base.errors import Mismatch
from engine.base.types import PROTOCOL_VERSION, ModelIdentity


@dataclass(frozen=True, slots=True)
class ServedIdentity:
    """What a coordinator is configured to serve."""

    model_name: str
    vocab_size: int
    tokenizer_digest: str = ""  # "": not compared

    def check(self, hello: Hello) -> None:
        """Compare a worker with the configuration. Raises Mismatch."""
        model = hello.model
        if hello.protocol_version != PROTOCOL_VERSION:
            raise Mismatch(
                f"protocol version {hello.protocol_version} is not {PROTOCOL_VERSION}, which"
                " this coordinator speaks"
            )
        if model.name != self.model_name:
            raise Mismatch(f"model {model.name!r} is not configured here; {self.model_name!r} is")
        if model.vocab_size != self.vocab_size:
            raise Mismatch(
                f"vocab_size {model.vocab_size} is not {self.vocab_size} as this"
                " coordinator's tokenizer has it"
            )
        theirs, ours = model.tokenizer_digest, self.tokenizer_digest
        if theirs and ours and theirs != ours:
            raise Mismatch(
                f"tokenizer_digest {theirs} is not {ours}, which this coordinator's tokenizer has;"
                " start both with the same --model"
            )


def check_others(model: ModelIdentity, worker_id: str, workers: Iterable[Worker]) -> None:
    """Compare a worker's model with that of the other workers. Raises Mismatch."""
    for other in workers:
        if other.peer.worker_id == worker_id or other.state is WorkerState.SUSPECT:
            continue
        if replace(model, max_model_len=0) != replace(other.model, max_model_len=0):
            raise Mismatch(
                f"{_differences(model, other.model)}; the workers of one model must"
                f" agree, and {other.peer.worker_id} is here already"
            )
        return  # all others agree with this one


def _differences(theirs: ModelIdentity, ours: ModelIdentity) -> str:
    """What differs, each as `name theirs is not ours`; the digest where nothing readable does."""
    names = (f.name for f in fields(ModelIdentity) if f.name not in ("digest", "max_model_len"))
    found = [
        f"{name} {getattr(theirs, name)} is not {getattr(ours, name)}"
        for name in names
        if getattr(theirs, name) != getattr(ours, name)
    ]
    return ", ".join(found or [f"digest {theirs.digest} is not {ours.digest}"])
