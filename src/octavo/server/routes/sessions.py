"""/v1/octavo/sessions: text that branches under a client's control. The verbs are those of `octavo.session`, in which a
branch is named by its number: 0 is what the session began with."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from octavo.async_session import AsyncBranch
from octavo.core.errors import shown
from octavo.core.outputs import CompletionOutput, SelectResult
from octavo.server.answer_types import (
    Answer,
    Branch,
    BranchText,
    DeletedSession,
    Dropped,
    Forked,
    Generated,
    Selected,
    Session,
    Sessions,
)
from octavo.server.answers import answering, route
from octavo.server.context import ServerContext
from octavo.server.errors import JSONBytes, invalid
from octavo.server.events import output_json
from octavo.server.fields import INTEGERS, PROMPT, Body, DrawParams, RequestFields, documented, flag, integer
from octavo.server.generation import Deadline, unique_id
from octavo.server.messages import ToolUse
from octavo.server.openapi import describes
from octavo.server.records import current_record, tell_turn
from octavo.server.routes.chat import ConversationFields, check_either, check_no_conversation, written
from octavo.server.sampling import renamed, turn_params
from octavo.server.sessions import HeldSession

router = APIRouter()

DEFAULT_LEASE = 60.0  # seconds
_ROOT = "/v1/octavo/sessions"
_NAMES = {"prompt_token_ids": "prompt"}  # the library's name of a field -> the request's
_SECONDS = {"type": "number", "exclusiveMinimum": 0}


class SessionRequest(RequestFields, ConversationFields):
    """Open a session. It ends when it is deleted, or its lease does, which every call begins anew."""

    prompt: Any = documented("a text or token ids to begin with; or give messages; or neither, and extend", PROMPT)
    seed: Any = integer("of all draws; drawn without", minimum=0)
    lease: Any = documented("seconds that it stays open while nobody uses it; 60 without", _SECONDS)


class RenewRequest(Body):
    """How long the session is to stay open while nobody uses it."""

    lease: Any = documented("seconds; as before without", _SECONDS)


class BranchRequest(Body):
    """Which branch is meant."""

    branch: Any = integer("its number; 0, with which the session began, without", minimum=0)


class ExtendRequest(BranchRequest):
    """Append text."""

    prompt: Any = documented("a text or token ids", PROMPT, ...)


class GenerateRequest(BranchRequest, DrawParams):
    """Continue branches, several of them in one batch."""

    branches: Any = documented("numbers of several", INTEGERS)
    max_tokens: Any = integer("most tokens to generate, 16 without", minimum=1)
    logprobs: Any = integer("log-probabilities of each token, and of so many best ones in its place", minimum=0)


class SelectRequest(BranchRequest):
    """Which of some texts would best go on here."""

    choices: Any = documented("texts, or lists of token ids", {"type": "array", "items": PROMPT}, ...)
    by: Any = documented(
        "what the best goes by: log-probability per token (mean, the default) or of the text (total)",
        {"type": "string", "enum": ["mean", "total"]},
    )
    extend: Any = flag("append the best; else the branch stays as it is")


class ForkRequest(BranchRequest):
    """New branches that begin as this one."""

    n: Any = integer("how many; 1 without", minimum=1)


class TruncateRequest(BranchRequest):
    """Keep the beginning."""

    num_tokens: Any = documented("how many tokens to keep", {"type": "integer", "minimum": 0}, ...)


# --- a session as a whole ---


@router.post(_ROOT, **describes(SessionRequest, Session, "Open a session"))
@answering(SessionRequest)
async def open_session(request: Request, context: ServerContext, body: SessionRequest, deadline: Deadline) -> Response:
    model = context.model_named(body.model)
    if body.lease is None:
        lease = min(DEFAULT_LEASE, context.settings.max_session_lease)
    else:
        lease = _checked_lease(body.lease, context)
    identity = unique_id(request, body.request_id, "session", context.settings.limits.max_request_id)
    key = request.scope["octavo.key"]
    context.sessions.check_room(identity, key)
    _log(context, identity, "open", body)
    async with deadline.hold():
        begin = await _beginning(context, body)
        session = context.llm.session(seed=body.seed, priority=body.priority, cache_salt=body.cache_salt)
        try:
            if begin is not None:
                with context.admission.admit(1, 0), renamed(_NAMES):
                    await session.extend(begin)
            context.sessions.check_room(identity, key)  # others may have come meanwhile
            held = HeldSession(identity, model, key, session, lease)
            context.sessions.add(held)
        except BaseException:
            await session.close()
            raise
    return JSONBytes(_told(held))


async def _beginning(context: ServerContext, body: SessionRequest) -> Any:
    if body.prompt is not None or body.messages is not None:
        check_either(body, body.prompt)
    else:
        check_no_conversation(body)
    if body.messages is not None:
        prompt, use = await written(context, body)
        _check_no_promise(use)
        return {"prompt_token_ids": prompt.token_ids}
    return None if body.prompt is None else _as_prompt("prompt", body.prompt)


def _check_no_promise(use: ToolUse) -> None:
    """What a session's branches generate is for their calls to say. Raises ApiError."""
    strict = [f"{tool.field}.strict" for tool in use.tools if tool.strict]
    demanded = ["tool_choice"] if use.demanded else []
    for field in [*demanded, *strict, *([] if use.several else [use.several_name])]:
        raise invalid(field, "cannot be promised for a session: give structured_outputs where it generates")


