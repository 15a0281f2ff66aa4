"""Run in LangChain's environment: its OpenAI chat and completion models.

langchain_calls.py http://HOST:PORT MODEL
"""

import asyncio
import sys

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

URL, MODEL = sys.argv[1:]
COMMON = {"model": MODEL, "base_url": f"{URL}/v1", "api_key": "none", "temperature": 0}
did = []

chat = ChatOpenAI(**COMMON, max_tokens=24)
turns = [SystemMessage("You are brief."), HumanMessage("Name three rivers.")]
whole = chat.invoke(turns)
assert whole.content and whole.usage_metadata["output_tokens"] > 0, whole
chunks = list(chat.stream(turns))
assert "".join(chunk.content for chunk in chunks) == whole.content
assert len(chunks) > 2
did.append("chat, streamed equals whole")

chain = ChatPromptTemplate.from_template("Name a {thing}.") | chat | StrOutputParser()
assert len(chain.batch([{"thing": "river"}, {"thing": "city"}])) == 2


async def asynchronous():
    answers = await asyncio.gather(*(chat.ainvoke(turns) for _ in range(3)))
    assert all(answer.content == whole.content for answer in answers)
    text = ""
    async for chunk in chat.astream(turns):
        text += chunk.content
    assert text == whole.content


asyncio.run(asynchronous())
did.append("chains, batches, asyncio")

completion = OpenAI(**COMMON, max_tokens=16)
assert completion.invoke("Once upon a time")
did.append("completions")


class River(BaseModel):
    """A river."""

    name: str
    length_km: int


structured = ChatOpenAI(**COMMON, max_tokens=200).with_structured_output(
    River, method="json_schema"
)
assert isinstance(structured.invoke("The Nile is a river. Describe it."), River)
did.append("structured output")


@tool
def weather(city: str) -> str:
    """The weather of a city."""
    return "sunny"


bound = ChatOpenAI(**COMMON, max_tokens=200).bind_tools([weather], tool_choice="weather")
(call,) = bound.invoke("What is the weather in Paris?").tool_calls
assert call["name"] == "weather" and "city" in call["args"], call
did.append("tools")
print(", ".join(did))
