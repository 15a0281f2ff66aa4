"""A checked request -> its prompt as token ids, and its constraint as the model's grammar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from coordinator.generation.request import GenerationRequest
from coordinator.generation.tool_schemas import fitting_constraint
from coordinator.text.detokenizer import leading_text_of
from coordinator.text.reasoning import prompt_end
from coordinator.text.served_model import ServedModel
from engine.base.errors import InvalidRequest
from engine.constraints.checker import refusal


async def prompt_of(
    model: ServedModel, request: GenerationRequest, max_model_len: int
) -> list[int]:
    """The request's prompt as token ids, at least one token shorter than the context.

    Raises InvalidRequest naming the prompt's field.
    """
    if request.token_ids is not None:
        field, ids = "token_ids", list(request.token_ids)
    elif request.messages is not None:
        tools = request.tools.tools if request.tools else ()
        ids = await model.encode_chat(
            request.messages, max_model_len, tools, template_kwargs=request.template_kwargs
        )
        field = "messages"
    else:
        assert request.text is not None, "a checked request has a prompt"
        field, ids = "text", await model.encode("text", request.text, True, max_model_len)
    if not ids:
        why = "this model has none to begin with" if field == "text" else "nothing is rendered"
        raise InvalidRequest(field, f"no tokens in it, and {why}; expected at least one")
    if len(ids) >= max_model_len:
        raise InvalidRequest(
            field, f"{len(ids)} tokens leave no room for an answer in a context of {max_model_len}"
        )
    return ids


def _prologue(model: ServedModel, request: GenerationRequest, prompt: Sequence[int]) -> str:
    """The grammar of the reasoning before a constrained text; "": there is none."""
    if request.reasoning is None:
        return ""
    is_open = request.reasoning.is_open(prompt_end(model.tokenizer, prompt))
    has_calls = request.tools is not None and bool(request.tools.callable)
    return request.reasoning.prologue(is_open, has_calls=has_calls)


async def checked(
    model: ServedModel, request: GenerationRequest, prompt: Sequence[int]
) -> GenerationRequest:
    """The request with a constraint that can be compiled.

    It gets the lead, which an output behind this prompt writes before its text, and loses what
    cannot be held of schemas of tools. Raises InvalidRequest where no output can be held to the
    constraint, or where resumed tokens do not fit it; Unavailable where that is not known in time.
    """
    if request.constraint is None or model.checker is None:
        return request
    leading_text = leading_text_of(model.tokenizer, prompt, request.skip_special_tokens)
    prologue = _prologue(model, request, prompt)
    constraint = replace(request.constraint, leading_text=leading_text, prologue=prologue)
    found = await model.checker.check(constraint)
    if found.reason:
        fitting = await fitting_constraint(model.checker, request, refusal(found))
        constraint = replace(fitting, leading_text=leading_text, prologue=prologue)
    resumed = [resume.token_ids for resume in request.resumes]
    if any(resumed):
        found = await model.checker.check(constraint, resumed)
        if found.mismatch_index >= 0:
            what = f"of choice {found.mismatch_index}: {refusal(found).description}"
            raise InvalidRequest("resume", what)
        if found.reason:
            raise InvalidRequest("resume", f"of a constrained answer: {found.reason}")
    return replace(request, constraint=constraint)
