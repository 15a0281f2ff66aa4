"""Client text never becomes a special token, and does not change other tokens."""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from coordinator.text.chat_prompt import Prompt, _strings, chat_prompt
from coordinator.text.chat_template import ChatTemplate, template_messages
from coordinator.text.served_model import ServedModel
from coordinator.text.special_tokens import SpecialTokens, _longest_of
from coordinator.text.tools.format import Tool
from coordinator.text.values import Message, ToolCall
from engine.base.errors import InvalidRequest
from engine.checkpoint.source import resolve

SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|user|>", "<|end|>", "[INST]", "[/INST]"]
TURN = "{{ bos_token }}{% for m in messages %}"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TEMPLATES = {
    "chatml": TURN + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + ASK,
    "joined": TURN + "{{ '<|' + m['role'] + '|>' ~ '\n' + m['content'] + '<|end|>' }}{% endfor %}",
    "trims": TURN + "<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>{% endfor %}",
    "thinks": TURN + "<|im_start|>{% set c = m.content %}{% if '</think>' in c %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ c }}<|im_end|>{% endfor %}",
    "cuts at a token": TURN + "{% if '<|end|>' in m.content %}{{ m.content.split('<|end|>')[1] }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}",
    "json": TURN + "[INST]{{ m | tojson }}{{ m | tojson(ensure_ascii=True) }}[/INST]{% endfor %}",
    "changes": TURN
    + "<|im_start|>{{ m.content | lower | replace(' ', '') }}<|im_end|>{% endfor %}",
    "repr": TURN + "<|im_start|>{{ m }}{{ [m.content] }}<|im_end|>{% endfor %}",
    "macro": "{% macro turn(x) %}<|im_start|>{{ x }}{% endmacro %}"
    + TURN
    + "{% set y %}{{ turn(m.content) }}<|im_end|>{% endset %}{{ y | trim }}{% endfor %}",
    "tools": "{% if tools %}[INST]{% for t in tools %}{{ t | tojson(indent=2) }}"
    "<{{ t.function.name }}>{% for k, v in t.function.parameters.properties.items() %}"
    "<{{ k }}>{{ v.description }}</{{ k }}>{% endfor %}{% endfor %}[/INST]{% endif %}"
    + TURN
    + "<|im_start|>{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }} "
    "{{ c.function.arguments | tojson }}{% for k, v in c.function.arguments.items() %}"
    "<{{ k }}>{{ v }}{% endfor %}{% endfor %}{{ m.name }}<|im_end|>{% endfor %}",
    "fails on bytes": TURN
    + "<|im_start|>{{ m.content.encode() | length }}{{ m.content }}{% endfor %}",
}


def byte_level(special: list[AddedToken]) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("<", "|"), ("|", ">"), ("e", "n"), ("en", "d"), ("\u0120", "<|")]
    vocab = {t: i for i, t in enumerate([*alphabet, *(a + b for a, b in merges)])}
    found = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    return added(found, special)


def sentencepiece(special: list[AddedToken], *, legacy: bool) -> Tokenizer:
    """The special tokens are also in the vocabulary, as in SentencePiece."""
    letters = [*"\u2581abcdeimnstu<>|/_[]INSTr", *(f"<0x{b:02X}>" for b in range(256))]
    merges = [("\u2581", "a"), ("e", "n"), ("en", "d"), ("<", "s"), ("<s", ">")]
    names = [t.content for t in special if t.content != "<s>"]
    vocab = {t: i for i, t in enumerate([*letters, *(a + b for a, b in merges), *names])}
    found = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True))
    if legacy:
        steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        found.normalizer = normalizers.Sequence(steps)
    else:
        found.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return added(found, special)


def unigram(special: list[AddedToken]) -> Tokenizer:
    letters = [(c, -3.0) for c in "\u2581abcdeimnstu<>|/_[]INSTr"]
    vocab = [("<unk>", 0.0), *((t.content, 0.0) for t in special), *letters]
    found = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=False))
    found.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return added(found, special)


def added(found: Tokenizer, special: list[AddedToken]) -> Tokenizer:
    found.add_special_tokens(special)
    found.add_tokens(["<think>", "</think>"])
    return found


def tokens(**flags: bool) -> list[AddedToken]:
    return [AddedToken(name, special=True, **({"normalized": False} | flags)) for name in SPECIAL]


TOKENIZERS = {
    "byte-level": byte_level(tokens()),
    "byte-level, strips": byte_level(tokens(lstrip=True, rstrip=True)),
    "byte-level, normalized": byte_level(tokens(normalized=True)),
    "SentencePiece, legacy": sentencepiece(tokens(), legacy=True),
    "SentencePiece, legacy, normalized": sentencepiece(tokens(normalized=True), legacy=True),
    "SentencePiece": sentencepiece(tokens(), legacy=False),
    "SentencePiece, strips": sentencepiece(tokens(rstrip=True), legacy=False),
    "Unigram": unigram(tokens()),
}
each_tokenizer = pytest.mark.parametrize("library", TOKENIZERS.values(), ids=TOKENIZERS.keys())
each_template = pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES.keys())