@router.get(_ROOT, **describes(None, Sessions, "Sessions that are open"))
@route
async def list_sessions(request: Request, context: ServerContext) -> Response:
    found = context.sessions.of(request.scope["octavo.key"])
    return JSONBytes({"object": "list", "data": [_told(held) for held in found]})


@router.get(_ROOT + "/{session_id}", **describes(None, Session, "A session and its branches"))
@route
async def show_session(request: Request, context: ServerContext) -> Response:
    return JSONBytes(_told(_found(request, context)))


@router.get(_ROOT + "/{session_id}/branches/{branch}", **describes(None, BranchText, "A branch and its text"))
@route
async def show_branch(request: Request, context: ServerContext) -> Response:
    held, name = _found(request, context), request.path_params["branch"]
    number = int(name) if name.isascii() and name.isdecimal() and len(name) < 10 else name
    branch = held.branch(number)
    text = await asyncio.to_thread(lambda: branch.text)
    return JSONBytes({**_of_branch(number, branch), "text": text, "token_ids": branch.token_ids})


@router.delete(_ROOT + "/{session_id}", **describes(None, DeletedSession, "End a session"))
@route
async def delete_session(request: Request, context: ServerContext) -> Response:
    held = _found(request, context)
    context.sessions.close(held)
    return JSONBytes({"id": held.id, "object": "octavo.session.deleted", "deleted": True})


def _found(request: Request, context: ServerContext) -> HeldSession:
    held = context.sessions.find(request.path_params["session_id"], request.scope["octavo.key"])
    if (record := current_record.get()) is not None:
        record.model = held.model
    return held


def _told(held: HeldSession) -> dict[str, Any]:
    return {
        "id": held.id,
        "object": "octavo.session",
        "model": held.model,
        "seed": held.session.seed,
        "lease": held.lease,
        "branches": [_of_branch(number, branch) for number, branch in held.branches.items()],
    }


def _of_branch(number: object, branch: AsyncBranch) -> dict[str, Any]:
    return {"branch": number, "num_tokens": branch.num_tokens}


def _checked_lease(lease: object, context: ServerContext) -> float:
    most = context.settings.max_session_lease
    if isinstance(lease, bool) or not isinstance(lease, int | float) or not 0 < lease <= most or math.isnan(lease):
        raise invalid("lease", f"must be a number of seconds, more than 0 and at most {most:g}, not {shown(lease)}")
    return float(lease)


# --- what is done to it ---


def _log(context: ServerContext, session: str, verb: str, body: Body) -> None:
    """For --enable-log-requests."""
    if context.settings.enable_log_requests:
        given = {name: getattr(body, name) for name in sorted(body.model_fields_set)}
        tell_turn(session, verb, given, context.settings.max_log_len)


_Verb = Callable[[ServerContext, HeldSession, Any], Coroutine[Any, Any, dict[str, Any]]]


def _verb(kind: type[Body], answer: type[Answer], summary: str) -> Callable[[_Verb], _Verb]:
    """A route for what the function does to a session."""

    def decorated(function: _Verb) -> _Verb:
        name = function.__name__.strip("_")

        @router.post(f"{_ROOT}/{{session_id}}/{name}", name=name, **describes(kind, answer, summary))
        @answering(kind)
        async def endpoint(request: Request, context: ServerContext, body: Body, deadline: Deadline) -> Response:
            held = _found(request, context)
            _log(context, held.id, name, body)
            async with deadline.hold():
                with context.sessions.used(held), renamed(_NAMES):
                    return JSONBytes(await function(context, held, body))

        return function

    return decorated


@_verb(RenewRequest, Session, "Let the lease begin anew")
async def renew(context: ServerContext, held: HeldSession, body: RenewRequest) -> dict[str, Any]:
    if body.lease is not None:
        held.lease = _checked_lease(body.lease, context)
    return _told(held)


@_verb(ExtendRequest, Branch, "Append text to a branch")
async def extend(context: ServerContext, held: HeldSession, body: ExtendRequest) -> dict[str, Any]:
    number, branch = _branch_of(held, body)
    prompt = _as_prompt("prompt", body.prompt)
    with context.admission.admit(1, 0):
        await branch.extend(prompt)
    return _of_branch(number, branch)


