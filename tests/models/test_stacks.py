"""Each architecture and each packing in a real stack: a prefill and a decode worker, with drafts,
give the tokens of one process.

The models are tiny and random. On a CPU with our kernels the comparison is bit for bit.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from engine.checkpoint.source import resolve
from engine.models.architecture import architectures
from tests.models.real_model import Model, exact, greedy, packed
from tests.models.tiny_models import (
    ARCHITECTURES,
    MIXED,
    PACKINGS,
    named_types,
    write_folder,
    write_packed,
)
from tests.support.stack import Stack

pytestmark = pytest.mark.timeout(300)
NUM_TOKENS = 32
LENGTHS = (70, 33, 5)


def prompts() -> list[list[int]]:
    """Repetitions, so that there are drafts, and noise."""
    r = random.Random(9)
    out = []
    for length in LENGTHS:
        motif = [r.randrange(3, 250) for _ in range(7)]
        tokens = [motif[i % 7] if r.random() < 0.9 else r.randrange(3, 250) for i in range(length)]
        out.append(tokens)
    return out


def assert_equal_in_a_stack(folder: Path, name: str, model: Model, *flags: str) -> None:
    expected = [greedy(model, prompt, NUM_TOKENS) for prompt in prompts()]
    flags = ("--model", name, "--max-model-len", "128", "--drafter", "ngram", *flags)
    with Stack(folder, *flags, "--kv-cache-memory", "64MiB") as stack:
        for prompt, tokens in zip(prompts(), expected, strict=True):
            found, _, _ = stack.generate(prompt, max_tokens=NUM_TOKENS, ignore_eos=True)
            assert found == tokens
        seen = stack.metrics("decode")
        # Of two prompts; where all layers have windows, only the last block of each is read.
        assert seen["diptych_kv_transfer_blocks_total"] >= 2
        assert seen["diptych_spec_decode_num_draft_tokens_total"] > 0
        stack.assert_at_rest()


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    folder = tmp_path / "logs"
    folder.mkdir()
    return folder


def test_every_architecture_is_here() -> None:
    assert set(ARCHITECTURES) == {a.name for a in architectures()}


@pytest.mark.parametrize("precision", ["packed", "float32"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_architecture(architecture: str, precision: str, tmp_path: Path, logs: Path) -> None:
    place = write_folder(tmp_path / "model", ARCHITECTURES[architecture])
    checkpoint = resolve(str(place))
    assert checkpoint.config.architecture == architecture
    if precision == "packed":
        assert_equal_in_a_stack(logs, str(place), packed(checkpoint))
    else:
        assert_equal_in_a_stack(logs, str(place), exact(checkpoint), "--dtype", "float32")


@pytest.mark.parametrize("packing", [*PACKINGS, MIXED])
def test_a_packing(packing: str, tmp_path: Path, logs: Path) -> None:
    path = write_packed(tmp_path / "m.gguf", packing)
    assert named_types(path) == {"f32", *packing.split(" + ")}
    assert_equal_in_a_stack(logs, str(path), packed(resolve(str(path))))
