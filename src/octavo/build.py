"""The one place where settings become an engine: here the model, its backend and its weights, in `wiring` the rest."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import octavo
from octavo.backends.registry import BackendRefusedError, backend, backends
from octavo.config import EngineConfig
from octavo.core.errors import ConfigError, ModelNotFoundError, OutOfMemoryError
from octavo.formats import GGUFFile, open_weights
from octavo.formats.mapping import ModelFile
from octavo.hub import octavo_home, resolve_model
from octavo.loading.fingerprint import code_files, fingerprint_of, model_files, versions_of
from octavo.loading.kept_weights import KeptWeights
from octavo.loading.loaded_model import LoadedDraft, LoadedModel
from octavo.loading.memory import MemoryPlan, available_memory, plan_memory
from octavo.loading.model_config import model_config
from octavo.loading.weights import FileWeights, model_tensor
from octavo.models import Model, family, layer_states
from octavo.ops import ModelConfig, Ops
from octavo.runner.logits import rows_per_slice

if TYPE_CHECKING:
    from octavo.core.protocols import Clock
    from octavo.loading.draft_head import LoadedHead
    from octavo.wiring import BuiltEngine

log = logging.getLogger(__name__)


def build_engine(config: EngineConfig, clock: Clock = time.monotonic) -> BuiltEngine:
    """Find the model, plan memory, load weights, wire everything.

    Raises ModelNotFoundError, DownloadError, ModelFormatError, UnsupportedModelError, OutOfMemoryError, ConfigError.
    """
    built = None
    try:
        with loading(config) as loaded:
            # Imported only now: packing leaves the interpreter free, and half of all modules take about as long.
            from octavo.wiring import wire

            built = wire(config, loaded, clock)
        return built  # noqa: RET504 # packing may fail when the block ends
    except BaseException as error:
        if built is not None:
            built.engine.close()
        if not isinstance(error, MemoryError):
            raise
        if isinstance(error, OutOfMemoryError):
            raise
        raise OutOfMemoryError(
            "the system refused memory while the model was loaded, although the plan fitted (see -v): give a smaller "
            "max_model_len or kv_cache_memory_bytes"
        ) from None


@contextmanager
def loading(config: EngineConfig) -> Iterator[LoadedModel]:
    """Weights are packed on another thread while the block runs. Only after its end may the model compute; then all
    that the files say has been made use of, and packed weights are kept for the next time."""
    path = resolve_model(config.model)
    with ExitStack() as opened:
        file = opened.enter_context(open_weights(path))
        of_model = model_config(file, path)
        max_model_len = _max_model_len(config, of_model)
        ops = make_ops(config, of_model)
        parts = [_part(ops, path, file, of_model)]
        head = None
        if config.speculative_config is not None and config.speculative_config.model is not None:
            try:
                if config.speculative_config.method == "draft_head":
                    head = _draft_head(config.speculative_config.model, parts[0], ops)
                else:
                    parts.append(_draft(config.speculative_config.model, parts[0], ops, opened))
            except ModelNotFoundError as error:
                raise ModelNotFoundError(f"speculative_config.model: {error}") from None
        plan = _plan(config, parts, head, ops, max_model_len)
        log.info("%s", plan)
        all_kept = [_kept_weights(config, part) for part in parts]
        for one in filter(None, all_kept):
            opened.callback(one.close)
        found = [kept is not None and kept.find() for kept in all_kept]
        draft = LoadedDraft(parts[1].path, parts[1].config, parts[1].model) if len(parts) > 1 else None
        with ThreadPoolExecutor(1) as beside:
            packed = [beside.submit(_pack, part, kept) for part, kept in zip(parts, all_kept, strict=True)]
            if head is not None:
                packed.append(beside.submit(_pack_head, head))
            yield LoadedModel(path, file, of_model, max_model_len, ops, plan, parts[0].model, draft, head, found[0])
            for packing in packed:
                packing.result()
        for kept, was_found in zip(all_kept, found, strict=True):
            if kept is not None and not was_found:
                kept.write_beside()


class _Part(NamedTuple):
    """A model to be loaded: the one asked for, or one that guesses for it."""

    path: Path
    file: ModelFile
    config: ModelConfig
    model: Model  # takes no memory until it is packed
    loader: FileWeights


def _part(ops: Ops, path: Path, file: ModelFile, config: ModelConfig) -> _Part:
    loader = FileWeights(ops, config, file.path, file.tensors, gguf=isinstance(file, GGUFFile))
    return _Part(path, file, config, family(config.architecture).model(config, loader), loader)


def _draft(name: str, of: _Part, ops: Ops, opened: ExitStack) -> _Part:
    """A small model that guesses for the large one."""
    path = resolve_model(name)
    file = opened.enter_context(open_weights(path))
    config = model_config(file, path)
    _check_draft(of.config, of.file, config, file, ops)
    return _part(ops, path, file, config)


def _draft_head(name: str, of: _Part, ops: Ops) -> LoadedHead:
    from octavo.loading.draft_head import load_head

    return load_head(Path(name).expanduser(), model_tensor(of.config, of.file, "lm_head"), ops)


def _check_draft(
    of_model: ModelConfig, file: ModelFile, of_draft: ModelConfig, draft_file: ModelFile, ops: Ops
) -> None:
    """Whether a small model can guess for the large one. Raises ConfigError."""
    name = "speculative_config.model"
    if of_draft.vocab_size != of_model.vocab_size:
        raise ConfigError(f"{name}: has {of_draft.vocab_size} tokens, and the model {of_model.vocab_size}")
    key = "tokenizer.ggml.tokens"
    both = [one.metadata.get(key) for one in (file, draft_file)]
    if None not in both and both[0] != both[1]:
        raise ConfigError(f"{name}: its tokens are others than the model's")
    if (reason := ops.why_not(of_draft)) is not None:
        raise ConfigError(f"{name}: {reason}")


def _pack(part: _Part, kept: KeptWeights | None) -> None:
    part.loader.finish(kept)
    part.file.drop_pages()


def _pack_head(head: LoadedHead) -> None:
    head.packing.pack()
    head.packing.end()


def _kept_weights(config: EngineConfig, part: _Part) -> KeptWeights | None:
    """Where a model's packed weights are kept from one start to the next; None: nowhere."""
    packed = part.loader.packing.packed
    if packed is None or not config.kept_weights_bytes:
        return None
    try:
        folder = octavo_home(writable=False) / "packed"
    except ConfigError as error:
        log.info("kept weights: %s; nothing is kept", error)
        return None
    files = model_files(part.path)
    identity = f"{packed.identity} {fingerprint_of(files, octavo.__version__)} {versions_of([*files, *code_files()])}"
    return KeptWeights(folder, config.kept_weights_bytes, identity, packed)


