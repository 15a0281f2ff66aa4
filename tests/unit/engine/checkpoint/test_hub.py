"""GGUF files of the hub: which file a name means, and what is fetched of it, from a hub that runs
here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.base.errors import CheckpointError
from engine.checkpoint.hub import choose
from tests.support import tiny_gguf
from tests.support.fake_hub import FakeHub
from tests.support.hf_folder import CONFIG, folder

REPOSITORY = "owner/tiny-GGUF"
RESOLVE = """
import sys
from engine.checkpoint.source import resolve
from engine.base.errors import CheckpointError
for model in sys.argv[1:]:
    try:
        found = resolve(model)
        print(found.name, found.gguf.name if found.gguf else "-", len(found.sources))
    except CheckpointError as error:
        print(error.message)
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    (tmp_path / "hub" / REPOSITORY).mkdir(parents=True)
    with FakeHub(tmp_path / "hub").running() as running:
        yield running


def ask(hub: FakeHub, *models: str, offline: bool = False) -> list[str]:
    """What resolve gives for each, in a process that knows this hub alone."""
    home = hub.root.parent
    env = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home / "home"),
        "DIPTYCH_CACHE_DIR": str(home / "cache"),
        "HF_HUB_OFFLINE": str(int(offline)),
    }
    env.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-c", RESOLVE, *models]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(models)
    return lines


def test_a_quantisation_is_found_by_its_name(hub: FakeHub) -> None:
    place = hub.root / REPOSITORY
    tiny_gguf.tiny(place / "tiny-Q8_0.gguf")
    (place / "F32").mkdir()
    tiny_gguf.tiny(place / "F32" / "tiny-F32.gguf", part_tensors=8)
    assert ask(hub, f"{REPOSITORY}:q8_0") == ["tiny-Q8_0 tiny-Q8_0.gguf 1"]
    assert {Path(name).name for name in hub.sent} == {"tiny-Q8_0.gguf"}, "no other file"
    hub.sent.clear()
    f32 = "tiny-F32 tiny-F32-00001-of-00003.gguf 3"
    assert ask(hub, f"{REPOSITORY}:f32") == [f32]
    assert len(hub.sent) == 3
    hub.sent.clear()
    assert ask(hub, f"{REPOSITORY}:F32", offline=True) == [f32]
    there = "there are F32, Q8_0"
    (place / "config.json").write_text(json.dumps(CONFIG))  # some repositories have it beside them
    assert ask(hub, *(f"{REPOSITORY}{end}" for end in (":F32", ":Q4_K_M", ""))) == [
        f32,
        f"{REPOSITORY}: no GGUF file of quantisation 'Q4_K_M'; {there}",
        f"{REPOSITORY}: holds GGUF files; name one by its quantisation, {REPOSITORY}:F32 ({there})",
    ]
    assert set(hub.sent) == {f"{REPOSITORY}/config.json"}, "what was fetched stays"


def test_what_the_header_tells_goes_before_the_weights(hub: FakeHub) -> None:
    path = hub.root / REPOSITORY / "big-Q4_0.gguf"
    tiny_gguf.tiny(path, arch="falcon")
    with path.open("ab") as file:
        file.truncate(64 << 20)  # as if its tensors were large
    (error,) = ask(hub, f"{REPOSITORY}:Q4_0")
    assert error.startswith(f"{REPOSITORY}/big-Q4_0.gguf: architecture 'falcon' is not supported")
    assert sum(hub.sent.values()) < 16 << 20
    path.write_bytes(b"GGUF\3\0\0\0 and no more")
    (error,) = ask(hub, f"{REPOSITORY}:Q4_0")
    assert "truncated or damaged GGUF file on the hub" in error


def test_repositories_that_are_no_models_are_named(hub: FakeHub) -> None:
    named = {
        "adapter_config.json": "a PEFT adapter",
        "params.json": "Mistral's own format",
        "tokenizer.json": "a tokenizer without a model",
        "notes.txt": "this repository of the hub has no config.json",
    }
    for file in named:
        place = hub.root / "owner" / file.partition(".")[0]
        place.mkdir()
        (place / file).write_text("{}")
        (place / "model.safetensors").write_bytes(bytes(1000))
    models = [f"owner/{file.partition('.')[0]}" for file in named]
    errors = ask(hub, *models, "owner/nothing:Q4_0", "owner/nothing")
    for error, part in zip(errors, [*named.values(), "404", "404"], strict=True):
        assert part in error
    assert not any("safetensors" in name for name in hub.sent)


def test_a_folder_of_the_hub_is_fetched(hub: FakeHub) -> None:
    folder(hub.root / "owner" / "model")
    other = folder(hub.root / "owner" / "other")
    config = CONFIG | {"architectures": ["MambaForCausalLM"]}
    (other / "config.json").write_text(json.dumps(config))
    found, error = ask(hub, "owner/model", "owner/other")
    assert found == "model - 1"
    assert "MambaForCausalLM" in error
    assert "owner/other/model.safetensors" not in hub.sent


FILES = [
    *("README.md", "config.json", "mmproj-F16.gguf", "imatrix-Q4_K_M.gguf", "a-Q4_K_M.gguf"),
    *(
        "a-UD-Q4_K_M.gguf",
        "b.Q5_0.gguf",
        "c-q5_0.gguf",
        "a-IQ4_XS.gguf",
        "a-BF16-00001-of-00002.gguf",
    ),
    *("a-BF16-00002-of-00002.gguf", "Q6_K/a-Q6_K-00002-of-00002.gguf", "plain.gguf"),
    *("a-F16/a-F16-00001-of-00002.gguf", "gpt-oss-mxfp4.gguf"),
]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("Q4_K_M", ["a-Q4_K_M.gguf"]),
        ("ud-q4_k_m", ["a-UD-Q4_K_M.gguf"]),
        ("iq4_xs", ["a-IQ4_XS.gguf"]),
        ("MXFP4", ["gpt-oss-mxfp4.gguf"]),
        ("plain", ["plain.gguf"]),
        ("b.Q5_0.gguf", ["b.Q5_0.gguf"]),
        ("BF16", ["a-BF16-00001-of-00002.gguf", "a-BF16-00002-of-00002.gguf"]),
        ("Q5_0", "2 GGUF files of quantisation 'Q5_0', b.Q5_0.gguf, c-q5_0.gguf"),
        ("F16", "a-F16/a-F16-00002-of-00002.gguf is missing, a part of a-F16/a-F16-00001"),
        ("Q6_K", "no GGUF file of quantisation 'Q6_K'; there are BF16, F16, IQ4_XS, Q4_K_M"),
    ],
)
def test_which_file_a_name_means(wanted: str, expected: list[str] | str) -> None:
    if isinstance(expected, list):
        assert choose("owner/x", FILES, wanted) == expected
        return
    with pytest.raises(CheckpointError) as error:
        choose("owner/x", FILES, wanted)
    assert expected in error.value.message


def test_a_repository_without_gguf_files() -> None:
    with pytest.raises(CheckpointError, match="'Q4_0'; it has no GGUF files"):
        choose("owner/x", ["config.json"], "Q4_0")
