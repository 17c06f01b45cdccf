"""A family of models in one value: its text, how its configuration is read, what files call its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from octavo.models.keys import GGUFKeys, HFKeys
    from octavo.models.model import Model
    from octavo.ops import ModelConfig


class Family(NamedTuple):
    """What the house knows of a family, all of it."""

    name: str  # ModelConfig.architecture, and the key in `families.FAMILIES`
    model: Callable[..., Model]  # (ModelConfig, WeightLoader) -> Model
    read_hf: Callable[[HFKeys], ModelConfig]
    read_gguf: Callable[[GGUFKeys], ModelConfig]
    gguf_layer: Mapping[str, str]  # canonical name inside a layer -> GGUF's, without blk.N. and .weight
    # llama.cpp stores rows of q and k of some architectures for a rope on neighbouring pairs (its "NORM" ones).
    gguf_interleaved_rope: bool = False
    # What stands before the names of the model, and before that of its head, in folders; the first that a file has.
    hf_prefixes: tuple[tuple[str, str], ...] = (("model.", ""), ("", ""))
    others: str = ""  # pattern of tensors of other modalities, which the text model can do without