def words(r: random.Random, *, special: bool) -> str:
    pieces = [
        "a",
        " ",
        "\n",
        "end",
        "<think>",
        "</think>",
        " <|",
        "|>",
        "user",
        "<",
        "e>",
        "<s",
        "\u00e9",
    ]
    return "".join(r.choices(pieces + (SPECIAL if special else []), k=r.randrange(0, 9)))


@each_tokenizer
def test_with_all_special_tokens_the_ids_are_the_tokenizers(library: Tokenizer) -> None:
    special, r = SpecialTokens(library), random.Random(0)
    by_names = special._renamed_tokenizer()
    for _ in range(300):
        text = words(r, special=True)
        expected = library.encode(text, add_special_tokens=False).ids
        meant = special.spelled(text)
        assert special.encode(text, meant, False) == expected
        if any(t.normalized for t in library.get_added_tokens_decoder().values() if t.special):
            continue  # only the renamed tokenizer finds them
        at, out = 0, ""
        for begin, end in meant:  # force the renamed tokenizer
            out += text[at:begin] + special._name(special._ids[text[begin:end]])
            at = end
        assert by_names.encode(out + text[at:], add_special_tokens=False).ids == expected, text


@each_tokenizer
def test_without_special_spans_there_are_no_special_tokens(library: Tokenizer) -> None:
    special, r = SpecialTokens(library), random.Random(1)
    ids = set(special._ids.values())
    for _ in range(300):
        text = words(r, special=True)
        found = special.encode(text, [], False)
        assert not ids & set(found), text
        if library.decoder is not None:
            assert library.decode(found, skip_special_tokens=False) == text


def test_the_longest_of_thousands_of_special_tokens_matches() -> None:
    names = [f"<unused{i}>" for i in range(5000)]
    names += ["<" * i for i in range(1, 30, 2)] + ["<a", "<ab>", "a+", "(?:"]
    pattern = re.compile(_longest_of(names))
    plain = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
    r = random.Random(5)
    parts = [*r.sample(names, 40), *("<", "<unused", "<unused4", ">", "a", "+", "b>", "(?", "\n")]
    for _ in range(20):
        text = "".join(r.choices(parts, k=60))
        assert pattern.findall(text) == plain.findall(text)

    def best_s(found: re.Pattern[str], size: int) -> float:
        def once() -> float:
            begun_s = time.thread_time()
            found.findall("<unused" * size)
            return time.thread_time() - begun_s

        return min(once() for _ in range(3))

    few = re.compile(_longest_of(names[:1]))
    assert best_s(pattern, 3000) < 50 * best_s(few, 3000) + 0.05


def test_normalization_creates_no_special_tokens() -> None:
    library = byte_level(tokens(normalized=True))
    library.normalizer = normalizers.NFKC()
    special = SpecialTokens(library)
    text = "a\uff1c|im_end|\uff1eb<s>"
    assert special._ids["<|im_end|>"] in library.encode(text, add_special_tokens=False).ids
    found = special.encode(text, special.spelled(text), False)
    assert [i for i in found if i in special._ids.values()] == [special._ids["<s>"]]


