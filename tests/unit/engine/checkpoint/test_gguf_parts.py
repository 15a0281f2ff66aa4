"""Split GGUF files, files without the ending, and what a header shows before anything is hashed."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from unittest import mock

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from safetensors.torch import load_file

from engine.base.errors import CheckpointError
from engine.checkpoint import source
from engine.checkpoint.gguf import open_gguf
from engine.checkpoint.gguf_header import TYPES, read_header
from engine.checkpoint.gguf_weights import dequantize
from engine.checkpoint.packaged import packaged_file
from engine.checkpoint.packed import packed_file, read_packed
from engine.checkpoint.source import resolve, weights
from tests.support import tiny_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIPTYCH_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def parts(folder: Path, seed: int = 0) -> tuple[list[Path], dict[str, np.ndarray]]:
    """(the files, first to last, the weights) of a model of three parts."""
    folder.mkdir(exist_ok=True)
    expected = tiny_gguf.tiny(folder / "m.gguf", part_tensors=8, seed=seed)
    return sorted(folder.glob("m-*.gguf")), expected


def refused(model: Path, match: str) -> None:
    """The model is refused with one sentence, before a byte is hashed."""
    hashed = mock.Mock(wraps=source.file_digests)
    with (
        mock.patch.object(source, "file_digests", hashed),
        pytest.raises(CheckpointError, match=match) as error,
    ):
        resolve(str(model))
    assert "\n" not in error.value.message
    assert not hashed.called


def test_any_part_names_the_model(tmp_path: Path) -> None:
    files, expected = parts(tmp_path / "a")
    assert [f.name for f in files] == [f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    found = [resolve(str(file)) for file in files]
    assert found[0] == found[1] == found[2]
    assert (found[0].name, found[0].gguf) == ("m", files[0])
    assert [s.path for s in found[0].sources] == files
    (path,) = weights(found[0], "float32")
    loaded = load_file(path)
    assert loaded.keys() == expected.keys()
    for name, values in expected.items():
        assert np.array_equal(loaded[name].numpy(), values), name
    packed = read_packed(packed_file(found[0], "bf16"), found[0].config)
    assert len(packed.matrices) == 4 * 2 + 1


def test_the_fingerprint_is_of_all_parts(tmp_path: Path) -> None:
    files, _ = parts(tmp_path / "a")
    first = resolve(str(files[0])).fingerprint
    (tmp_path / "b").mkdir()
    for file in files:
        shutil.copy(file, tmp_path / "b" / f"other{file.name[1:]}")
    same = resolve(str(tmp_path / "b" / "other-00002-of-00003.gguf"))
    assert (same.fingerprint, same.name) == (first, "other")
    data = bytearray(files[2].read_bytes())
    data[-70] ^= 1  # of a weight
    files[2].write_bytes(data)
    assert resolve(str(files[0])).fingerprint != first


def test_a_part_that_changes_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    files, _ = parts(tmp_path)
    found = resolve(str(files[0]))
    files[2].touch()
    with pytest.raises(CheckpointError, match=r"m-00003-of-00003\.gguf: the file changed"):
        weights(found, "float32")


def test_parts_that_are_missing_or_of_others_are_named(tmp_path: Path) -> None:
    files, _ = parts(tmp_path)
    others, _ = parts(tmp_path / "others", seed=1)
    saved = files[1].read_bytes()
    files[1].unlink()
    for file in (files[0], files[2]):
        refused(file, r"m-00002-of-00003\.gguf: this part of a split GGUF file is missing \(3 in")
    shutil.copy(others[2], files[1])
    refused(files[0], r"m-00002-of-00003\.gguf: not a part of the same file as m-00001-of-00003")
    files[1].write_bytes(saved[:-100])
    refused(files[2], r"m-00002-of-00003\.gguf: truncated")
    # The number of all tensors is in every part.
    key = b"split.tensors.count" + struct.pack("<I", 5)
    at = saved.index(key) + len(key)
    files[1].write_bytes(saved[:at] + struct.pack("<i", 7) + saved[at + 4 :])
    refused(files[0], r"m-00002-of-00003\.gguf: not a part .*\[1, 3, 7\], expected \[1, 3, 20\]")


def test_names_that_do_not_fit_the_metadata(tmp_path: Path) -> None:
    files, _ = parts(tmp_path)
    renamed = tmp_path / "m-00001-of-00002.gguf"
    shutil.copy(files[0], renamed)
    refused(renamed, "part 1 of 3 of a split GGUF file by its metadata; its name must end with")
    shutil.copy(files[1], tmp_path / "second.gguf")
    refused(tmp_path / "second.gguf", "part 2 of 3 .*must end with -00002-of-00003")
    tiny_gguf.tiny(tmp_path / "whole.gguf")
    whole = (tmp_path / "whole.gguf").rename(tmp_path / "whole-00001-of-00004.gguf")
    refused(whole, r"named as part 1 of 4 of a split GGUF file, but split\.count is missing")


def test_a_file_is_known_by_its_first_letters(tmp_path: Path) -> None:
    blob = tmp_path / "sha256-0123"
    tiny_gguf.tiny(tmp_path / "m.gguf", meta={"general.name": "My Model  7B"})
    (tmp_path / "m.gguf").rename(blob)
    found = resolve(str(blob))
    assert (found.name, found.gguf) == ("My-Model-7B", blob)
    tiny_gguf.tiny(tmp_path / "m.gguf")
    shutil.copy(tmp_path / "m.gguf", blob)
    assert resolve(str(blob)).name == "sha256-0123"
    assert resolve(str(tmp_path / "m.gguf")).fingerprint == resolve(str(blob)).fingerprint
    blob.write_bytes(b"PK\x03\x04 and more")
    refused(blob, "sha256-0123: neither a folder in Hugging Face layout nor a GGUF file")


def test_a_type_that_is_not_read_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    tokens, merges = tiny_gguf.byte_level_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 64), np.float64))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file):
        write()
    writer.write_tensors_to_file()
    writer.close()
    refused(tmp_path / "m.gguf", r"tensor token_embd\.weight has type 28.*known are F32, F16")


def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    """Rows beyond the vocabulary are padding, tokens beyond the rows are of another model."""
    tiny_gguf.tiny(tmp_path / "m.gguf")
    num_rows = len(tiny_gguf.byte_level_vocab()[0])
    extra = {"token_embd.weight": np.zeros((num_rows - 1, 64), np.float32)}
    tiny_gguf.tiny(tmp_path / "m.gguf", extra=extra)
    refused(tmp_path / "m.gguf", f"{num_rows} tokens and the embedding {num_rows - 1} rows")
    extra = {"token_embd.weight": np.zeros((num_rows + 20, 64), np.float32)}
    tiny_gguf.tiny(tmp_path / "m.gguf", extra=extra)
    assert resolve(str(tmp_path / "m.gguf")).config.vocab_size == num_rows + 20


def test_types_are_those_that_the_library_reads() -> None:
    for number, (name, num_values, num_bytes) in TYPES.items():
        kind = GGMLQuantizationType(number)
        assert (kind.name, GGML_QUANT_SIZES[kind]) == (name, (num_values, num_bytes))
        if name not in ("F32", "F16"):
            zeros = np.zeros((1, num_bytes), np.uint8)
            assert dequantize(zeros, kind, name).shape == (1, num_values)


def test_metadata_and_tensors_equal_those_of_the_library() -> None:
    """The default model's file, read by `gguf`."""
    path = packaged_file("smollm2")
    ours, theirs = open_gguf(path), gguf.GGUFReader(path)
    fields = {key: f.contents() for key, f in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.meta == fields
    assert read_header(path).arrays == {}
    for tensor, other in zip(ours.tensors, theirs.tensors, strict=True):
        assert (tensor.name, tensor.tensor_type) == (other.name, other.tensor_type)
        assert tensor.shape == tuple(map(int, other.shape))
        assert tensor.data.dtype == other.data.dtype
        assert np.array_equal(tensor.data, other.data)
