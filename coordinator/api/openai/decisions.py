"""What becomes of each option of OpenAI's and vLLM's clients: the one table.

    SERVED          read and obeyed; a wrong type or value is refused by name
    NEUTRAL         accepted at values at which it does nothing here, else refused by name
    IGNORED         of any value: it changes no answer of such a model, at OpenAI or vLLM
    anything else   refused as unknown, as OpenAI does

A test holds it against the signatures of the installed `openai` client and against what is read.
"""

from __future__ import annotations

from typing import Any

_BOTH = {
    "cache_salt",
    "frequency_penalty",
    "guided_choice",
    "guided_grammar",
    "guided_json",
    "guided_regex",
    "ignore_eos",
    "include_stop_str_in_output",
    "logit_bias",
    "logprobs",
    "max_tokens",
    "min_p",
    "min_tokens",
    "model",
    "n",
    "presence_penalty",
    "priority",
    "prompt_logprobs",
    "repetition_penalty",
    "request_id",
    "response_format",
    "return_token_ids",
    "return_tokens_as_token_ids",
    "seed",
    "skip_special_tokens",
    "stop",
    "stop_token_ids",
    "stream",
    "stream_options",
    "structured_outputs",
    "temperature",
    "top_k",
    "top_p",
}
_CHAT_ONLY = {
    "max_completion_tokens",
    "messages",
    "parallel_tool_calls",
    "tool_choice",
    "tools",
    "top_logprobs",
}
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
SERVED = {CHAT: frozenset(_BOTH | _CHAT_ONLY), COMPLETION: frozenset(_BOTH | {"echo", "prompt"})}

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "early_stopping": (False,),
    "ec_transfer_params": ({},),
    "kv_transfer_params": ({},),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
    "repetition_detection": (),
    "routed_experts_prompt_start": (0,),
    "thinking_token_budget": (-1,),
    "truncate_prompt_tokens": (),
    "truncation_side": (),
    "use_beam_search": (False,),
    "watermarking": (False,),
    "logprob_token_ids": (),
}
CHAT_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "audio": (),
    "best_of": (1,),  # and `n`
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("auto", "none"),  # of no functions
    "functions": ([],),
    "modalities": (["text"], []),
    "return_prompt_text": (False,),
    "web_search_options": (),
}
COMPLETION_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (True,),
    "best_of": (1,),  # and `n`
    "prompt_embeds": (),
    "suffix": ("",),
    "return_prompt_text": (False,),
}
IGNORED = frozenset(
    {
        # OpenAI's
        "metadata",
        "moderation",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "reasoning_effort",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
        # vLLM's
        "guided_decoding_backend",
        "include_reasoning",
        "return_mm_kwargs",
        "return_token_offsets",
        "session_id",
        "spaces_between_special_tokens",
        "stream_interval",
        "vllm_xargs",
    }
)
