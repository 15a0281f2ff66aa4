"""Folders and repositories that are not a model to serve, and what they are instead.

All functions take names of files, so that a hub's repository is judged before it is fetched.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import msgspec

from engine.base.errors import CheckpointError
from engine.checkpoint.added_tokens import TOKENIZER
from engine.checkpoint.gguf_parts import PART
from engine.checkpoint.jsonfile import read_json
from engine.checkpoint.shards import read_header
from engine.models.config import ModelConfig

# A file that only such folders have -> what the folder is.
_BY_FILE = {
    "adapter_config.json": "a PEFT adapter; it names its base model, and adapters are not served",
    "model_index.json": "a pipeline of diffusers; only models that write text are served",
    "modules.json": "an encoder of sentence-transformers; only models that write text are served",
}
_DRAFT_HEAD = "a draft head (EAGLE), which is not a model of its own; name the model that it is for"
_MISTRAL = "params.json"


class _Vocabulary(msgspec.Struct):
    vocab: Any = ()


class _TokenizerJson(msgspec.Struct):
    """The part of tokenizer.json that is parsed; the rest is skipped."""

    model: _Vocabulary | None = None


def refuse_other_kinds(where: Path | str, names: Collection[str]) -> None:
    """Raise CheckpointError if the names of a folder's files show that it is something else."""
    for file, what in _BY_FILE.items():
        if file in names:
            raise CheckpointError(f"{where}: {what} ({file})")
    if "config.json" in names:
        return
    if _MISTRAL in names:
        raise CheckpointError(
            f"{where}: a model in Mistral's own format ({_MISTRAL}), which is not read; "
            "the same model in Hugging Face layout has a config.json"
        )
    if TOKENIZER in names:
        raise CheckpointError(f"{where}: a tokenizer without a model; config.json is missing")


def refuse_gguf_folder(where: Path, names: Collection[str]) -> None:
    """Raise CheckpointError for a folder of GGUF files, of which one must be named."""
    if {"config.json", TOKENIZER} <= set(names):
        return
    files = [name for name in sorted(names) if name.endswith(".gguf")]
    models = [n for n in files if (part := PART.search(n)) is None or int(part[1]) == 1]
    if files:
        raise CheckpointError(
            f"{where}: a folder of GGUF files; name one of them: {', '.join(models or files)}"
        )


def refuse_draft_heads(folder: Path, shards: Iterable[Path]) -> None:
    """Raise CheckpointError if configuration or weights are those of an EAGLE head."""
    config = read_json(folder / "config.json")
    architectures = str(config.get("architectures", "")).lower()
    if "eagle" in architectures or "draft_vocab_size" in config:
        raise CheckpointError(f"{folder}: {_DRAFT_HEAD}")
    names = {entry.name for shard in shards for entry in read_header(shard)}
    if "fc.weight" in names:
        raise CheckpointError(f"{folder}: {_DRAFT_HEAD} (tensor fc.weight)")


def check_vocabulary(folder: Path, config: ModelConfig) -> None:
    """Raise CheckpointError where words of the tokenizer have no row in the embedding.

    Further rows are padding. An added token may lie behind the last row: a text model has no use
    for the tokens of pictures, and they are refused in a prompt.
    """
    path = folder / TOKENIZER
    try:
        model = msgspec.json.decode(path.read_bytes(), type=_TokenizerJson).model
    except (OSError, msgspec.MsgspecError):
        return  # the reader of the file reports the error
    vocab = model.vocab if model else ()
    if isinstance(vocab, dict):
        highest = max((i for i in vocab.values() if isinstance(i, int)), default=-1)
    else:
        highest = len(vocab) - 1 if isinstance(vocab, list) else -1
    if highest >= config.vocab_size:
        raise CheckpointError(
            f"{path}: the vocabulary has ids up to {highest} and the embedding of config.json "
            f"{config.vocab_size} rows; they are not of one model"
        )