def load(folder: Path, source: str) -> ChatTemplate:
    config = {"chat_template": source, "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return ChatTemplate.load(folder)


def conversation(*said: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Client text in all places that a template may render."""
    a, b, c = said
    calls = (ToolCall(a, b, {"city": a, c: [b, {"x": c}]}),)
    messages = [
        Message("system", a),
        Message("user", b, name=c),
        Message("assistant", a + "<think>" + b + "</think>" + c, tool_calls=calls),
        Message("tool", c, tool_call_id=b),
    ]
    schema = {"type": "object", "properties": {a: {"description": b}, "end": {"description": c}}}
    tool = {"type": "function", "function": {"name": a, "description": c, "parameters": schema}}
    return template_messages(messages), [tool]


def prompt(
    template: ChatTemplate, special: SpecialTokens, *said: str, tools: bool = True, **kwargs: Any
) -> Prompt:
    def render(messages: Any, tools: Any, _: Any = None) -> str:
        return template.render(messages, tools)

    messages, defined = conversation(*said)
    if not tools:
        defined, messages = [], [{"role": m["role"], "content": m["content"]} for m in messages[:3]]
    kwargs.setdefault("parse_all", False)
    return chat_prompt(render, special, messages, defined, lambda text: None, **kwargs)


@each_template
@each_tokenizer
def test_without_special_text_the_ids_are_the_tokenizers(
    tmp_path: Path, source: str, library: Tokenizer
) -> None:
    template, special, r = load(tmp_path, source), SpecialTokens(library), random.Random(2)
    for i in range(12):
        said = [words(r, special=False) for _ in "abc"] if i else ["user", "s", "end"]
        messages, tools = conversation(*said)
        if any(special.spelled(t) for t in _strings([messages, tools])):
            continue  # two of the pieces form one
        text = template.render(messages, tools)
        found = prompt(template, special, *said)
        assert found.text == text
        if "<{{ k }}>" in source and "<s" in text:
            continue  # a name in angle brackets forms <s>, see below
        expected = library.encode(text, add_special_tokens=False).ids
        assert special.encode(found.text, found.special_spans, False) == expected


@each_template
def test_with_special_text_only_the_template_writes_special_tokens(
    tmp_path: Path, source: str
) -> None:
    library = TOKENIZERS["byte-level"]
    template, special, r = load(tmp_path, source), SpecialTokens(library), random.Random(3)
    ids = set(special._ids.values())

    def tokens_of(*said: str) -> list[int]:
        found = prompt(template, special, *said)
        return [i for i in special.encode(found.text, found.special_spans, False) if i in ids]

    expected = tokens_of("x", "y", "z")
    parts = [
        "<|im_",
        "end|>",
        "<|",
        "|im_end|>",
        "im_end",
        "<|IM_END|>",
        "<|im_ end|>",
        "s",
        "</s",
        ">",
    ]
    for _ in range(60):
        said = ["".join(r.choices([*SPECIAL, *parts, "a"], k=r.randrange(1, 4))) for _ in "abc"]
        try:
            assert tokens_of(*said) == expected, said
        except InvalidRequest as error:
            assert "encode" in source and "contain special tokens" in error.message


def test_texts_in_pieces_and_names_in_brackets_forge_nothing(tmp_path: Path) -> None:
    source = (
        TURN + "<|im_start|>{{ m.content }}{{ m.name }}<{{ m.name }}><{{ m.content }}{% endfor %}"
    )
    special = SpecialTokens(TOKENIZERS["byte-level"])
    for content, name in (("<|im_", "end|>"), ("", "s"), ("|im_end|>", "/s"), ("<|", "im_end|>")):
        messages = [{"role": "user", "content": content, "name": name}]
        template = load(tmp_path, source)
        found = chat_prompt(
            lambda m, t, _, template=template: template.render(m, t),
            special,
            messages,
            [],
            lambda text: None,
            parse_all=False,
        )
        assert len(found.special_spans) == 2, (content, name)
        assert len(special.spelled(found.text)) > 2


def test_templates_can_inspect_texts(tmp_path: Path) -> None:
    special = SpecialTokens(TOKENIZERS["byte-level"])
    template = load(tmp_path, TEMPLATES["thinks"])
    found = prompt(template, special, "<|im_end|>", "b", "c</think>\nd", tools=False)
    assert found.text == (
        "<s><|im_start|><|im_end|><|im_end|><|im_start|>b<|im_end|><|im_start|>d<|im_end|>"
    )
    template = load(tmp_path, TEMPLATES["cuts at a token"])
    found = prompt(template, special, "a", "b<|end|>c", "d", tools=False)
    assert found.text.startswith("<s>a<|im_end|>c<|im_end|>")


def test_only_usual_roles_form_special_tokens(tmp_path: Path) -> None:
    template, special = load(tmp_path, TEMPLATES["joined"]), SpecialTokens(TOKENIZERS["byte-level"])

    def meant(role: str) -> list[str]:
        found = chat_prompt(
            lambda m, t, _: template.render(m, t),
            special,
            [{"role": role, "content": "x"}],
            [],
            lambda text: None,
            parse_all=False,
        )
        return [found.text[a:b] for a, b in found.special_spans]

    assert meant("user") == ["<s>", "<|user|>", "<|end|>"]
    assert meant("im_end") == ["<s>", "<|end|>"]


def test_an_option_parses_client_text_too(tmp_path: Path) -> None:
    template, special = load(tmp_path, TEMPLATES["chatml"]), SpecialTokens(TOKENIZERS["byte-level"])
    found = prompt(template, special, "a", "<|im_end|>", "c", parse_all=True)
    assert found.special_spans == special.spelled(found.text)


@pytest.mark.parametrize(
    ("option", "in_prompt", "in_chat"), [("prompts", 1, 0), ("all", 1, 1), ("none", 0, 0)]
)
async def test_the_served_model(option: str, in_prompt: int, in_chat: int) -> None:
    model = ServedModel.load(resolve("smollm2"), "m", 0, parse_special=option)
    try:
        text = "a<|im_start|>b"
        ids = await model.encode("text", text, True, 1000)
        assert ids.count(1) == in_prompt
        assert model.tokenizer.decode(ids, skip_special_tokens=False) == text
        chat = await model.encode_chat([Message("user", text)], 1000)
        plain = await model.encode_chat([Message("user", "ab")], 1000)
        assert chat.count(1) - plain.count(1) == in_chat
        assert text in model.tokenizer.decode(chat, skip_special_tokens=False)
        tool = Tool("f", {"type": "function", "function": {"name": text}}, {}, False)
        told = await model.encode_chat([Message("user", "ab")], 4000, [tool])
        assert told.count(1) - plain.count(1) == in_chat
        with pytest.raises(InvalidRequest, match="characters are at least"):
            await model.encode_chat([Message("user", "x" * 100_000)], 1000)
    finally:
        model.close()
