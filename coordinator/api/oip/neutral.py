"""Options of Triton's backends that are not served, and the values at which they do nothing. Pure.

Clients of TensorRT-LLM's and vLLM's backends send every option of their backend, most of them at
the default. At a value without effect an option is ignored. At another value it is refused by name,
since the output would differ there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from coordinator.text import json_bounds as nesting

Values = tuple[Any, ...] | None  # None: all of them


def _all(names: str, values: Values) -> dict[str, Values]:
    return dict.fromkeys(names.split(), values)


# By name, TensorRT-LLM's first: the values that change nothing here. Nothing, "", [], and lists of
# these are harmless for every option.
NEUTRAL: Mapping[str, Values] = {
    **_all("bad_words bad_words_list decoder_text_input draft_input_ids image_url_input", ()),
    **_all("embedding_bias_words guided_decoding_guide guided_decoding_guide_type", ()),
    **_all("lora_task_id stop_words_list", ()),
    **_all("Streaming is_return_log_probs return_context_logits return_encoder_output", (False,)),
    **_all("return_generation_logits return_kv_cache_reuse_stats return_log_probs", (False,)),
    **_all("return_perf_metrics return_stop_reason use_draft_logits", (False,)),
    **_all("beam_search_diversity_rate draft_acceptance_threshold embedding_bias", (0,)),
    **_all("embedding_bias_weights num_draft_tokens prompt_ignore_length", (0,)),
    **_all("prompt_table_extra_id prompt_vocab_size", (0,)),
    **_all("beam_width runtime_top_p_decay top_p_decay", (1,)),
    **_all("early_stopping len_penalty length_penalty", (0, 1)),  # of beams, which are not here
    **_all("runtime_top_p_min top_p_min", (0, 1e-6)),
    **_all("runtime_top_p_reset_ids top_p_reset_ids", (-1,)),
    "no_repeat_ngram_size": (0, 1 << 30),
    # vLLM's
    **_all("allowed_token_ids bad_words_token_ids extra_args image logit_processors", ()),
    **_all("logits_processors lora_name truncate_prompt_tokens", ()),
    **_all("flat_logprobs skip_reading_prefix_cache use_beam_search", (False,)),
    **_all("detokenize spaces_between_special_tokens", (True,)),
    **_all("output_kind pad_id skip_clone", None),
    "best_of": (1,),
    "thinking_token_budget": (-1,),
}
_WORD_LISTS = ("bad_words_list", "stop_words_list")  # ids, and where each word ends
# Options with the same effect that are served.
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
    """Whether `value` has no effect for the option `name`."""
    harmless = NEUTRAL[name]
    if harmless is None:
        return True
    if name in _WORD_LISTS and isinstance(value, list) and set(value) <= {0, -1}:
        return True  # padding, as TensorRT-LLM writes a list of no words
    plain = _plain(value)
    return plain is None or any(_same(plain, one) for one in harmless)


def instead(name: str) -> str:
    """The advice in the error message for an option at another value."""
    if other := _INSTEAD.get(name):
        return f"expected the option {other} in its place"
    return "leave it out"


def _plain(value: Any, depth: int = 3) -> Any:
    """A value without the form of its carrier: numbers may be text; None: empty."""
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
        # A float32 is rounded, and a flag may be a number.
        with suppress(OverflowError):
            return math.isclose(value, other, rel_tol=1e-6)
    return False
