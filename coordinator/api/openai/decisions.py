"""How each option of OpenAI's and vLLM's clients is treated.

    served          declared in models.py, read and obeyed; a wrong type or value is refused by name
    NEUTRAL         accepted at values at which it does nothing here, else refused by name
    IGNORED         of any value: it changes no output of such a model, at OpenAI or vLLM
    anything else   refused as unknown, as OpenAI does

A test compares it with the signatures of the installed `openai` client and with what is read.
"""

from __future__ import annotations

from typing import Any

Values = tuple[Any, ...]  # at which an option does nothing; null is always one


def _all(names: str, *values: Any) -> dict[str, Values]:
    return dict.fromkeys(names.split(), values)


NEUTRAL: dict[str, Values] = {
    **_all("allowed_token_ids bad_words logits_processors", []),
    **_all("ec_transfer_params kv_transfer_params media_io_kwargs mm_processor_kwargs", {}),
    **_all("early_stopping use_beam_search watermarking", False),
    **_all("guided_whitespace_pattern logprob_token_ids repetition_detection structural_tag"),
    **_all("truncate_prompt_tokens truncation_side"),
    "length_penalty": (1.0,),
    "routed_experts_prompt_start": (0,),
    "thinking_token_budget": (-1,),
}
CHAT_NEUTRAL: dict[str, Values] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "audio": (),
    "best_of": (1,),  # and `n`
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("auto", "none"),  # of no functions
    "functions": ([],),
    "modalities": (["text"], []),
    "return_prompt_text": (False,),
    "web_search_options": (),
}
COMPLETION_NEUTRAL: dict[str, Values] = {
    "add_special_tokens": (True,),
    "best_of": (1,),  # and `n`
    "prompt_embeds": (),
    "suffix": ("",),
    "return_prompt_text": (False,),
}
IGNORED = frozenset(
    {
        # OpenAI's
        **_all("metadata moderation prediction prompt_cache_key prompt_cache_options"),
        **_all("prompt_cache_retention safety_identifier service_tier store"),
        **_all("user verbosity"),
        # vLLM's
        **_all("guided_decoding_backend include_reasoning return_mm_kwargs return_token_offsets"),
        **_all("session_id spaces_between_special_tokens stream_interval vllm_xargs"),
    }
)
TOKENIZE_NEUTRAL: dict[str, Values] = {"return_token_strs": (False,)}
TOKENIZE_CHAT_NEUTRAL: dict[str, Values] = {
    **TOKENIZE_NEUTRAL,
    "add_special_tokens": (False,),
    "chat_template": (),
    "continue_final_message": (False,),
}
TOKENIZE_IGNORED = ("media_io_kwargs", "mm_processor_kwargs")
