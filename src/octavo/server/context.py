"""What all routes of one server share."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.datastructures import State
from starlette.requests import Request

from octavo.core.errors import shown
from octavo.server.admission import Admission
from octavo.server.errors import ApiError
from octavo.server.json_body import BodyBuffer
from octavo.server.records import current_record
from octavo.server.sessions import Sessions
from octavo.text.tool_calls import format_of

if TYPE_CHECKING:
    from octavo.async_llm import AsyncLLM
    from octavo.server.metrics import Metrics
    from octavo.server.settings import ServerSettings
    from octavo.server.tracing import Tracing

_TEMPLATES = 16  # that are written at once, or wait for their turn
_CONTEXTS_QUEUED = 64  # default of max_num_queued_tokens, in contexts of the model


@dataclass(slots=True)
class ServerContext:
    """Of one application: `context_of(request)`."""

    llm: AsyncLLM
    settings: ServerSettings
    models: tuple[str, ...]  # names that clients may give; the first is the one that answers carry without
    created: int  # seconds since 1970
    admission: Admission
    bodies: BodyBuffer
    defaults: dict[str, Any]  # fields of SamplingParams that the model's files recommend
    state: State  # the application's
    metrics: Metrics | None  # None: none are kept
    tracing: Tracing | None  # None: nothing is sent anywhere
    # Threads that wait for chat templates, which may take a while: others are not to stand behind them.
    templates: ThreadPoolExecutor
    sessions: Sessions
    num_open: int = 0  # requests that are being answered, of any kind
    runs: dict[str, Any] = field(default_factory=dict)  # of margins, by id, for their review

    @property
    def tool_format(self) -> str | None:
        """In which the chat template teaches the model to call tools; None: in none that is known."""
        return format_of(self._tool_template)

    @property
    def tells_of_tools(self) -> bool:
        """Whether the chat template does anything with tools that it is given."""
        return "tools" in self._tool_template

    @property
    def _tool_template(self) -> str:
        templates = self.llm.tokenizer.chat_templates
        return templates.get("tool_use") or templates.get("default") or ""

    @property
    def draining(self) -> bool:
        """No new requests are taken; those that there are go on. Set by whoever runs the server."""
        return bool(self.state.draining)

    def model_named(self, name: object) -> str:
        """The name to answer with. Raises ApiError (400, 404)."""
        if name is None:
            name = self.models[0]
        if not isinstance(name, str):
            raise ApiError(400, f"model: must be a string, not {shown(name)}", "model")
        if name not in self.models:
            raise ApiError(404, f"the model {shown(name)} does not exist here", "model")
        if (record := current_record.get()) is not None:
            record.model = name
        return name


def make_context(
    llm: AsyncLLM,
    settings: ServerSettings,
    state: State,
    created: int,
    metrics: Metrics | None,
    tracing: Tracing | None,
) -> ServerContext:
    limits, most = llm._frontend.limits, settings.max_num_queued_tokens
    admission = Admission(
        limits.max_num_seqs,
        limits.num_blocks * limits.block_size,
        settings.max_num_queued_reqs,
        _CONTEXTS_QUEUED * llm.max_model_len if most is None else most,
        refused=None if metrics is None else partial(metrics.count, "admission_rejections", 1),
    )
    sessions = Sessions(settings.limits.max_sessions, settings.limits.max_sessions_per_key)
    if metrics is not None:
        metrics.gauge("num_sessions", "sessions that are open", sessions.__len__)
        metrics.gauge("num_session_branches", "branches of sessions that are open", lambda: sessions.num_branches)
    return ServerContext(
        llm=llm,
        settings=settings,
        models=settings.served_model_name or (public_name(llm.config.model),),
        created=created,
        admission=admission,
        bodies=BodyBuffer(settings.limits.max_buffered_bytes),
        defaults=llm.generation_config if settings.generation_config == "auto" else {},
        state=state,
        metrics=metrics,
        tracing=tracing,
        sessions=sessions,
        templates=ThreadPoolExecutor(_TEMPLATES, "octavo-http-templates"),
    )


def public_name(model: str) -> str:
    """Of a path its end: where models lie on this machine is nobody's business."""
    return Path(model).name.removesuffix(".gguf") or model if model.startswith(("/", ".", "~")) else model


def context_of(request: Request) -> ServerContext:
    context: ServerContext = request.app.state.octavo
    return context
