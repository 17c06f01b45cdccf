"""The one place where settings become an engine: here the model, its backend and its weights, in `wiring` the rest."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.config import EngineConfig
from octavo.core.errors import ConfigError, OutOfMemoryError
from octavo.formats import GGUFFile, open_weights
from octavo.formats.mapping import ModelFile
from octavo.hub import resolve_model
from octavo.models import Model, model_class
from octavo.ops import KVSpec, ModelConfig, Ops
from octavo.loading.memory import MemoryPlan, available_memory, plan_memory
from octavo.loading.model_config import model_config
from octavo.loading.weights import FileWeights
from octavo.runner.logits import rows_per_slice

if TYPE_CHECKING:
    from octavo.core.protocols import Clock
    from octavo.wiring import BuiltEngine

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model whose weights are in memory, or on their way there."""

    path: Path
    file: ModelFile  # open
    config: ModelConfig
    max_model_len: int
    ops: Ops
    memory_plan: MemoryPlan
    model: Model


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
    """Weights are packed on another thread while the block runs. Only after its end may the model compute."""
    path = resolve_model(config.model)
    with open_weights(path) as file:
        of_model = model_config(file, path)
        max_model_len = _max_model_len(config, of_model)
        ops = make_ops(config, of_model)
        loader = FileWeights(ops, of_model, file.path, file.tensors, gguf=isinstance(file, GGUFFile))
        plan = _plan(config, of_model, loader.nbytes(), ops, max_model_len)
        log.info("%s", plan)
        model = model_class(of_model.architecture)(of_model, loader)
        with ThreadPoolExecutor(1) as beside:
            packed = beside.submit(_pack, loader, file)
            yield LoadedModel(path, file, of_model, max_model_len, ops, plan, model)
            packed.result()


def _pack(loader: FileWeights, file: ModelFile) -> None:
    loader.finish()
    file.drop_pages()


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
    for name in ("cpu", "reference") if config.backend == "auto" else (config.backend,):
        try:
            ops = (make_cpu if name == "cpu" else make_reference)(config)
            reason = ops.why_not(model)
        except ConfigError as error:
            reason = str(error)
        if reason is None:
            log.info("backend %s%s", name, f" ({'; '.join(refused)})" if refused else "")
            return ops
        refused.append(f"{name}: {reason}")
    advice = ". --backend reference runs every model, slowly" if config.backend == "cpu" else ""
    raise ConfigError(f"backend: none fits; {'; '.join(refused)}{advice}")


def make_cpu(config: EngineConfig) -> Ops:
    try:
        from octavo.backends.cpu import CpuOps
    except ImportError as error:
        raise ConfigError(f"its extension does not load: {error}") from None
    if config.compute_dtype == "float64":
        raise ConfigError("compute_dtype float64 is of the reference backend")
    if config.block_size == 1:
        raise ConfigError("block_size 1 is of the reference backend")
    kv_dtype = "float16" if config.kv_cache_dtype == "auto" else config.kv_cache_dtype
    try:
        return CpuOps(
            config.instruction_set,
            config.threads,
            kv_dtype,
            config.compute_dtype,
            share_prefixes=config.cascade_attention,
            pin_threads=config.pin_threads,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None


def make_reference(config: EngineConfig) -> Ops:
    from octavo.backends.reference import ReferenceOps

    dtype = "float32" if config.compute_dtype == "auto" else config.compute_dtype
    kv_dtype = dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype
    if kv_dtype == "int8":
        raise ConfigError("kv_cache_dtype int8 is of the cpu backend")
    return ReferenceOps(dtype, kv_dtype)


def _plan(config: EngineConfig, model: ModelConfig, weights_bytes: int, ops: Ops, max_model_len: int) -> MemoryPlan:
    specs = [KVSpec(model.num_kv_heads, model.head_dim, layer.window, layer.rope) for layer in model.layers]
    rows = min(rows_per_slice(model.vocab_size), config.step_tokens)
    return plan_memory(
        available_bytes=available_memory(),
        weights_bytes=weights_bytes,
        scratch_bytes=ops.scratch_nbytes(model, config.step_tokens, rows, max_model_len),
        block_bytes=sum(ops.kv_nbytes(spec, config.block_size) for spec in specs),
        block_size=config.block_size,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        kv_cache_memory_bytes=config.kv_cache_memory_bytes,
    )