def _max_model_len(config: EngineConfig, model_config: ModelConfig) -> int:
    asked = config.max_model_len
    if asked is None:
        return model_config.max_position
    if asked > model_config.max_position:
        raise ConfigError(
            f"max_model_len: must be at most {model_config.max_position}, this model's context, not {asked}"
        )
    return asked


def make_ops(config: EngineConfig, model: ModelConfig) -> Ops:
    """The backend asked for, or the best there is. Raises ConfigError saying what was tried and why each refused."""
    refused: list[str] = []
    for tried in backends() if config.backend == "auto" else (backend(config.backend),):
        try:
            ops = tried.make(config)
            reason = ops.why_not(model)
        except BackendRefusedError as error:
            reason = str(error)
        if reason is None:
            log.info("backend %s%s", tried.name, f" ({'; '.join(refused)})" if refused else "")
            return ops
        refused.append(f"{tried.name}: {reason}")
    able = [] if config.backend == "auto" else [one.name for one in backends() if one.runs_every_model]
    advice = "" if config.backend in able else "".join(f". --backend {name} runs every model, slowly" for name in able)
    raise ConfigError(f"backend: none fits; {'; '.join(refused)}{advice}")


def _plan(
    config: EngineConfig, parts: list[_Part], head: LoadedHead | None, ops: Ops, max_model_len: int
) -> MemoryPlan:
    """Of the model, and of what guesses for it: another one, whose K and V lie in the same blocks, or a head."""
    scratch_bytes = block_bytes = 0
    weights_bytes = sum(part.loader.nbytes() for part in parts)
    if head is not None:
        # Logits of what it knows, and among those of all tokens, as it keeps them: a row for each sequence.
        vocab_size = parts[0].config.vocab_size
        rows = min(rows_per_slice(vocab_size), config.max_num_seqs)
        weights_bytes += head.nbytes
        scratch_bytes += 2 * rows * vocab_size * 4
    for part in parts:
        specs = part.model.kv_specs
        layers = partial(layer_states, part.model, ops, kv_layers=ops.kv_layers(specs, 0, config.block_size))
        rows = min(rows_per_slice(part.config.vocab_size), config.step_tokens)
        scratch_bytes += ops.scratch_nbytes(
            part.config, layers, config.step_tokens, rows, config.max_num_seqs, max_model_len
        )
        block_bytes += sum(ops.kv_nbytes(spec, config.block_size) for spec in specs)
    return plan_memory(
        available_bytes=available_memory(),
        weights_bytes=weights_bytes,
        scratch_bytes=scratch_bytes,
        block_bytes=block_bytes,
        block_size=config.block_size,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        kv_cache_memory_bytes=config.kv_cache_memory_bytes,
    )
