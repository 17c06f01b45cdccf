"""Access to what files say of a model: handed to a family's readers. Imported by type checkers alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol, Self

from octavo.ops import StoredTensor


class Keys(Protocol):
    """Checked access to what a file says of its model. A key that is missing and has no default, or that has another
    type or range, is an error that names file and key."""

    def has(self, key: str) -> bool: ...

    def integer(self, key: str, *default: int) -> int: ...

    def number(self, key: str, *default: float) -> float: ...

    def text(self, key: str, *default: str) -> str: ...

    def malformed(self, key: str, problem: str) -> Exception:
        """To be raised: the file contradicts itself, or what it says can be of no model."""
        ...

    def unsupported(self, problem: str) -> Exception:
        """To be raised: what the file asks for is not built."""
        ...


class HFKeys(Keys, Protocol):
    """Of a folder's config.json. A key whose value is null is missing. Numbers are finite and more than 0."""

    def positive(self, key: str, *default: int) -> int:
        """An integer of at least 1."""
        ...

    def flag(self, key: str, *default: bool) -> bool: ...

    def entries(self, key: str) -> Sequence[Any] | None:
        """A list of anything; None where it is missing."""
        ...

    def table(self, key: str) -> Self:
        """An object inside; empty where it is missing."""
        ...

    def value(self, key: str) -> Any:
        """As it is in the file, unchecked; None where it is missing."""
        ...

    @property
    def names(self) -> Collection[str]:
        """The keys there are, those without a value too."""
        ...

    def over(self, values: Mapping[str, Any]) -> Self:
        """These keys, and of `values` those that are not among them."""
        ...

    def under(self, keys: Self) -> Self:
        """`keys`, and of these those that are not among them."""
        ...

    def without(self, *keys: str) -> Self: ...


class GGUFKeys(Keys, Protocol):
    """Of a GGUF file's metadata, without the architecture that they begin with. Integers are from 0 to 2^31 - 1."""

    @property
    def architecture(self) -> str: ...

    def refuse_if_set(self, key: str) -> None:
        """Raise `unsupported` if the key has any other value than 0."""
        ...

    def tensor(self, name: str) -> StoredTensor | None: ...
