"""The forms of 71 real chat templates, against a table that was written from reading them."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from coordinator.text.chat_template import ChatTemplate
from coordinator.text.reasoning import detect_reasoning
from coordinator.text.tools.detection import detect
from tests.models.downloads import llamacpp_source

# Template -> the form of its calls.
TABLE = {
    "Apertus-8B-Instruct": "apertus",
    "Apriel-1.6-15b-Thinker-fixed": "apriel",
    "Bielik-11B-v3.0-Instruct": "hermes",
    "ByteDance-Seed-OSS": "seed_oss",
    "Cohere2MoE": "command_r7b",
    "CohereForAI-c4ai-command-r-plus-tool_use": "command_r",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": "command_r7b",
    "GLM-4.6": "glm",
    "GLM-4.7-Flash": "glm",
    "GigaChat3-10B-A1.8B": "gigachat3",
    "GigaChat3.1-10B-A1.8B": "gigachat31",
    "HuggingFaceTB-SmolLM3-3B": "hermes",  # shows no tools: they come in our words
    "Kimi-K2-Instruct": "kimi_k2",
    "Kimi-K2-Thinking": "kimi_k2",
    "Kimi-K3": "kimi_k3",
    "LFM2-8B-A1B": "lfm2",
    "LFM2.5-8B-A1B": "lfm2",
    "LFM2.5-Instruct": "lfm2",
    "MiMo-VL": "hermes",
    "MiniMax-M1": "minimax_m1",
    "MiniMax-M2": "minimax_m2",
    "MiniMax-M3": "minimax_m3",
    "Mistral-Small-3.2-24B-Instruct-2506": "mistral_call_id",
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": "qwen3_coder",
    "NVIDIA-Nemotron-Nano-v2": "nemotron",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": "hermes",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "hermes",
    "Qwen-QwQ-32B": "hermes",
    "Qwen-Qwen2.5-7B-Instruct": "hermes",
    "Qwen-Qwen3-0.6B": "hermes",
    "Qwen3-Coder": "qwen3_coder",
    "Qwen3.5-4B": "qwen3_coder",
    "Reka-Edge": "hermes",
    "Spark2.5": "glm",
    "StepFun3.5-Flash": "qwen3_coder",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": "deepseek_v3",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": "deepseek_v3",
    "deepseek-ai-DeepSeek-V3.1": "deepseek_v31",
    "deepseek-ai-DeepSeek-V3.2": "deepseek_v32",
    "deepseek-ai-DeepSeek-V4": "deepseek_v4",
    "deepseek-ai-DeepSeek-V4-Flash-0731": "deepseek_v4",
    "fireworks-ai-llama-3-firefunction-v2": "firefunction",
    "google-gemma-2-2b-it": "hermes",  # shows no tools
    "google-gemma-4-31B-it": "gemma4",
    "google-gemma-4-31B-it-interleaved": "gemma4",
    "ibm-granite-granite-3.3-2B-Instruct": "granite",
    "ibm-granite-granite-4.0": "hermes",
    "ibm-granite-granite-4.1": "hermes",
    "inclusionai-ling-3.0-flash": "glm",
    "llama-cpp-deepseek-r1": "deepseek_v3",
    "llama-cpp-rwkv-world": "hermes",  # shows no tools
    "llm-jp-llm-jp-4.1-8b-thinking": "harmony",
    "meetkai-functionary-medium-v3.1": "functionary_v31",
    "meetkai-functionary-medium-v3.2": "none",  # >>>name: not read yet
    "meta-llama-Llama-3.1-8B-Instruct": "llama3",
    "meta-llama-Llama-3.2-3B-Instruct": "llama3",
    "meta-llama-Llama-3.3-70B-Instruct": "llama3",
    "microsoft-Phi-3.5-mini-instruct": "hermes",  # shows no tools
    "mistralai-Ministral-3-14B-Reasoning-2512": "mistral_args",
    "mistralai-Mistral-Nemo-Instruct-2407": "mistral",
    "moonshotai-Kimi-K2": "kimi_k2",
    "muse-glimmer": "muse",
    "openai-gpt-oss-120b": "harmony",
    "openbmb-MiniCPM5-1B": "minicpm5",
    "poolside-Laguna-S-2.1": "glm",
    "poolside-Laguna-XS-2.1": "glm",
    "poolside-Laguna-XS.2": "glm",
    "tencent-Hy3": "hunyuan",
    "unsloth-Apriel-1.5": "apriel",
    "unsloth-mistral-Devstral-Small-2507": "mistral_args",
    "upstage-Solar-Open-100B": "solar",
}


# Template -> the form of its reasoning; the vocabulary decides for the others ("none" here).
REASONING = {
    "Apertus-8B-Instruct": "apertus",
    "Apriel-1.6-15b-Thinker-fixed": "apriel",
    "unsloth-Apriel-1.5": "apriel",
    "ByteDance-Seed-OSS": "seed_oss",
    "Cohere2MoE": "command_r",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": "command_r",
    "Kimi-K3": "kimi_k3",
    "MiniMax-M3": "minimax_m3",
    "google-gemma-4-31B-it": "gemma4",
    "google-gemma-4-31B-it-interleaved": "gemma4",
    "ibm-granite-granite-3.3-2B-Instruct": "granite",
    "llm-jp-llm-jp-4.1-8b-thinking": "harmony",
    "openai-gpt-oss-120b": "harmony",
    "mistralai-Ministral-3-14B-Reasoning-2512": "mistral",
    "muse-glimmer": "muse",
    "upstage-Solar-Open-100B": "solar",
    "tencent-Hy3": "hunyuan",
    **dict.fromkeys(
        (
            *("Bielik-11B-v3.0-Instruct", "GLM-4.6", "GLM-4.7-Flash", "HuggingFaceTB-SmolLM3-3B"),
            *("Kimi-K2-Thinking", "LFM2.5-8B-A1B", "LFM2.5-Instruct", "MiniMax-M2"),
            *("NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "NVIDIA-Nemotron-Nano-v2", "Qwen-QwQ-32B"),
            *("Qwen-Qwen3-0.6B", "Qwen3.5-4B", "Reka-Edge", "Spark2.5", "StepFun3.5-Flash"),
            "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
            "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
            *("deepseek-ai-DeepSeek-V3.1", "deepseek-ai-DeepSeek-V3.2"),
            *("deepseek-ai-DeepSeek-V4", "deepseek-ai-DeepSeek-V4-Flash-0731"),
            *("inclusionai-ling-3.0-flash", "llama-cpp-deepseek-r1", "llama-cpp-rwkv-world"),
            *("openbmb-MiniCPM5-1B", "poolside-Laguna-S-2.1", "poolside-Laguna-XS-2.1"),
            "poolside-Laguna-XS.2",
        ),
        "think",
    ),
}


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    folder = llamacpp_source() / "models" / "templates"
    return {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.jinja")}


def test_the_table_has_all_templates(sources):
    assert set(TABLE) == set(sources)
    assert len(TABLE) == 71


@pytest.mark.parametrize("name", TABLE)
def test_the_form_is_found(name, sources, tmp_path: Path):
    (tmp_path / "chat_template.jinja").write_text(sources[name], encoding="utf-8")
    template = ChatTemplate.load(tmp_path, now=lambda: datetime(2026, 1, 1))
    assert not template.broken
    found = detect(template.probe, template.text, shows_tools=template.shows_tools)
    assert found.form.name == TABLE[name]


@pytest.mark.parametrize("name", TABLE)
def test_the_form_of_reasoning_is_found(name, sources):
    found = detect_reasoning(sources[name], ())
    assert (found.name if found else "none") == REASONING.get(name, "none")