@_verb(GenerateRequest, Generated, "Continue branches")
async def generate(context: ServerContext, held: HeldSession, body: GenerateRequest) -> dict[str, Any]:
    params = turn_params(body, context)
    numbers = _branches_of(held, body)
    branches = [held.branches[number] for number in numbers]
    tokens = sum(branch.num_tokens for branch in branches)
    with context.admission.admit(len(branches), tokens):
        outputs = await _all([branch.generate(params) for branch in branches])
    if context.metrics is not None:
        for one in outputs:
            context.metrics.count("generation_tokens", len(one.token_ids))
            context.metrics.count("request_success", 1, one.finish_reason or "stop")
    if (record := current_record.get()) is not None:
        record.take_turns(outputs)
    return {"outputs": [_output_of(*one) for one in zip(numbers, branches, outputs, strict=True)]}


def _output_of(number: int, branch: AsyncBranch, output: CompletionOutput) -> dict[str, Any]:
    return {**_of_branch(number, branch), **output_json(output)}


@_verb(SelectRequest, Selected, "Compare texts that could go on a branch")
async def select(context: ServerContext, held: HeldSession, body: SelectRequest) -> dict[str, Any]:
    number, branch = _branch_of(held, body)
    if not isinstance(body.choices, list):
        raise invalid("choices", f"must be a list of texts, or of lists of token ids, not {shown(body.choices)}")
    choices = [_as_prompt(f"choices[{at}]", one) for at, one in enumerate(body.choices)]
    by = "mean" if body.by is None else body.by
    found = await asyncio.to_thread(context.llm._frontend.choices, choices, branch.token_ids)
    tokens, most = sum(len(token_ids) for _, token_ids in found), context.settings.limits.max_choice_tokens
    if tokens > most:
        raise invalid("choices", f"may have at most {most} tokens together, not {tokens}")
    with context.admission.admit(1, branch.num_tokens + tokens):
        result = await branch.select(choices, by=by, extend=False if body.extend is None else body.extend)
    return {**_of_branch(number, branch), **_selected(result)}


def _selected(result: SelectResult) -> dict[str, Any]:
    choices = [
        {
            "text": one.text,
            "token_ids": one.token_ids,
            "logprobs": one.logprobs,
            "total_logprob": one.total_logprob,
            "mean_logprob": one.mean_logprob,
        }
        for one in result.choices
    ]
    best = next(at for at, one in enumerate(result.choices) if one is result.best)
    return {"by": result.by, "best": best, "choices": choices}


@_verb(ForkRequest, Forked, "Fork a branch")
async def fork(context: ServerContext, held: HeldSession, body: ForkRequest) -> dict[str, Any]:
    _, branch = _branch_of(held, body)
    n, most = 1 if body.n is None else body.n, context.settings.limits.max_branches
    places = n if isinstance(n, int) else 0  # what is no number is refused below
    found = len(held.branches) + held.num_forking
    if found + places > most:
        raise invalid("n", f"a session may have at most {most} branches; this one has {found}")
    held.num_forking += places
    try:
        made = {one.number: one for one in await branch.fork(n)}
        held.branches |= made
    finally:
        held.num_forking -= places
    return {"branches": [_of_branch(*one) for one in made.items()]}


@_verb(TruncateRequest, Branch, "Keep the beginning of a branch")
async def truncate(context: ServerContext, held: HeldSession, body: TruncateRequest) -> dict[str, Any]:
    del context
    number, branch = _branch_of(held, body)
    await branch.truncate(body.num_tokens)
    return _of_branch(number, branch)


@_verb(BranchRequest, Dropped, "End a branch")
async def drop(context: ServerContext, held: HeldSession, body: BranchRequest) -> dict[str, Any]:
    del context
    number, branch = _branch_of(held, body)
    await branch.drop()
    held.branches.pop(number, None)
    return {"branch": number, "dropped": True}


def _branch_of(held: HeldSession, body: BranchRequest) -> tuple[int, AsyncBranch]:
    number = 0 if body.branch is None else body.branch
    return number, held.branch(number)


def _branches_of(held: HeldSession, body: GenerateRequest) -> list[int]:
    if body.branches is None:
        return [_branch_of(held, body)[0]]
    if body.branch is not None:
        raise invalid("branches", "and branch are both given")
    if not isinstance(body.branches, list) or not body.branches:
        raise invalid("branches", f"must be a list of numbers, not empty, not {shown(body.branches)}")
    for at, number in enumerate(body.branches):
        held.branch(number, f"branches[{at}]")
        if number in body.branches[:at]:
            raise invalid(f"branches[{at}]", "stands there twice")
    return body.branches


def _as_prompt(name: str, given: object) -> Any:
    if isinstance(given, str):
        return given
    if isinstance(given, list):
        return {"prompt_token_ids": given}
    raise invalid(name, f"must be a string or a list of token ids, not {shown(given)}")


async def _all(asked: list[Awaitable[CompletionOutput]]) -> list[CompletionOutput]:
    """Of branches that run together. Raises the first error, after all have ended."""
    found: list[Any] = await asyncio.gather(*asked, return_exceptions=True)
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return found
