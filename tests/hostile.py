"""Values of classes of the caller's own: they raise, lie, change or never end, each in a way of its own."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from octavo.core.beam_params import BeamSearchParams
from octavo.core.params import RepetitionDetectionParams, SamplingParams


class Str(str):
    """Says something else about itself each way it is asked."""

    def __hash__(self) -> int:
        raise RuntimeError("no hash")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("not comparable")

    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__
    __len__ = __iter__ = encode = __bool__ = __hash__  # type: ignore[assignment]


class Changing:
    """A token id when it is checked, another number when it is used."""

    def __init__(self, *values: int) -> None:
        self._values = itertools.chain(values, itertools.repeat(10**9))

    def __index__(self) -> int:
        return next(self._values)


class Raising:
    def __index__(self) -> int:
        raise RuntimeError("no number")

    __float__ = __iter__ = __len__ = __repr__ = __index__  # type: ignore[assignment]


class Int(int):
    def __index__(self) -> int:
        raise RuntimeError("no number")

    __hash__ = __repr__ = __index__  # type: ignore[assignment]


class Endless(Mapping[Any, Any]):
    def __getitem__(self, key: Any) -> Any:
        return 0

    def __iter__(self) -> Iterator[Any]:
        return itertools.count()

    def __len__(self) -> int:
        return 1


class NoItems(Endless):
    def __iter__(self) -> Iterator[Any]:
        raise RuntimeError("no items")


class Lying:
    """Passes for anything that isinstance is asked about; what it is used for then fails."""

    def __init__(self, kind: type) -> None:
        self._kind = kind

    @property
    def __class__(self) -> Any:  # type: ignore[override]
        return self._kind

    def __bool__(self) -> bool:
        raise RuntimeError("neither true nor false")

    __eq__ = __iter__ = __len__ = __bool__  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]


class Faceless:
    @property
    def __class__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("no class")


class Key(str):
    """Is taken for a key of prompts where these are looked up, and then fails."""

    def __hash__(self) -> int:
        return hash("prompt")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("not comparable")


class List(list[Any]):
    def __len__(self) -> int:
        raise RuntimeError("no length")

    __bool__ = __len__  # type: ignore[assignment]


class Array:
    def tolist(self) -> list[int]:
        raise RuntimeError("no list")


class PathLike(os.PathLike[str]):
    def __fspath__(self) -> str:
        raise RuntimeError("no path")


class Sampling(SamplingParams):
    """Does without the checks."""

    def __post_init__(self) -> None: ...


class Beams(BeamSearchParams):
    def __post_init__(self) -> None: ...


class Repetition(RepetitionDetectionParams):
    def __post_init__(self) -> None: ...


def shared() -> list[Any]:
    """Small in memory, 2 ** 60 values when it is written out."""
    value: list[Any] = [1]
    for _ in range(60):
        value = [value, value]
    return value


HOSTILE: list[Callable[[], Any]] = [
    lambda: Str("a"), lambda: Str(""), lambda: [Str("a")], Raising, lambda: [Raising()], lambda: Changing(1),
    lambda: [Changing(1)], lambda: Int(3), lambda: [Int(3)], itertools.count, lambda: itertools.repeat("a"), Endless,
    NoItems, shared, lambda: {"9" * 5000: 1}, lambda: {"1" * 19: 1}, lambda: {Changing(2): 1.0},
    lambda: {1: Raising()}, lambda: 10**5000, lambda: [10**5000], lambda: -(10**5000), lambda: float("nan"),
    lambda: [float("inf")], lambda: np.float64("nan"), lambda: np.array([1, 2]), lambda: np.array(["a"]),
    lambda: np.datetime64("2024"), lambda: b"a", lambda: "\ud800", lambda: ["\ud800"], lambda: "\0", lambda: True,
    lambda: None, object, dict, lambda: [[]], lambda: ..., lambda: int, lambda: 1j, lambda: range(10**9),
    lambda: "a" * 10**5, lambda: ["a"] * 10**5,
    *(lambda kind=kind: Lying(kind) for kind in (bool, int, float, str, list, dict, SamplingParams, BeamSearchParams)),
    Faceless, lambda: [Faceless()], lambda: {"prompt": Faceless()}, lambda: {Key("x"): 1}, lambda: {Key("prompt"): "a"},
    lambda: List([1]), lambda: List([{"role": "user", "content": "a"}]), Array, lambda: {"prompt_token_ids": Array()},
    lambda: Sampling(max_tokens="x", stop=Raising()), lambda: Beams(beam_width="x", max_tokens=Raising()),
    lambda: Repetition(max_pattern_size=Int(3), min_pattern_size="x", min_count=None), PathLike,
]  # fmt: skip
