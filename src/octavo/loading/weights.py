"""Weights from a model file into a backend's handles, by the canonical names that models use."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from octavo.core.errors import ModelFormatError
from octavo.formats import GGUFFile, ModelFile, RawTensor
from octavo.loading.kept_weights import KeptWeights
from octavo.models import family
from octavo.models.descriptor import Family
from octavo.ops import ModelConfig, Ops
from octavo.ops.protocol import Weight

_GGUF_MODEL = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
_LAYER_NAME = re.compile(r"layers\.(\d+)\.(.+)")

# Tensors that belong to no weight: frequencies that the configuration gives.
_IGNORED = re.compile(r"rope_freqs\.weight|.*rotary_emb\.inv_freq")


class FileWeights:
    """The WeightLoader over one opened model file."""

    def __init__(
        self, ops: Ops, config: ModelConfig, path: object, tensors: Mapping[str, RawTensor], gguf: bool
    ) -> None:
        self._ops = ops
        self._config = config
        self._family = family(config.architecture)
        self._path = path
        self._tensors = tensors
        self._gguf = gguf
        self._unused = set(tensors)
        self.packing = ops.defer_packing()

    # --- what models call ---

    def embedding(self, name: str, rows: int, width: int) -> Weight:
        return self._ops.embedding_weight(self._take(name, (rows, width)))

    def vector(self, name: str, size: int, offset: float = 0.0) -> Weight:
        return self._ops.vector_weight(self._take(name, (size,)), offset)

    def column_parallel(self, outputs: Mapping[str, int], inputs: int, *, bias: bool = False) -> Weight:
        parts = [self._take(name, (size, inputs)) for name, size in outputs.items()]
        biases = [self._take(name, (size,), "bias") for name, size in outputs.items()] if bias else []
        return self._ops.linear_weight(parts, biases)

    def row_parallel(self, name: str, outputs: int, inputs: int) -> Weight:
        return self._ops.linear_weight([self._take(name, (outputs, inputs))])

    # --- files ---

    def nbytes(self) -> int:
        """Bytes of the model's weights when they are packed: of all tensors but those that it can do without."""
        return sum(self._ops.weight_nbytes(t) for name, t in self._tensors.items() if not self._is_ignored(name))

    def _is_ignored(self, name: str) -> bool:
        """Whether a tensor may be left over: it belongs to no weight of a text model, or stands in for a tied one."""
        if self._config.tie_embeddings and name == self._file_name("lm_head") != self._file_name("embed_tokens"):
            return True
        return bool(_IGNORED.fullmatch(name) or re.fullmatch(self._family.others, name))

    def finish(self, kept: KeptWeights | None = None) -> None:
        """The model has taken all it wants: pack that, or read what was kept. May run beside other work, while the file
        is open.

        Raises ModelFormatError when the file holds weights that the model did not ask for: they would change it.
        """
        left = sorted(name for name in self._unused if not self._is_ignored(name))
        if left:
            shown = ", ".join(left[:4]) + (f" and {len(left) - 4} more" if len(left) > 4 else "")
            raise ModelFormatError(
                self._path, "tensors", f"hold weights that a {self._config.architecture} model does not have: {shown}"
            )
        if kept is None or not kept.read():
            self.packing.pack()
        self.packing.end()

    def _take(self, name: str, expected: tuple[int, ...], kind: str = "weight") -> RawTensor:
        file_name = self._file_name(name, kind)
        tensor = self._tensors.get(file_name)
        if tensor is None:
            raise ModelFormatError(self._path, file_name, "tensor is missing")
        self._unused.discard(file_name)
        if tensor.shape != expected:
            raise ModelFormatError(
                self._path, file_name, f"has shape {tensor.shape}; the configuration says {expected}"
            )
        if self._gguf and self._family.gguf_interleaved_rope and name.endswith((".q_proj", ".k_proj")):
            return tensor.select_rows(self._halves_order(tensor.shape[0]))
        return tensor

    def _file_name(self, name: str, kind: str = "weight") -> str:
        return _file_name(self._config, self._tensors, self._gguf, name, kind)

    def _halves_order(self, rows: int) -> NDArray[np.intp]:
        """llama.cpp stores q and k of some families for a rope on neighbouring pairs: within each head, rows
        2i and 2i + 1 are what the original has at i and i + D/2. Whole rows move, so quantised values stay."""
        head_dim = self._config.head_dim
        within = np.arange(head_dim).reshape(-1, 2).T.reshape(-1)  # 0, 2, 4, ..., 1, 3, 5, ...
        return (np.arange(0, rows, head_dim)[:, None] + within).reshape(-1)


def model_tensor(config: ModelConfig, file: ModelFile, name: str) -> RawTensor:
    """One of a model's tensors by its canonical name, as the file has it; of tied ones either name does."""
    if name == "lm_head" and config.tie_embeddings:
        name = "embed_tokens"
    file_name = _file_name(config, file.tensors, isinstance(file, GGUFFile), name)
    if file_name not in file.tensors:
        raise ModelFormatError(file.path, file_name, "tensor is missing")
    return file.tensors[file_name]


def _file_name(
    config: ModelConfig, tensors: Mapping[str, RawTensor], gguf: bool, name: str, kind: str = "weight"
) -> str:
    of = family(config.architecture)
    if gguf:
        return _gguf_name(of, name, kind)
    found = stored_tensor(of, tensors, name)
    if found is None and name == "embed_tokens" and config.tie_embeddings:
        found = stored_tensor(of, tensors, "lm_head")  # the one of the two that was stored
    return _hf_name(of, tensors, name, kind) if found is None or kind != "weight" else found.name


def _gguf_name(family: Family, name: str, kind: str) -> str:
    match = _LAYER_NAME.fullmatch(name)
    known = _GGUF_MODEL.get(name) if match is None else family.gguf_layer.get(match[2])
    if known is None:
        raise LookupError(f"{family.name}: GGUF files have no name for {name}")
    return f"{known}.{kind}" if match is None else f"blk.{match[1]}.{known}.{kind}"


def stored_tensor(family: Family, tensors: Mapping[str, RawTensor], name: str) -> RawTensor | None:
    """The tensor of a Hugging Face folder by its canonical name."""
    return tensors.get(_hf_name(family, tensors, name))


def _hf_name(family: Family, tensors: Mapping[str, RawTensor], name: str, kind: str = "weight") -> str:
    if name == "lm_head":
        heads = [f"{prefix}lm_head.weight" for _, prefix in family.hf_prefixes]
        return next((head for head in heads if head in tensors), heads[0])
    prefixes = [prefix for prefix, _ in family.hf_prefixes]
    prefix = next((p for p in prefixes if f"{p}norm.weight" in tensors), prefixes[0])
    return f"{prefix}{name}.{kind}"
