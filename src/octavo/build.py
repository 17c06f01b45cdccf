"""The one place where settings become an engine: here the model, its backend and its weights, in `wiring` the rest."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import octavo
from octavo.backends.registry import BackendRefusedError, backend, backends
from octavo.config import EngineConfig
from octavo.core.errors import ConfigError, OutOfMemoryError
from octavo.formats import GGUFFile, open_weights
from octavo.formats.mapping import ModelFile
from octavo.hub import octavo_home, resolve_model
from octavo.loading.fingerprint import code_files, fingerprint_of, model_files, versions_of
from octavo.loading.kept_weights import KeptWeights
from octavo.loading.loaded_model import LoadedModel
from octavo.loading.memory import MemoryPlan, available_memory, plan_memory
from octavo.loading.model_config import model_config
from octavo.loading.weights import FileWeights
from octavo.models import Model, family, layer_states
from octavo.ops import ModelConfig, Ops
from octavo.ops.packing import Packing
from octavo.runner.logits import rows_per_slice

if TYPE_CHECKING:
    from octavo.core.protocols import Clock
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
    """Weights are packed on another thread while the block runs. Only after its end may the model compute."""
    path = resolve_model(config.model)
    with open_weights(path) as file:
        of_model = model_config(file, path)
        max_model_len = _max_model_len(config, of_model)
        ops = make_ops(config, of_model)
        loader = FileWeights(ops, of_model, file.path, file.tensors, gguf=isinstance(file, GGUFFile))
        model = family(of_model.architecture).model(of_model, loader)  # takes no memory until it is packed
        plan = _plan(config, of_model, model, loader.nbytes(), ops, max_model_len)
        log.info("%s", plan)
        kept = _kept_weights(config, path, loader.packing)
        was_loaded = kept.find(loader.packing.nbytes)
        try:
            with ThreadPoolExecutor(1) as beside:
                packed = beside.submit(_pack, loader, file, kept)
                yield LoadedModel(path, file, of_model, max_model_len, ops, plan, model, was_loaded)
                packed.result()
        finally:
            kept.close()
        if not was_loaded:  # all of the model is sound, or it would not have come so far
            kept.write_beside(loader.packing)


def _pack(loader: FileWeights, file: ModelFile, kept: KeptWeights) -> None:
    loader.finish(kept)
    file.drop_pages()


def _kept_weights(config: EngineConfig, path: Path, packing: Packing) -> KeptWeights:
    """Where weights are kept from one start to the next."""
    folder, most = octavo_home(writable=False) / "packed", config.kept_weights_bytes
    if not packing.nbytes or not most:
        return KeptWeights(folder, 0, "")
    files = model_files(path)
    identity = f"{packing.identity} {fingerprint_of(files, octavo.__version__)} {versions_of([*files, *code_files()])}"
    return KeptWeights(folder, most, identity)


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
    config: EngineConfig, of_model: ModelConfig, model: Model, weights_bytes: int, ops: Ops, max_model_len: int
) -> MemoryPlan:
    specs = model.kv_specs
    layers = partial(layer_states, model, ops, kv_layers=ops.kv_layers(specs, 0, config.block_size))
    rows = min(rows_per_slice(of_model.vocab_size), config.step_tokens)
    return plan_memory(
        available_bytes=available_memory(),
        weights_bytes=weights_bytes,
        scratch_bytes=ops.scratch_nbytes(
            of_model, layers, config.step_tokens, rows, config.max_num_seqs, max_model_len
        ),
        block_bytes=sum(ops.kv_nbytes(spec, config.block_size) for spec in specs),
        block_size=config.block_size,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        kv_cache_memory_bytes=config.kv_cache_memory_bytes,
    )
