"""Run in openai's environment: its client, blocking and asyncio.

openai_calls.py http://HOST:PORT MODEL
"""

import asyncio
import json
import sys

import openai
from pydantic import BaseModel

URL, MODEL = sys.argv[1:]
OPTIONS = {"base_url": f"{URL}/v1", "api_key": "none"}
TURNS = [{"role": "user", "content": "Name three rivers."}]
LIMIT = {"model": MODEL, "temperature": 0, "max_tokens": 24}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]


class River(BaseModel):
    name: str
    length_km: int


def models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def completions(client):
    whole = client.completions.create(prompt="Once upon a time", **LIMIT)
    assert whole.choices[0].text and whole.usage.completion_tokens == 24, whole
    text, usage = "", None
    options = {"stream": True, "stream_options": {"include_usage": True}}
    for chunk in client.completions.create(prompt="Once upon a time", **LIMIT, **options):
        text += "".join(choice.text for choice in chunk.choices)
        usage = chunk.usage or usage
    assert text == whole.choices[0].text and usage == whole.usage
    prompts = client.completions.create(prompt=["One, two,", [1000, 1001, 1002]], **LIMIT)
    assert [choice.index for choice in prompts.choices] == [0, 1]


def chat(client):
    whole = client.chat.completions.create(messages=TURNS, **LIMIT)
    text = whole.choices[0].message.content
    assert text and whole.choices[0].finish_reason in ("stop", "length")
    chunks = list(client.chat.completions.create(messages=TURNS, **LIMIT, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    stopped = client.chat.completions.create(messages=TURNS, **LIMIT, stop=[text[3:8]])
    assert stopped.choices[0].message.content == text[:3]


def errors(client):
    try:
        client.chat.completions.create(messages=TURNS, model="another")
    except openai.NotFoundError as error:
        assert error.code == "model_not_found", error
    try:
        client.chat.completions.create(messages=TURNS, **{**LIMIT, "temperature": -1})
    except openai.BadRequestError as error:
        assert error.param == "temperature", error


def choices(client):
    made = client.chat.completions.create(
        messages=TURNS, **{**LIMIT, "temperature": 1.0}, n=3, seed=1
    )
    assert sorted(choice.index for choice in made.choices) == [0, 1, 2]


def logprobs(client):
    made = client.chat.completions.create(messages=TURNS, **LIMIT, logprobs=True, top_logprobs=2)
    content = made.choices[0].logprobs.content
    assert len(content) == made.usage.completion_tokens
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in content)


def structured(client):
    made = client.chat.completions.parse(
        model=MODEL,
        messages=[{"role": "user", "content": "The Nile is a river. Describe it."}],
        response_format=River,
        max_tokens=200,
        temperature=0,
    )
    assert isinstance(made.choices[0].message.parsed, River), made


def tools(client):
    question = [{"role": "user", "content": "What is the weather in Paris?"}]
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        options = {
            "model": MODEL,
            "messages": question,
            "tools": TOOLS,
            "tool_choice": choice,
            "temperature": 0,
            "max_tokens": 200,
        }
        whole = client.chat.completions.create(**options)
        (call, *_) = whole.choices[0].message.tool_calls
        assert call.function.name == "weather"
        assert isinstance(json.loads(call.function.arguments)["city"], str)
        streamed = ""
        for chunk in client.chat.completions.create(**options, stream=True):
            for piece in (chunk.choices[0].delta.tool_calls or []) if chunk.choices else []:
                if piece.index == 0:
                    streamed += piece.function.arguments or ""
        assert streamed == call.function.arguments


async def asynchronous(text):
    async with openai.AsyncOpenAI(**OPTIONS) as client:
        answers = await asyncio.gather(
            *(client.chat.completions.create(messages=TURNS, **LIMIT) for _ in range(4))
        )
        assert all(answer.choices[0].message.content == text for answer in answers)
        streamed = ""
        async for chunk in await client.chat.completions.create(
            messages=TURNS, **LIMIT, stream=True
        ):
            streamed += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        assert streamed == text


PARTS = (models, completions, chat, errors, choices, logprobs, structured, tools)
with openai.OpenAI(**OPTIONS) as blocking:
    failed = []
    for part in PARTS:
        try:
            part(blocking)
        except (AssertionError, openai.OpenAIError) as error:
            failed.append(f"{part.__name__}: {type(error).__name__} {error}")
    answer = blocking.chat.completions.create(messages=TURNS, **LIMIT).choices[0].message.content
asyncio.run(asynchronous(answer))
if failed:
    sys.exit("\n".join(failed))
print(", ".join(part.__name__ for part in PARTS) + ", asyncio; streams equal whole answers")
