"""The one place where settings become a wired engine."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import octavo
from octavo.config import EngineConfig
from octavo.core.errors import ConfigError, OutOfMemoryError
from octavo.engine import Engine, SchedulerConfig
from octavo.formats import GGUFFile, open_weights
from octavo.formats.mapping import ModelFile
from octavo.hub import resolve_model
from octavo.kv_cache import KVCacheManager
from octavo.models import model_class
from octavo.ops import KVSpec, ModelConfig, Ops
from octavo.runner.block_files import BlockFiles
from octavo.runner.fingerprint import fingerprint
from octavo.runner.gguf_config import config_from_gguf
from octavo.runner.hf_config import config_from_folder
from octavo.runner.memory import MemoryPlan, available_memory, plan_memory
from octavo.runner.model_runner import LocalExecutor, ModelRunner, rows_per_slice
from octavo.runner.weights import FileWeights
from octavo.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from octavo.core.protocols import Clock

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """An engine and what its front ends need to know of it."""

    engine: Engine
    codec: Tokenizer
    model_config: ModelConfig
    memory_plan: MemoryPlan
    max_model_len: int
    system_fingerprint: str


def build_engine(config: EngineConfig, clock: Clock = time.monotonic) -> BuiltEngine:
    """Find the model, plan memory, load weights, wire everything.

    Raises ModelNotFoundError, DownloadError, ModelFormatError, UnsupportedModelError, OutOfMemoryError, ConfigError.
    """
    try:
        return _build(config, clock)
    except MemoryError as error:
        if isinstance(error, OutOfMemoryError):
            raise
        raise OutOfMemoryError(
            "the system refused memory while the model was loaded, although the plan fitted (see -v): give a smaller "
            "max_model_len or kv_cache_memory_bytes"
        ) from None


def _build(config: EngineConfig, clock: Clock) -> BuiltEngine:
    path = resolve_model(config.model)
    with open_weights(path) as file:
        model_config = config_from_gguf(file) if isinstance(file, GGUFFile) else config_from_folder(path)
        max_model_len = _max_model_len(config, model_config)
        ops = _make_ops(config, model_config)
        plan = _plan(config, model_config, file, ops, max_model_len)
        log.info("%s", plan)
        loader = FileWeights(ops, model_config, file.path, file.tensors, gguf=isinstance(file, GGUFFile))
        model = model_class(model_config.architecture)(model_config, loader)
        with ThreadPoolExecutor(1) as beside:
            packed = beside.submit(loader.finish)
            tokenizer = _read_tokenizer(file, path)  # takes about as long
            packed.result()
    runner = ModelRunner(
        model,
        ops,
        num_blocks=plan.num_blocks,
        block_size=config.block_size,
        num_layers=model_config.num_layers,
        vocab_size=model_config.vocab_size,
    )
    scheduler = SchedulerConfig(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.step_tokens,
        max_chunk_tokens=config.long_prefill_token_threshold,
        policy=config.scheduling_policy,
        max_overtakes=config.max_cache_overtakes,
    )
    identity = _fingerprint(config, ops, path)
    tier = None
    if config.kv_offload_dir is not None:
        tier = BlockFiles(Path(config.kv_offload_dir).expanduser(), config.kv_offload_bytes, runner.read_block)
    kv = KVCacheManager(
        plan.num_blocks,
        config.block_size,
        caching=config.enable_prefix_caching,
        clock=clock,
        tier=tier,
        identity=identity,
    )
    engine = Engine(scheduler, kv, LocalExecutor(runner, tier), clock)
    return BuiltEngine(engine, tokenizer, model_config, plan, max_model_len, identity)


def _read_tokenizer(file: ModelFile, path: Path) -> Tokenizer:
    if isinstance(file, GGUFFile):
        return Tokenizer.from_gguf(file.metadata, file.path)
    return Tokenizer.from_directory(path)


def _max_model_len(config: EngineConfig, model_config: ModelConfig) -> int:
    asked = config.max_model_len
    if asked is None:
        return model_config.max_position
    if asked > model_config.max_position:
        raise ConfigError(
            f"max_model_len: must be at most {model_config.max_position}, this model's context, not {asked}"
        )
    return asked


def _make_ops(config: EngineConfig, model: ModelConfig) -> Ops:
    """The backend asked for, or the best there is. Raises ConfigError saying what was tried and why each refused."""
    refused: list[str] = []
    for name in ("cpu", "reference") if config.backend == "auto" else (config.backend,):
        try:
            ops = (_make_cpu if name == "cpu" else _make_reference)(config)
            reason = ops.why_not(model)
        except ConfigError as error:
            reason = str(error)
        if reason is None:
            log.info("backend %s%s", name, f" ({'; '.join(refused)})" if refused else "")
            return ops
        refused.append(f"{name}: {reason}")
    advice = ". --backend reference runs every model, slowly" if config.backend == "cpu" else ""
    raise ConfigError(f"backend: none fits; {'; '.join(refused)}{advice}")


def _make_cpu(config: EngineConfig) -> Ops:
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


def _make_reference(config: EngineConfig) -> Ops:
    from octavo.backends.reference import ReferenceOps

    dtype = "float32" if config.compute_dtype == "auto" else config.compute_dtype
    kv_dtype = dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype
    if kv_dtype == "int8":
        raise ConfigError("kv_cache_dtype int8 is of the cpu backend")
    return ReferenceOps(dtype, kv_dtype)


def _plan(config: EngineConfig, model: ModelConfig, file: ModelFile, ops: Ops, max_model_len: int) -> MemoryPlan:
    specs = [KVSpec(model.num_kv_heads, model.head_dim, layer.window, layer.rope) for layer in model.layers]
    rows = min(rows_per_slice(model.vocab_size), config.step_tokens)
    return plan_memory(
        available_bytes=available_memory(),
        weights_bytes=sum(ops.weight_nbytes(tensor) for tensor in file.tensors.values()),
        scratch_bytes=ops.scratch_nbytes(model, config.step_tokens, rows, max_model_len),
        block_bytes=sum(ops.kv_nbytes(spec, config.block_size) for spec in specs),
        block_size=config.block_size,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        kv_cache_memory_bytes=config.kv_cache_memory_bytes,
    )


def _fingerprint(config: EngineConfig, ops: Ops, path: Path) -> str:
    files = [path] if path.is_file() else [p for p in path.iterdir() if p.suffix in (".safetensors", ".json", ".gguf")]
    return "octavo-" + fingerprint(files, octavo.__version__, ops.identity)
