"""What computes a model, and which options are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.base.errors import ConfigError
from engine.base.option_groups import CacheOptions, DraftOptions, ModelOptions
from engine.checkpoint.source import Checkpoint
from engine.kernels import Kernels
from engine.kernels import backend_selection as placement
from engine.kernels.backend_selection import (
    check_length,
    first_layers,
    packing,
    pick_kernels,
    prepare_weights,
    resolve_draft,
)
from engine.models.config import RopeScaling
from tests.support.paged import tiny_config

CONFIG = tiny_config(hidden_size=96, intermediate_size=160, head_dim=32)
KERNELS = Kernels(None)  # type: ignore[arg-type]


@pytest.fixture
def with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "kernels", lambda: KERNELS)


def pick(
    dtype: str = "bfloat16",
    *,
    on_gpu: bool = False,
    block_size: int = 16,
    weights: str = "auto",
    seed_weights: int = -1,
    odd: bool = False,
) -> Kernels | None:
    config = tiny_config() if odd else CONFIG
    model = ModelOptions(weights=weights, seed_weights=seed_weights)
    return pick_kernels(config, model, CacheOptions(block_size), dtype, on_gpu=on_gpu)


@pytest.mark.usefixtures("with_kernels")
def test_the_kernels_compute_bfloat16_on_the_cpu() -> None:
    assert pick() is KERNELS
    assert pick(block_size=32, weights="int4") is KERNELS
    assert pick("float32") is None
    assert pick("float16") is None
    assert pick(on_gpu=True) is None
    assert pick(block_size=8) is None
    assert pick(seed_weights=3) is None
    assert pick(odd=True) is None


@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize("change", [{"on_gpu": True}, {"block_size": 8}, {"odd": True}])
def test_what_only_the_kernels_can_do_is_refused_elsewhere(change: dict[str, bool]) -> None:
    for weights in ("int8", "int4"):
        with pytest.raises(ConfigError, match=f"--weights {weights}: needs our CPU kernels"):
            pick(weights=weights, **change)
        assert pick(weights="bf16", **change) is None


def test_without_a_compiler_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "kernels", lambda: None)
    assert pick() is None
    with pytest.raises(ConfigError, match="a C compiler"):
        pick(weights="int8")


def test_only_a_gguf_file_has_a_packing_of_its_own() -> None:
    plain = Checkpoint(Path("x"), "x", CONFIG, "f")
    gguf = Checkpoint(Path("x"), "x", CONFIG, "f", Path("x.gguf"))
    assert packing(plain, ModelOptions()) == "bf16"
    assert packing(gguf, ModelOptions()) == "auto"
    assert packing(gguf, ModelOptions(weights="bf16")) == "bf16"
    assert packing(plain, ModelOptions(weights="int4")) == "int4"


def a_checkpoint(name: str, **changes: object) -> Checkpoint:
    return Checkpoint(Path(name), name, tiny_config(**changes), f"print-of-{name}")


def test_the_first_layers_are_a_draft_model_of_their_own_name() -> None:
    target = a_checkpoint("target", num_layers=6)
    draft = resolve_draft(target, "first:2", weights=True)
    assert (draft.config.num_layers, draft.folder) == (2, target.folder)
    assert draft.fingerprint != target.fingerprint
    assert (first_layers("first:2"), first_layers("smollm2"), first_layers("a/b")) == (2, 0, 0)
    with pytest.raises(ConfigError, match="first:7: target has 6 layers"):
        resolve_draft(target, "first:7", weights=True)
    for spec in ("first:", "first:0", "first:two", "first"):
        with pytest.raises(ConfigError, match="expected first:N"):
            resolve_draft(target, spec, weights=True)


def test_another_vocabulary_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    target, draft = a_checkpoint("target"), a_checkpoint("small", vocab_size=99)
    monkeypatch.setattr(placement, "resolve", lambda spec, weights: draft)
    with pytest.raises(ConfigError, match="small: has a vocabulary of 99 tokens, target of 101"):
        resolve_draft(target, "small", weights=True)
    draft = a_checkpoint("small", num_layers=1)
    assert resolve_draft(target, "small", weights=True) is draft


def test_what_drafts_is_said_once() -> None:
    with pytest.raises(ConfigError, match="--drafter model: needs --draft-model"):
        DraftOptions(drafter="model").check(ModelOptions())
    with pytest.raises(ConfigError, match="is for --drafter model"):
        DraftOptions(drafter="ngram").check(ModelOptions(draft_model="first:2"))
    DraftOptions(drafter="model").check(ModelOptions(draft_model="first:2"))
    DraftOptions(drafter="none").check(ModelOptions(draft_model="first:2"))  # carried, unused
    DraftOptions().check(ModelOptions())


@pytest.mark.parametrize(
    ("model", "block_size", "odd", "line"),
    [
        (ModelOptions(), 16, False, "x runs on torch, about 3 times slower: no compiler here"),
        (ModelOptions(), 8, False, "--block-size 8 is not a multiple of 16"),
        (ModelOptions(), 16, True, "the kernels do not take this model's widths"),
        (ModelOptions(dtype="float32"), 16, False, ""),  # asked for
        (ModelOptions(seed_weights=1), 16, False, ""),
    ],
)
def test_the_start_says_why_torch_computes(
    model: ModelOptions,
    block_size: int,
    odd: bool,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(placement, "kernels", lambda: None)
    monkeypatch.setattr(placement, "why_not", lambda: "no compiler here")
    monkeypatch.setattr(placement, "TIMES_SLOWER", 3)
    monkeypatch.setattr(placement, "weights", lambda checkpoint, dtype, read: [])
    checkpoint = Checkpoint(Path("x"), "x", tiny_config() if odd else CONFIG, "f")
    prepare_weights(checkpoint, model, CacheOptions(block_size), on_gpu=False)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [] if not line else line in lines[0]
    prepare_weights(checkpoint, model, CacheOptions(block_size), on_gpu=True)
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("with_kernels")
def test_with_kernels_the_start_says_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(placement, "why_not", lambda: "")
    monkeypatch.setattr(placement, "packed_file", lambda checkpoint, choice, read: Path("x"))
    checkpoint = Checkpoint(Path("x"), "x", CONFIG, "f")
    options = ModelOptions(dtype="bfloat16")
    prepare_weights(checkpoint, options, CacheOptions(), on_gpu=False)
    assert capsys.readouterr().err == ""


def test_a_context_beyond_the_models_is_refused_by_name() -> None:
    yarn = tiny_config(rope_scaling=RopeScaling("yarn", 4.0, original_max_position_embeddings=512))
    check_length(yarn, 2048)
    with pytest.raises(ConfigError, match="--max-model-len 2049: the model's context is 2048"):
        check_length(yarn, 2049)
    dynamic = tiny_config(rope_scaling=RopeScaling("dynamic", 4.0))
    with pytest.raises(ConfigError, match="context is 512; dynamic rope scaling is not computed"):
        check_length(dynamic, 513)
