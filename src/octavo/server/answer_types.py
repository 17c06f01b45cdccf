"""What routes answer, for the OpenAPI page. Answers are not made of these classes: tests hold that they are of these
forms. Their fields come where a request has asked for them if they have a default here, and always if not."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from octavo.core.ask import Citation, Source
from octavo.core.margins import Margin, Segment

FinishReason = Literal["stop", "length", "repetition", "abort", "error"] | None
StopReason = int | str | None


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


# --- shared ---


class CachedTokens(Answer):
    cached_tokens: int


class Usage(Answer):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class TokenLogprob(Answer):
    """A token that stood in a place, or could have; octavo's form."""

    token_id: int
    token: str
    logprob: float
    rank: int
    bytes: list[int] | None


class Output(Answer):
    """What was generated."""

    text: str
    token_ids: list[int]
    logprobs: list[list[TokenLogprob]] | None
    finish_reason: FinishReason
    stop_reason: StopReason


class PromptLogprob(Answer):
    logprob: float
    rank: int
    decoded_token: str | None


class Status(Answer):
    status: Literal["ok"]


# --- /v1/completions ---


class CompletionLogprobs(Answer):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(Answer):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    stop_reason: StopReason
    token_ids: list[int] = []
    prompt_token_ids: list[int] = []
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None


class Completion(Answer):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


# --- /v1/chat/completions ---


class BestLogprob(Answer):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(BestLogprob):
    top_logprobs: list[BestLogprob]


class ChatLogprobs(Answer):
    content: list[ChatLogprob]
    refusal: None


class CalledFunction(Answer):
    name: str
    arguments: str


class ToolCall(Answer):
    id: str
    type: Literal["function"]
    function: CalledFunction


class Message(Answer):
    role: Literal["assistant"]
    content: str | None
    tool_calls: list[ToolCall] = []


class ChatChoice(Answer):
    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | Literal["tool_calls"]
    stop_reason: StopReason
    token_ids: list[int] = []


class ChatCompletion(Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None
    prompt_token_ids: list[int] = []


# --- /v1/responses ---


class OutputText(Answer):
    type: Literal["output_text"]
    text: str
    annotations: list[None]
    logprobs: list[ChatLogprob]


class MessageItem(Answer):
    id: str
    type: Literal["message"]
    status: Literal["completed", "incomplete"]
    role: Literal["assistant"]
    content: list[OutputText]


class FunctionCallItem(Answer):
    id: str
    type: Literal["function_call"]
    status: Literal["completed", "incomplete"]
    call_id: str
    name: str
    arguments: str


class IncompleteDetails(Answer):
    reason: Literal["max_output_tokens", "repetition", "abort", "error"]


class InputTokens(CachedTokens):
    cache_write_tokens: Literal[0]


class OutputTokens(Answer):
    reasoning_tokens: Literal[0]


class ResponseUsage(Answer):
    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    output_tokens_details: OutputTokens
    total_tokens: int


class NoReasoning(Answer):
    effort: None
    summary: None


class ModelResponse(Answer):
    """Fields that repeat the request's are as it has them."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["completed", "incomplete"]
    error: None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[MessageItem | FunctionCallItem]
    usage: ResponseUsage
    instructions: str | None
    max_output_tokens: int | None
    temperature: float
    top_p: float
    top_logprobs: int
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    text: dict[str, Any]
    metadata: dict[str, Any]
    user: str | None
    safety_identifier: str | None
    prompt_cache_key: str | None
    truncation: Literal["disabled"]
    store: Literal[False]
    background: Literal[False]
    service_tier: Literal["default"]
    previous_response_id: None
    reasoning: NoReasoning
    prompt_token_ids: list[int] = []
    token_ids: list[int] = []


# --- /v1/messages ---


class TextBlock(Answer):
    type: Literal["text"]
    text: str


class ToolUseBlock(Answer):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class MessageUsage(Answer):
    input_tokens: int
    cache_creation_input_tokens: Literal[0]
    cache_read_input_tokens: int
    output_tokens: int


class AnthropicMessage(Answer):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextBlock | ToolUseBlock]
    stop_reason: (
        Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]
        | Literal["repetition", "abort", "error"]
    )
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(Answer):
    input_tokens: int


# --- models, tokens, vectors ---


class Model(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


class Models(Answer):
    object: Literal["list"]
    data: list[Model]


class Tokens(Answer):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(Answer):
    prompt: str


class TokenizerInfo(Answer):
    """And every other special token that has a name, such as pad_token."""

    model_config = ConfigDict(extra="allow")
    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    chat_template: str | None
    model_max_length: int


class Embedding(Answer):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(Answer):
    id: str
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


# --- Octavo's own ---


class Beam(Output):
    index: int
    score: float
    cumulative_logprob: float


class BeamSearch(Answer):
    id: str
    object: Literal["octavo.beam_search"]
    created: int
    model: str
    system_fingerprint: str
    outputs: list[Beam]
    usage: Usage


class MarginsAnswer(Output):
    """To one of the questions."""

    question: str
    margins: list[Margin]
    num_segments: int
    num_prompt_tokens: int


class Reading(Answer):
    """A document that was read."""

    seed: int
    system_fingerprint: str
    segments: list[Segment]
    answers: list[MarginsAnswer]
    usage: Usage


class Margins(Reading):
    id: str
    object: Literal["octavo.margins"]
    model: str


class DocumentReading(Reading):
    document: str


class Ask(Output):
    id: str
    object: Literal["octavo.ask"]
    model: str
    question: str
    sources: list[Source]
    citations: list[Citation]
    passages: list[Source]
    num_left_out: int
    readings: list[DocumentReading]
    seed: int
    system_fingerprint: str
    usage: Usage


class Branch(Answer):
    branch: int
    num_tokens: int


class Session(Answer):
    id: str
    object: Literal["octavo.session"]
    model: str
    seed: int
    lease: float
    branches: list[Branch]


class Sessions(Answer):
    object: Literal["list"]
    data: list[Session]


class DeletedSession(Answer):
    id: str
    object: Literal["octavo.session.deleted"]
    deleted: Literal[True]


class BranchText(Branch):
    text: str
    token_ids: list[int]


class BranchOutput(Branch, Output):
    pass


class Generated(Answer):
    outputs: list[BranchOutput]


class Choice(Answer):
    text: str
    token_ids: list[int]
    logprobs: list[float]
    total_logprob: float
    mean_logprob: float


class Selected(Branch):
    by: Literal["mean", "total"]
    best: int
    choices: list[Choice]


class Forked(Answer):
    branches: list[Branch]


class Dropped(Answer):
    branch: int
    dropped: Literal[True]


class FreedBlocks(Answer):
    freed_blocks: int


class Version(Answer):
    version: str
