"""All forms of tool calls, by the names of --tool-format.

    hermes           <tool_call>\\n{"name": "f", "arguments": {...}}\\n</tool_call>, one a line
    llama3           {"name": "f", "parameters": {...}}, the whole output, one call
    qwen3-coder      <tool_call>\\n<function=f>\\n<parameter=a>\\nx\\n</parameter>\\n</function>...
    glm              <tool_call>f\\n<arg_key>a</arg_key>\\n<arg_value>x</arg_value>\\n</tool_call>
    harmony          <|channel|>commentary to=functions.f <|constrain|>json<|message|>{...}<|call|>

and so on: each has an example in the tests.
"""

from __future__ import annotations

from dataclasses import replace

from coordinator.text.tools.format import UNKNOWN, ToolFormat
from coordinator.text.tools.json_forms import (
    APERTUS,
    APRIEL,
    COMMAND_R,
    COMMAND_R7B,
    DEEPSEEK_V3,
    DEEPSEEK_V31,
    FIREFUNCTION,
    FUNCTIONARY_V31,
    GIGACHAT3,
    GIGACHAT31,
    GRANITE,
    HARMONY,
    HERMES,
    KIMI_K2,
    LLAMA3,
    MINIMAX_M1,
    MISTRAL,
    MISTRAL_ARGS,
    MISTRAL_CALL_ID,
    NEMOTRON,
    PHI4_MINI,
    SOLAR,
)
from coordinator.text.tools.literal_body import GEMMA as GEMMA_VALUES
from coordinator.text.tools.literal_body import PYTHON, LiteralBody
from coordinator.text.tools.tagged_body import TaggedBody

# -- arguments stand between tags ------------------------------------------------------------------

QWEN3_CODER = ToolFormat(
    name="qwen3_coder",
    body=TaggedBody(
        begin="\n<function=",
        middle=">\n",
        end="</function>\n</tool_call>",
        key_begin="<parameter=",
        key_end=">",
        value_end="</parameter>",
        newlines=True,
    ),
    trigger="<tool_call>",
    separator="\n",
    signs=("<tool_call>", "<function=", "<parameter="),
)
SEED_OSS = ToolFormat(
    name="seed_oss",
    body=TaggedBody(
        begin="\n<function=",
        middle=">\n",
        end="</function>\n</seed:tool_call>",
        key_begin="<parameter=",
        key_end=">",
        value_end="</parameter>",
    ),
    trigger="<seed:tool_call>",
    separator="\n",
    signs=("<seed:tool_call>",),
)
GLM = ToolFormat(
    name="glm",
    body=TaggedBody(
        begin="",
        middle="\n",
        end="</tool_call>",
        key_begin="<arg_key>",
        key_end="</arg_key>",
        value_begin="\n<arg_value>",
        value_end="</arg_value>",
    ),
    trigger="<tool_call>",
    separator="\n",
    loose_newlines=True,
    signs=("<tool_call>", "<arg_key>"),
)
_HUNYUAN = ":opensource"
HUNYUAN = ToolFormat(
    name="hunyuan",
    body=TaggedBody(
        begin=f"<tool_call{_HUNYUAN}>",
        middle=f"<tool_sep{_HUNYUAN}>\n",
        end=f"</tool_call{_HUNYUAN}>",
        key_begin=f"<arg_key{_HUNYUAN}>",
        key_end=f"</arg_key{_HUNYUAN}>",
        value_begin=f"\n<arg_value{_HUNYUAN}>",
        value_end=f"</arg_value{_HUNYUAN}>",
    ),
    trigger=f"<tool_calls{_HUNYUAN}>",
    once=True,
    opening="\n",
    separator="\n",
    closing=f"\n</tool_calls{_HUNYUAN}>",
    signs=("<tool_sep{}>",),
)
MINIMAX_M2 = ToolFormat(
    name="minimax_m2",
    body=TaggedBody(
        begin='<invoke name="',
        middle='">\n',
        end="</invoke>",
        key_begin='<parameter name="',
        key_end='">',
        value_end="</parameter>",
    ),
    trigger="<minimax:tool_call>",
    once=True,
    opening="\n",
    separator="\n",
    closing="\n</minimax:tool_call>",
    signs=("<minimax:tool_call>",),
)
_M3 = "]<]minimax[>["
MINIMAX_M3 = ToolFormat(
    name="minimax_m3",
    body=TaggedBody(
        begin=f'{_M3}<invoke name="',
        middle='">',
        end=f"{_M3}</invoke>",
        key_begin=f"{_M3}<",
        key_end=">",
        value_end=_M3 + "</{key}>",
        after="",
    ),
    trigger=f"{_M3}<tool_call>",
    once=True,
    opening="\n",
    separator="\n",
    closing=f"\n{_M3}</tool_call>",
    signs=("]<]minimax[>[", "<invoke name="),
)
MINICPM5 = ToolFormat(
    name="minicpm5",
    body=TaggedBody(
        begin='name="',
        middle='">',
        end="</function>",
        key_begin='<param name="',
        key_end='">',
        value_end="</param>",
        after="",
    ),
    trigger="<function ",
    separator="\n",
    signs=('<function name="', '<param name="'),
)
_DSML_TYPES = dict.fromkeys(("object", "array", "number", "integer", "boolean", "null"), "false")
DEEPSEEK_V4 = ToolFormat(
    name="deepseek_v4",
    body=TaggedBody(
        begin='<｜DSML｜invoke name="',
        middle='">\n',
        end="</｜DSML｜invoke>",
        key_begin='<｜DSML｜parameter name="',
        key_end='"',
        value_begin=' string="{type}">',
        value_end="</｜DSML｜parameter>",
        types={"string": "true", **_DSML_TYPES},
    ),
    trigger="<｜DSML｜tool_calls>",
    once=True,
    opening="\n",
    separator="\n",
    closing="\n</｜DSML｜tool_calls>",
    signs=("DSML", "tool_calls>"),
)
DEEPSEEK_V32 = replace(
    DEEPSEEK_V4,
    name="deepseek_v32",
    trigger="<｜DSML｜function_calls>",
    closing="\n</｜DSML｜function_calls>",
    signs=("DSML", "function_calls>"),
)
KIMI_K3 = ToolFormat(
    name="kimi_k3",
    body=TaggedBody(
        begin='<|open|>call tool="',
        middle='" index="{index}"<|sep|>',
        end="<|close|>call<|sep|>",
        key_begin='<|open|>argument key="',
        key_end='"',
        value_begin=' type="{type}"<|sep|>',
        value_end="<|close|>argument<|sep|>",
        after="",
        types={"integer": "number"},
    ),
    trigger="<|open|>tools<|sep|>",
    text_begin="<|open|>response<|sep|>",
    text_end="<|close|>response<|sep|>",
    once=True,
    closing="<|close|>tools<|sep|>",
    signs=("<|open|>", "<|close|>", "call"),
)
# Follows a header ` to=NAME<|message|>`, which names the tool once more.
MUSE = ToolFormat(
    name="muse",
    body=TaggedBody(
        begin='<atem:invoke name="',
        middle='">\n',
        end="</atem:invoke>",
        key_begin='<atem:parameter name="',
        key_end='">',
        value_end="</atem:parameter>",
    ),
    trigger="<atem:function_calls>",
    text_begin=" to=user<|message|>",
    header=" to={name}<|message|>",
    once=True,
    opening="\n",
    separator="\n",
    closing="\n</atem:function_calls>",
    signs=("<atem:function_calls>",),
)

