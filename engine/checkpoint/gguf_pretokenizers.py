"""How byte-level BPE vocabularies cut a text before they merge, by the name in a GGUF file.

`tokenizer.ggml.pre` names the pre-tokenizer of a model and does not describe it. The names are
llama.cpp's; the expressions are those of the models' own tokenizer.json. A name that is not here is
refused: a wrong split of digits or spaces would silently give other token ids and worse outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_Json = dict[str, Any]

_APOSTROPHES = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SYMBOLS = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_QWEN2 = rf"{_APOSTROPHES}|{_WORD}|\p{{N}}|{_SYMBOLS}"
_QWEN35 = (
    rf"{_APOSTROPHES}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_LLAMA3 = rf"{_APOSTROPHES}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}"
_MINICPM5 = rf"{_APOSTROPHES}|{_WORD}|\p{{N}}+|{_SYMBOLS}"
_SEED_CODER = rf"{_APOSTROPHES}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"


def _by_case(more: str = "", end: str = "") -> str:
    """A word ends where a capital follows small letters; `more` narrows the letters."""
    upper, lower = (
        rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{more}]",
        (rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{more}]"),
    )
    first = r"[^\r\n\p{L}\p{N}]?"
    return rf"{first}{upper}*{lower}+{end}|{first}{upper}+{lower}*{end}"


_SLASHES = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_TEKKEN = rf"{_by_case()}|\p{{N}}|{_SLASHES}"
_GPT4O = rf"{_by_case(end=_APOSTROPHES + '?')}|\p{{N}}{{1,3}}|{_SLASHES}"
_NO_HAN = r"&&[^\p{Han}]"
_KIMI = rf"[\p{{Han}}]+|{_by_case(_NO_HAN, _APOSTROPHES + '?')}|\p{{N}}{{1,3}}|{_SYMBOLS}"

_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
)
# Letters with two cases, as the first DeepSeek models list them, in ranges of code points.
_CASED = """
    41-5a 61-7a b5 c0-d6 d8-f6 f8-1ba 1bc-1bf 1c4-293 295-2af 370-373 376 377 37b-37d 37f 386
    388-38a 38c 38e-3a1 3a3-3f5 3f7-481 48a-52f 531-556 10a0-10c5 13a0-13f5 13f8-13fd 1c90-1cba
    1cbd-1cbf 1d00-1d2b 1d6b-1d77 1d79-1d9a 1e00-1f15 1f18-1f1d 1f20-1f45 1f48-1f4d 1f50-1f57
    1f59 1f5b 1f5d 1f5f-1f7d 1f80-1fb4 1fb6-1fbc 1fbe 1fc2-1fc4 1fc6-1fcc 1fd0-1fd3 1fd6-1fdb
    1fe0-1fec 1ff2-1ff4 1ff6-1ffc 2102 2107 210a-2113 2115 2119-211d 2124 2126 2128 212a-212d
    212f-2134 2139 213c-213f 2145-2149 214e 2183 2184 2c00-2c7b 2c7e-2ce4 2ceb-2cee 2cf2 2cf3
    a640-a66d a680-a69b a722-a76f a771-a787 a78b-a78e ab70-abbf fb00-fb06 fb13-fb17 ff21-ff3a
    ff41-ff5a 10400-1044f 104b0-104d3 104d8-104fb 10c80-10cb2 10cc0-10cf2 118a0-118df
    1e900-1e943
"""
_PUNCTUATION = "21-2f 3a-7e ff01-ff0f ff1a-ff5e 2018-201f 3000-3002"


def _class(ranges: str) -> str:
    """The characters of a class, of ranges of code points."""
    ends = (part.partition("-") for part in ranges.split())
    pairs = ((chr(int(first, 16)), chr(int(last or first, 16))) for first, _, last in ends)
    return "".join(f"{first}-{last}" for first, last in pairs)


_DEEPSEEK_LLM = (
    "[\r\n]",
    rf"\s?[{_class(_CASED)}]+",
    rf"\s?[{_class(_PUNCTUATION)}]+",
    r"\s+$",
    _CJK,
)
# Newlines, words, punctuation, scripts without spaces.
_DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK)
# llama.cpp's own choice for files that name no pre-tokenizer
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """What a name stands for."""

    steps: list[_Json]  # in the form of tokenizer.json
    normalizer: str | None = None
    ignore_merges: bool = False  # a piece that is a token is not merged from its parts
    add_bos: bool = False  # unless the file has a key for it


def byte_level(use_regex: bool) -> _Json:
    """The step that maps bytes to characters, with the expression of GPT-2 or without."""
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def _cut(*patterns: str) -> list[_Json]:
    """Cut at every match of each expression in turn."""
    return [
        {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False}
        for p in patterns
    ]


def _split(*patterns: str) -> list[_Json]:
    """Cut, then map bytes to characters."""
    return [*_cut(*patterns), byte_level(False)]


_DIGIT: _Json = {"type": "Digits", "individual_digits": True}
_DIGITS = [_DIGIT, byte_level(True)]
_OF_LLAMA3, _OF_QWEN2 = _split(_LLAMA3), _split(_QWEN2)


def _named(names: str, *values: Any, **more: Any) -> dict[str, PreTokenizer]:
    return dict.fromkeys(names.split(), PreTokenizer(*values, **more))


PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    # GPT-2 and its descendants
    **_named("gpt-2 phi-2 mpt olmo a.x-4.0 mellum trillion exaone4", [byte_level(True)]),
    **_named("smollm starcoder refact codeshell minerva-7b mellum2", _DIGITS),
    **_named("command-r", _DIGITS, "NFC"),
    **_named("default", _split(*_DEFAULT)),
    # cl100k: Llama 3, Phi-4 and OLMo 2 (dbrx), SmolLM3 (smaug-bpe), GLM-4
    **_named("llama-bpe llama3 llama-v3 falcon3", _OF_LLAMA3, ignore_merges=True, add_bos=True),
    **_named("dbrx smaug-bpe chatglm-bpe", _OF_LLAMA3),
    **_named("glm4 glm5", _OF_LLAMA3, ignore_merges=True),
    **_named("minicpm5", _split(r"\p{N}{1,3}", _MINICPM5), ignore_merges=True),
    **_named("seed-coder", _split(_SEED_CODER)),
    # Qwen
    **_named("qwen2 deepseek-r1-qwen megrez", _OF_QWEN2, "NFC"),
    **_named("qwen35", _split(_QWEN35), "NFC"),
    # o200k: gpt-oss, Phi-4-mini, MiniMax; Mistral's Tekken; Kimi
    **_named("gpt-4o llama4 minimax-m2", _split(_GPT4O), ignore_merges=True),
    **_named("tekken", _split(_TEKKEN), ignore_merges=True, add_bos=True),
    **_named("kimi-k2", _split(_KIMI), ignore_merges=True),
    # DeepSeek
    **_named("deepseek-llm", [*_cut(*_DEEPSEEK_LLM), _DIGIT, byte_level(False)]),
    **_named("deepseek-coder", [*_cut(*_DEEPSEEK_CODER), _DIGIT, byte_level(False)]),
    **_named("deepseek-v3", _split(*_DEEPSEEK_V3)),
}
