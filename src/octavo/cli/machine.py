"""The machine and the backends, as `doctor`, `bench` and `verify` see them."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from octavo.backends.processors import cpu_quota
from octavo.backends.registry import BackendRefusedError, backend, backends
from octavo.config import EngineConfig

if TYPE_CHECKING:
    from octavo.backends.cpu import CpuOps
    from octavo.observe import MachineLimits
    from octavo.ops import ModelConfig, Ops

_CGROUP = Path("/sys/fs/cgroup")


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name") and ":" in line)
    return next(names, "") or platform.processor() or platform.machine()


def cgroup_limits(folder: Path = _CGROUP) -> dict[str, float | None]:
    """What the process's control groups allow; None: no limit. Memory as in version 2, seen from inside a container."""
    limits: dict[str, float | None] = {"cpus": cpu_quota(folder), "memory_bytes": None}
    with suppress(OSError, ValueError):  # no such file, or "max"
        limits["memory_bytes"] = int((folder / "memory.max").read_text())
    return limits


def instruction_sets() -> list[str]:
    """Those this processor has, best first; none if the cpu backend's extension does not load."""
    try:
        from octavo import _C
    except ImportError:
        return []
    return _C.instruction_sets()


def num_processors() -> int:
    """Threads of the cpu backend when none are asked for."""
    try:
        from octavo.backends.cpu import available_processors
    except ImportError:
        return os.cpu_count() or 1
    return available_processors()


def make_ops(config: EngineConfig, model: ModelConfig) -> Ops:
    """The backend that an engine of this configuration uses. Raises ConfigError saying why each refused."""
    from octavo import build

    return build.make_ops(config, model)


def refusals(config: EngineConfig, model: ModelConfig | None = None) -> dict[str, str | None]:
    """Why each backend cannot be used with these settings, and this model if one is given; None: it can."""
    reasons: dict[str, str | None] = {}
    for one in backends():
        try:
            ops = one.make(config)
            reasons[one.name] = None if model is None else ops.why_not(model)
        except (BackendRefusedError, ImportError) as error:
            reasons[one.name] = str(error)
    return reasons


def measure(config: EngineConfig, seconds: float = 1.2) -> MachineLimits | None:
    """The machine's limits with the threads and instruction set of `config`; None if the cpu backend does not load."""
    if not instruction_sets():
        return None
    from octavo.loading.memory import available_memory
    from octavo.observe import measure_limits

    # Settings that change what is computed, and not how fast the machine is, as the measurement needs them.
    ops = cast(
        "CpuOps", backend("cpu").make(replace(config, compute_dtype="auto", kv_cache_dtype="auto", block_size=16))
    )
    return measure_limits(ops, ops.machine.threads, available_memory(), seconds)


def identity(config: EngineConfig, model: ModelConfig) -> dict[str, object]:
    """What computes, for a report: backend, instruction set and threads (None where the backend has no such thing)."""
    ops = make_ops(config, model)
    machine = getattr(ops, "machine", None)
    return {
        "backend": ops.name,
        "instruction_set": getattr(machine, "instruction_set", None),
        "threads": getattr(machine, "threads", None),
        "cpu": cpu_model(),
    }


def look_at_model(config: EngineConfig) -> dict[str, object]:
    """A model's file, which backends refuse it, and its numeric fingerprint with these settings; no weight is read."""
    from octavo.hub import resolve_model
    from octavo.wiring import system_fingerprint

    path = resolve_model(config.model)
    model = model_config(path)
    ops = make_ops(config, model)
    return {
        "name": config.model,
        "path": str(path),
        "architecture": model.architecture,
        "refused": refusals(replace(config, backend="auto"), model),
        "computes": ops.identity,
        "system_fingerprint": system_fingerprint(config, ops, path),
    }


def model_config(path: Path) -> ModelConfig:
    """The configuration in a model's file or folder. Raises ModelFormatError, UnsupportedModelError."""
    from octavo.formats import open_weights
    from octavo.loading.model_config import model_config as config_of

    with open_weights(path) as file:
        return config_of(file, path)