# -- arguments are literals of another language ----------------------------------------------------

LFM2 = ToolFormat(
    name="lfm2",
    body=LiteralBody(begin="", middle="(", end=")", language=PYTHON),
    trigger="<|tool_call_start|>",
    once=True,
    opening="[",
    separator=", ",
    closing="]<|tool_call_end|>",
    signs=("List of tools: ", "<|im_start|>"),
)
GEMMA4 = ToolFormat(
    name="gemma4",
    body=LiteralBody(begin="call:", middle="{", end="}<tool_call|>", language=GEMMA_VALUES),
    trigger="<|tool_call>",
    signs=("<|tool_call>", "<tool_call|>"),
)

# Forms that look alike stand with the more special one first.
FORMATS = {
    form.name: form
    for form in (
        *(MISTRAL_CALL_ID, MISTRAL_ARGS, MISTRAL, HARMONY, KIMI_K3, KIMI_K2, SOLAR),
        *(DEEPSEEK_V3, DEEPSEEK_V31, DEEPSEEK_V32, DEEPSEEK_V4, GEMMA4, LFM2),
        *(MINIMAX_M3, MINIMAX_M2, MINICPM5, MUSE, HUNYUAN, SEED_OSS, GLM, QWEN3_CODER),
        *(COMMAND_R7B, COMMAND_R, APERTUS, GIGACHAT31, GIGACHAT3, NEMOTRON, APRIEL, MINIMAX_M1),
        *(PHI4_MINI, GRANITE, FIREFUNCTION, FUNCTIONARY_V31, HERMES, LLAMA3),
    )
}
# Of a model whose form is not known: calls are neither written nor read.
NO_FORMAT = replace(HERMES, name=UNKNOWN)
