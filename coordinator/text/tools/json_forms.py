"""The forms of tool calls whose arguments are a JSON object."""

from __future__ import annotations

from dataclasses import replace

from coordinator.text.tools.format import ToolFormat
from coordinator.text.tools.json_body import JsonBody

_ID_NOTE = ', "id": "{id}"'

HERMES = ToolFormat(
    name="hermes",
    body=JsonBody(begin='\n{"name": "', end="}\n</tool_call>"),
    trigger="<tool_call>",
    separator="\n",
    signs=("<tool_call>", '"name"', '"arguments"'),
)
LLAMA3 = ToolFormat(
    name="llama3",
    body=JsonBody(middle='", "parameters": '),
    single=True,
    prefix="<|python_tag|>",
    signs=('"parameters"', '"name": '),
)
MISTRAL = ToolFormat(
    name="mistral",
    body=JsonBody(note=_ID_NOTE),
    trigger="[TOOL_CALLS]",
    once=True,
    opening="[",
    separator=", ",
    closing="]",
    id_chars=9,
    short_ids=True,
    signs=("[TOOL_CALLS]",),
)
MISTRAL_ARGS = ToolFormat(
    name="mistral_args",
    body=JsonBody(begin="", middle="[ARGS]", end=""),
    trigger="[TOOL_CALLS]",
    id_chars=9,
    short_ids=True,
    signs=("[TOOL_CALLS]", "[ARGS]"),
)
MISTRAL_CALL_ID = replace(
    MISTRAL_ARGS,
    name="mistral_call_id",
    body=JsonBody(begin="", middle="[CALL_ID]{id}[ARGS]", end=""),
    signs=("[TOOL_CALLS]", "[CALL_ID]"),
)
_LIST = ToolFormat(
    name="",
    body=JsonBody(note=_ID_NOTE),
    once=True,
    opening="[",
    separator=", ",
    closing="]",
)
GRANITE = replace(_LIST, name="granite", trigger="<|tool_call|>", signs=("<|tool_call|>",))
PHI4_MINI = replace(
    GRANITE,
    name="phi4_mini",
    closing="]<|/tool_call|>",
    signs=("<|tool_call|>", "<|/tool_call|>"),
)
APRIEL = replace(
    _LIST,
    name="apriel",
    trigger="<tool_calls>",
    closing="]</tool_calls>",
    signs=("<tool_calls>[", "</tool_calls>"),
)
NEMOTRON = replace(
    _LIST, name="nemotron", trigger="<TOOLCALL>", closing="]</TOOLCALL>", signs=("<TOOLCALL>",)
)
FIREFUNCTION = replace(_LIST, name="firefunction", trigger="functools", signs=("functools[",))
APERTUS = replace(
    _LIST,
    name="apertus",
    body=JsonBody(begin='{"', middle='": '),
    trigger="<|tools_prefix|>",
    closing="]<|tools_suffix|>",
    signs=("<|tools_prefix|>",),
)
COMMAND_R7B = ToolFormat(
    name="command_r7b",
    body=JsonBody(begin='{"tool_call_id": "{index}", "tool_name": "', middle='", "parameters": '),
    trigger="<|START_ACTION|>",
    once=True,
    opening="[\n    ",
    separator=",\n    ",
    closing="\n]<|END_ACTION|>",
    signs=("<|START_ACTION|>", "tool_call_id"),
)
COMMAND_R = ToolFormat(
    name="command_r",
    body=JsonBody(
        begin='    {\n        "tool_name": "', middle='",\n        "parameters": ', end="\n    }"
    ),
    trigger="Action:",
    once=True,
    opening="\n```json\n[\n",
    separator=",\n",
    closing="\n]```",
    signs=("Action:", '"tool_name"'),
)
MINIMAX_M1 = ToolFormat(
    name="minimax_m1",
    body=JsonBody(),
    trigger="<tool_calls>",
    once=True,
    opening="\n",
    separator="\n",
    closing="\n</tool_calls>",
    signs=("<tool_calls>\\n",),
)
FUNCTIONARY_V31 = ToolFormat(
    name="functionary_v31",
    body=JsonBody(begin="", middle=">", end="</function>"),
    trigger="<function=",
    signs=("<function=", "</function>"),
)
GIGACHAT3 = ToolFormat(
    name="gigachat3",
    body=JsonBody(),
    trigger="<|message_sep|>\n\nfunction call<|role_sep|>\n",
    single=True,
    signs=("function call<|role_sep|>",),
)
GIGACHAT31 = ToolFormat(
    name="gigachat31",
    body=JsonBody(),
    trigger="<|function_call|>",
    single=True,
    signs=("<|function_call|>",),
)
KIMI_K2 = ToolFormat(
    name="kimi_k2",
    body=JsonBody(
        begin="<|tool_call_begin|>functions.",
        middle=":{index}<|tool_call_argument_begin|>",
        end="<|tool_call_end|>",
    ),
    trigger="<|tool_calls_section_begin|>",
    once=True,
    closing="<|tool_calls_section_end|>",
    numbered_ids=True,
    signs=("<|tool_calls_section_begin|>",),
)
DEEPSEEK_V31 = ToolFormat(
    name="deepseek_v31",
    body=JsonBody(
        begin="<｜tool▁call▁begin｜>", middle="<｜tool▁sep｜>", end="<｜tool▁call▁end｜>"
    ),
    trigger="<｜tool▁calls▁begin｜>",
    once=True,
    closing="<｜tool▁calls▁end｜>",
    signs=("<｜tool▁calls▁begin｜>",),
)
DEEPSEEK_V3 = replace(  # and R1
    DEEPSEEK_V31,
    name="deepseek_v3",
    body=JsonBody(
        begin="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
        middle="\n```json\n",
        end="\n```<｜tool▁call▁end｜>",
    ),
    separator="\n",
    signs=("<｜tool▁calls▁begin｜>", "```json"),
)
SOLAR = ToolFormat(
    name="solar",
    body=JsonBody(
        begin="<|tool_call:begin|>{id}<|tool_call:name|>",
        middle="<|tool_call:args|>",
        end="<|tool_call:end|>",
    ),
    trigger="<|tool_calls|>",
    text_begin="<|content|>",
    once=True,
    id_chars=10,
    signs=("<|tool_call:begin|>",),
)
# <|call|> ends the output, so it is no part of the form. Headers of this order only: the reader of
# channels writes all of them so (reasoning.py).
HARMONY = ToolFormat(
    name="harmony",
    body=JsonBody(begin="", middle=" <|constrain|>json<|message|>", end=""),
    trigger="<|channel|>commentary to=functions.",
    text_begin="<|channel|>final<|message|>",
    single=True,
    signs=("<|channel|>", "to=functions."),
)
