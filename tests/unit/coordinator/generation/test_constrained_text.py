"""The text of a constrained answer fits its constraint, whatever the tokenizer does to spaces."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coordinator.api.grpc.requests import read_request
from coordinator.api.validation.constraint import constraint_from
from coordinator.text.detokenizer import Detokenizer, leading_text_of
from engine.constraints import Compiler, Matcher, Vocabulary
from engine.pb.diptych.v1 import inference_pb2 as pb
from tests.support.tiny_tokenizer import KINDS, tiny_tokenizer, tokenizer_json

EOS = 2
CHOICES = [" yes", "no", "  the", "\u00e9 a", "\n b", " "]
SCHEMA = {"type": "object", "properties": {"a": {"enum": [" yes", "no"]}}, "required": ["a"]}


def fits(kind: str, text: str) -> bool:
    match kind:
        case "choice":
            return text in CHOICES
        case "regex":
            return bool(re.fullmatch(" {0,2}(yes|no)? ?[ab]", text))
        case "grammar":
            return text in (" a", "a", "  a")
    return json.loads(text)["a"] in (" yes", "no")


CONSTRAINTS = {
    "choice": pb.Constraint(choice=pb.Choices(choices=CHOICES)),
    "regex": pb.Constraint(regex=" {0,2}(yes|no)? ?[ab]"),
    "grammar": pb.Constraint(grammar='start: SPACE "a"\nSPACE: / {0,2}/'),
    "json_schema": pb.Constraint(json_schema=json.dumps(SCHEMA)),
}


def answer(matcher: Matcher, r: random.Random) -> list[int]:
    """Random tokens out of those that the grammar allows."""
    ids: list[int] = []
    while not matcher.ended:
        bits = np.frombuffer(matcher.library.compute_bitmask(), np.uint8)
        allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
        token = int(r.choice(allowed))
        assert matcher.advance([token]), (ids, token, allowed, matcher.error)
        if token == EOS:
            break
        ids.append(token)
    return ids


@pytest.mark.parametrize("kind", KINDS)
async def test_the_text_fits(kind: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(kind)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json(kind)))
    compiler = Compiler(Vocabulary(tmp_path, tokenizer.vocab_size, (EOS,)))
    r = random.Random(0)
    prompts = [tokenizer.encode("The worker reads"), [1], [1, 3], tokenizer.encode("yes\n")]
    for prompt in prompts:
        # Metaspace drops all spaces of a text's first token, which no grammar can state.
        drops = "metaspace" in json.dumps(tokenizer_json(kind)["decoder"]).lower()
        drops = drops and kind != "metaspace never" and not tokenizer.decode(prompt)
        for name, asked in CONSTRAINTS.items():
            if name == "json_schema" and not tokenizer.decoding.has_byte_tokens:
                continue  # not all of JSON is in the vocabulary
            made = constraint_from(read_request(pb.GenerateRequest(constraint=asked)).constraint)
            assert made
            constraint = replace(made, leading_text=leading_text_of(tokenizer, prompt, True))
            for _ in range(30 if name == "choice" else 8):
                ids = answer(await compiler.matcher(constraint), r)
                stream = Detokenizer(tokenizer, prompt=prompt)
                text = stream.push(ids) + stream.flush()
                starts = [text, " " + text, "  " + text] if drops else [text]
                assert any(fits(name, start) for start in starts), (prompt, name, text, ids)
    compiler.close()
