"""The second half of building an engine; see `build`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import octavo
from octavo.engine import Engine, EngineLoop, SchedulerConfig
from octavo.formats import GGUFFile, open_weights
from octavo.frontend import Frontend, Limits
from octavo.hub import resolve_model
from octavo.kv_cache import KVCacheManager
from octavo.loading.fingerprint import code_files, fingerprint_of, model_files, versions_of
from octavo.loading.generation_config import GGUF_KEYS, generation_config_of
from octavo.runner.block_files import BlockFiles
from octavo.runner.model_runner import LocalExecutor, ModelRunner
from octavo.text.model_tokens import ModelTokens
from octavo.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from octavo.config import EngineConfig
    from octavo.core.protocols import Clock, TextCodec
    from octavo.formats.mapping import ModelFile
    from octavo.loading.loaded_model import LoadedModel
    from octavo.loading.memory import MemoryPlan
    from octavo.ops import ModelConfig, Ops


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """An engine, and what makes requests for it."""

    engine: Engine
    frontend: Frontend
    tokenizer: Tokenizer
    model_config: ModelConfig
    memory_plan: MemoryPlan
    max_model_len: int
    system_fingerprint: str
    ops: Ops
    generation_config: Callable[[], dict[str, Any]]  # read when somebody asks: it is advice, and may be unusable

    def start(self) -> EngineLoop:
        """A thread that owns the engine from now on."""
        return EngineLoop(self.engine)


def wire(config: EngineConfig, loaded: LoadedModel, clock: Clock) -> BuiltEngine:
    """Everything around a model. Raises ModelFormatError, UnsupportedModelError, ConfigError."""
    tokenizer = make_tokenizer(loaded.file, loaded.path, is_sound=loaded.was_loaded)
    fingerprint = system_fingerprint(config, loaded.ops, loaded.path)
    limits = Limits(
        vocab_size=loaded.config.vocab_size,
        max_model_len=loaded.max_model_len,
        max_logprobs=config.max_logprobs,
        max_num_seqs=config.max_num_seqs,
        num_blocks=loaded.memory_plan.num_blocks,
        block_size=config.block_size,
        default_seed=config.seed,
        priority_allowed=config.scheduling_policy == "priority",
        guesses_tokens=config.speculative_config is not None,
    )
    tokens = ModelTokens(tokenizer, loaded.config.vocab_size)
    return BuiltEngine(
        _engine(config, loaded, fingerprint, clock, tokens),
        Frontend(tokenizer, tokens, limits, fingerprint, clock),
        tokenizer,
        loaded.config,
        loaded.memory_plan,
        loaded.max_model_len,
        fingerprint,
        loaded.ops,
        _generation_config(loaded.file, loaded.path),
    )


def text_of(model: str) -> tuple[Tokenizer, Callable[[], dict[str, Any]]]:
    """Of a model without its weights: the tokenizer, and what its files recommend for sampling. Raises
    ModelNotFoundError, DownloadError, ModelFormatError."""
    path = resolve_model(model)
    with open_weights(path) as file:
        return make_tokenizer(file, path), _generation_config(file, path)


def _generation_config(file: ModelFile, path: Path) -> Callable[[], dict[str, Any]]:
    metadata = None
    if isinstance(file, GGUFFile):  # all of it holds the vocabulary too
        metadata = {key: file.metadata[key] for key in GGUF_KEYS.values() if key in file.metadata}
    return partial(generation_config_of, path, metadata)


def make_tokenizer(file: ModelFile, path: Path, *, is_sound: bool = False) -> Tokenizer:
    """`is_sound`: one was made of these very files before."""
    if isinstance(file, GGUFFile):
        from octavo.text.gguf_vocab import tokenizer_from_gguf

        return tokenizer_from_gguf(file.metadata, file.path, is_sound=is_sound)
    from octavo.text.directory import tokenizer_from_directory

    return tokenizer_from_directory(path)


def _engine(config: EngineConfig, loaded: LoadedModel, fingerprint: str, clock: Clock, codec: TextCodec) -> Engine:
    runner = ModelRunner(
        loaded.model,
        loaded.ops,
        num_blocks=loaded.memory_plan.num_blocks,
        block_size=config.block_size,
        hidden_size=loaded.config.hidden_size,
        vocab_size=loaded.config.vocab_size,
    )
    if loaded.draft is not None:
        from octavo.runner.draft_model import DraftModel

        small = ModelRunner(
            loaded.draft.model,
            loaded.ops,
            num_blocks=loaded.memory_plan.num_blocks,
            block_size=config.block_size,
            hidden_size=loaded.draft.config.hidden_size,
            vocab_size=loaded.draft.config.vocab_size,
        )
        blocks = loaded.memory_plan.num_blocks, config.block_size
        runner.draft_with(DraftModel(small, *blocks, config.step_tokens, loaded.draft.config.max_position))
    if loaded.draft_head is not None:
        from octavo.runner.draft_head import HeadDrafter

        sizes = {"hidden_size": loaded.config.hidden_size, "vocab_size": loaded.config.vocab_size}
        known = loaded.draft_head.token_ids
        runner.draft_with(HeadDrafter(loaded.model, loaded.draft_head.head, loaded.ops, **sizes, token_ids=known))
    scheduler = SchedulerConfig(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.step_tokens,
        max_chunk_tokens=config.long_prefill_token_threshold,
        policy=config.scheduling_policy,
        max_overtakes=config.max_cache_overtakes,
    )
    # What is kept beyond this process must not outlive a change that the fingerprint's samples do not show, of the
    # model or of the code.
    files = [*model_files(loaded.path), *(model_files(loaded.draft.path) if loaded.draft is not None else ())]
    identity = f"{fingerprint} {versions_of([*files, *code_files()])}"
    tier = None
    if config.kv_offload_dir is not None:
        tier = BlockFiles(
            Path(config.kv_offload_dir).expanduser(),
            config.kv_offload_bytes,
            config.block_size,
            loaded.memory_plan.block_bytes,
            runner.read_block,
            identity=f"{identity} block_size {config.block_size}",
        )
    kv = KVCacheManager(
        loaded.memory_plan.num_blocks,
        config.block_size,
        caching=config.enable_prefix_caching,
        clock=clock,
        tier=tier,
        identity=identity,
    )
    proposer = None
    if config.speculative_config is not None:
        from octavo.speculation.speculator import Speculator

        proposer = Speculator(config.speculative_config)
    return Engine(scheduler, kv, LocalExecutor(runner, tier), clock, codec, proposer)


def system_fingerprint(config: EngineConfig, ops: Ops, path: Path) -> str:
    """What answers depend on besides the request: the model's files, this version, and how the backend computes."""
    return "octavo-" + fingerprint_of(model_files(path), octavo.__version__, ops.identity)
