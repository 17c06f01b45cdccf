"""The backends there are, best first: what each can do, and how it is made.

The module of a backend is imported when it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Protocol

    from octavo.ops import Ops

    class BackendSettings(Protocol):
        """What a backend may look at; octavo.config.EngineConfig says what each is."""

        @property
        def compute_dtype(self) -> str: ...
        @property
        def kv_cache_dtype(self) -> str: ...
        @property
        def block_size(self) -> int: ...
        @property
        def instruction_set(self) -> str | None: ...
        @property
        def threads(self) -> int | None: ...
        @property
        def pin_threads(self) -> bool: ...
        @property
        def cascade_attention(self) -> bool: ...


class BackendRefusedError(ValueError):
    """Why a backend cannot be used with these settings on this machine."""


class Backend(NamedTuple):
    name: str
    factory: str  # module:function; takes BackendSettings, gives Ops or raises BackendRefusedError or ImportError
    compute_dtypes: tuple[str, ...]
    kv_cache_dtypes: tuple[str, ...]
    block_sizes: tuple[int, ...]
    settings: tuple[str, ...] = ()  # those that not every backend heeds
    runs_every_model: bool = False  # if slowly
    auto_kv_dtypes: Mapping[str, str] = {}  # by compute_dtype: what kv_cache_dtype "auto" means, if not float32
    multiplies_codes: bool = False  # integer weights as they are, unless compute_dtype says otherwise

    def kv_dtype(self, settings: BackendSettings) -> str:
        """Of stored keys and values."""
        auto = settings.kv_cache_dtype == "auto"
        return self.auto_kv_dtypes.get(settings.compute_dtype, "float32") if auto else settings.kv_cache_dtype

    def make(self, settings: BackendSettings) -> Ops:
        """Raises BackendRefusedError."""
        for setting, able in (
            ("compute_dtype", self.compute_dtypes),
            ("block_size", self.block_sizes),
            ("kv_cache_dtype", self.kv_cache_dtypes),
        ):
            value = getattr(settings, setting)
            if value not in able:
                others = [other.name for other in _backends.values() if value in getattr(other, f"{setting}s")]
                raise BackendRefusedError(f"{setting} {value} is of the {' and the '.join(others)} backend")
        module, function = self.factory.split(":")
        try:
            made: Ops = getattr(importlib.import_module(module), function)(settings)
        except ImportError as error:
            raise BackendRefusedError(f"its extension does not load: {error}") from None
        return made


_backends: dict[str, Backend] = {}


def register(backend: Backend) -> None:
    """From now on it can be asked for by name; "auto" tries it after those that are there."""
    _backends[backend.name] = backend


def unregister(name: str) -> None:
    del _backends[name]


def backend(name: str) -> Backend:
    return _backends[name]


def backends() -> tuple[Backend, ...]:
    """In the order in which "auto" tries them."""
    return tuple(_backends.values())


register(
    Backend(
        "cpu",
        "octavo.backends.cpu:make",
        compute_dtypes=("auto", "float32"),
        kv_cache_dtypes=("auto", "float32", "float16", "int8"),
        block_sizes=(16, 32, 64),
        settings=("instruction_set", "threads", "pin_threads", "cascade_attention"),
        # Attention of integers is the fastest, and costs no more of a model's quality than its int8 activations do.
        auto_kv_dtypes={"auto": "int8", "float32": "float16"},
        multiplies_codes=True,
    )
)
register(
    Backend(
        "reference",
        "octavo.backends.reference:make",
        compute_dtypes=("auto", "float32", "float64"),
        kv_cache_dtypes=("auto", "float32", "float16"),
        block_sizes=(1, 16, 32, 64),
        runs_every_model=True,
        auto_kv_dtypes={"float64": "float64"},
    )
)
