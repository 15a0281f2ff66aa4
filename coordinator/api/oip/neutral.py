"""Options of Triton's backends that are not served, and the values at which they do nothing. Pure.

Clients of TensorRT-LLM's and vLLM's backends send every option that their backend has, most of them
at its default. At such a value an option is passed over; at another one it is refused by name, for
the answer would be another one there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from coordinator.text import json_bounds as nesting

_ANY = None
_EMPTY: tuple[Any, ...] = ()  # nothing, "", [], and lists of these: harmless for every option
_OFF = (False,)
# By name: the values that change nothing here; `_ANY`: all of them.
NEUTRAL: Mapping[str, tuple[Any, ...] | None] = {
    # TensorRT-LLM's
    "Streaming": _OFF,
    "bad_words": _EMPTY,
    "bad_words_list": _EMPTY,
    "beam_search_diversity_rate": (0,),
    "beam_width": (1,),
    "decoder_text_input": _EMPTY,
    "draft_acceptance_threshold": (0,),
    "draft_input_ids": _EMPTY,
    "early_stopping": (0, 1),  # of beams, which are not here
    "embedding_bias": (0,),
    "embedding_bias_weights": (0,),
    "embedding_bias_words": _EMPTY,
    "guided_decoding_guide": _EMPTY,
    "guided_decoding_guide_type": _EMPTY,
    "image_url_input": _EMPTY,
    "is_return_log_probs": _OFF,
    "len_penalty": (0, 1),
    "length_penalty": (0, 1),
    "lora_task_id": _EMPTY,
    "no_repeat_ngram_size": (0, 1 << 30),
    "num_draft_tokens": (0,),
    "pad_id": _ANY,
    "prompt_ignore_length": (0,),
    "prompt_table_extra_id": (0,),
    "prompt_vocab_size": (0,),
    "return_context_logits": _OFF,
    "return_encoder_output": _OFF,
    "return_generation_logits": _OFF,
    "return_kv_cache_reuse_stats": _OFF,
    "return_log_probs": _OFF,
    "return_perf_metrics": _OFF,
    "return_stop_reason": _OFF,
    "runtime_top_p_decay": (1,),
    "runtime_top_p_min": (0, 1e-6),
    "runtime_top_p_reset_ids": (-1,),
    "stop_words_list": _EMPTY,
    "top_p_decay": (1,),
    "top_p_min": (0, 1e-6),
    "top_p_reset_ids": (-1,),
    "use_draft_logits": _OFF,
    # vLLM's
    "allowed_token_ids": _EMPTY,
    "bad_words_token_ids": _EMPTY,
    "best_of": (1,),
    "detokenize": (True,),
    "extra_args": _EMPTY,
    "flat_logprobs": _OFF,
    "image": _EMPTY,
    "logit_processors": _EMPTY,
    "logits_processors": _EMPTY,
    "lora_name": _EMPTY,
    "output_kind": _ANY,
    "skip_clone": _ANY,
    "skip_reading_prefix_cache": _OFF,
    "spaces_between_special_tokens": (True,),
    "thinking_token_budget": (-1,),
    "truncate_prompt_tokens": _EMPTY,
    "use_beam_search": _OFF,
}
_WORD_LISTS = ("bad_words_list", "stop_words_list")  # ids, and where each word ends
# What asks for the same and is served.
_INSTEAD = {
    "is_return_log_probs": "return_logprobs or logprobs",
    "return_log_probs": "return_logprobs or logprobs",
    "stop_words_list": "stop_words or stop_token_ids",
    "embedding_bias": "logit_bias",
    "embedding_bias_weights": "logit_bias",
    "embedding_bias_words": "logit_bias",
    "guided_decoding_guide": "json_schema, regex, choice or grammar",
    "guided_decoding_guide_type": "json_schema, regex, choice or grammar",
    "best_of": "n",
}


def is_neutral(name: str, value: Any) -> bool:
    """Whether `value`, of whatever carrier, changes nothing for the option `name`."""
    harmless = NEUTRAL[name]
    if harmless is None:
        return True
    if name in _WORD_LISTS and isinstance(value, list) and set(value) <= {0, -1}:
        return True  # padding, as TensorRT-LLM writes a list of no words
    plain = _plain(value)
    return plain is None or any(_same(plain, one) for one in harmless)


def instead(name: str) -> str:
    """What to do about an option at another value, for its error message."""
    if other := _INSTEAD.get(name):
        return f"expected the option {other} in its place"
    return "leave it out"


def _plain(value: Any, depth: int = 3) -> Any:
    """A value without the form of its carrier: numbers may be text; None is empty."""
    if not depth:  # no option is nested like that
        return value
    if isinstance(value, str):
        text = value.strip()
        if text in ("", "None"):
            return None
        try:
            json = text.lower() if text.lower() in ("true", "false") else text
            parsed = nesting.loads(json, may_be_deep=True)
        except ValueError:
            return text
        return text if isinstance(parsed, str) else _plain(parsed, depth - 1)
    if isinstance(value, Mapping):
        return value or None
    if isinstance(value, list | tuple):
        items = [_plain(item, depth - 1) for item in value]
        if all(item is None for item in items):
            return None
        return items[0] if all(item == items[0] for item in items) else items
    return value


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, bool | int | float):
        # A float32 has come a way, and a flag may be a number.
        with suppress(OverflowError):
            return math.isclose(value, other, rel_tol=1e-6)
    return False
