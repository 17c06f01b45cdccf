"""GGUF files for benchmarks: a model of a known shape with random weights, or a model's weights in another format.

    python benchmarks/random_model.py --shape 1b --format Q4_K --tokenizer smollm2 1b-q4_k.gguf
    python benchmarks/random_model.py --from smollm2 --format Q8_0 smollm2-q8_0.gguf

A shape says nothing of answers: only its speed is that of a trained model. Needs the package `gguf`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Format

STD = 0.02  # of the random weights
TEXT = "tokenizer."


@dataclass(frozen=True)
class Shape:
    """Of a model of the architecture `llama`. The output matrix is the embedding's."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    rope_base: float


SHAPES = {
    "1b": Shape(16, 2048, 8192, 32, 8, 64, 128_256, 131_072, 500_000.0),  # Llama 3.2 1B
    "tiny": Shape(2, 256, 512, 4, 2, 64, 0, 8192, 10_000.0),  # to try whether programs load such files
}


# --- matrices of random codes: rows of blocks, whose weights have a mean near 0 and the deviation STD ---


def blocks_of(format_: Format, rows: int, columns: int) -> tuple[int, int]:
    """Number of blocks, and weights in each."""
    size, _ = gguf.GGML_QUANT_SIZES[format_]
    if columns % size:
        raise SystemExit(f"rows of {columns} weights are no whole blocks of {format_.name}")
    return rows * columns // size, size


def halves(values: np.ndarray) -> np.ndarray:
    """Numbers, as the bytes of float16 in the last dimension."""
    return values.astype("<f2").reshape(-1, 1).view(np.uint8)


def random_q4_k(rng: np.random.Generator, count: int) -> np.ndarray:
    """Blocks of 256: d, dmin, 8 scales and 8 minimums of 6 bits, codes of 4 bits: d * scale * code - dmin * minimum."""
    six = rng.integers(32, 64, (count, 8), dtype=np.uint8)  # scale and minimum alike, dmin 7.5 d: the mean is 0
    low, high = six[:, :4], six[:, 4:]
    packed = np.concatenate([low | high >> 4 << 6, low | high >> 4 << 6, (high & 15) | (high & 15) << 4], axis=1)
    d = STD / (47.5 * 4.61) * rng.uniform(0.8, 1.2, count)
    codes = rng.integers(0, 256, (count, 128), dtype=np.uint8)
    return np.concatenate([halves(d), halves(7.5 * d), packed, codes], axis=1)


def random_q6_k(rng: np.random.Generator, count: int) -> np.ndarray:
    """Blocks of 256: codes of 6 bits in 192 bytes, 16 scales of 8 bits, d: d * scale * (code - 32)."""
    codes = rng.integers(0, 256, (count, 192), dtype=np.uint8)
    scales = rng.integers(8, 24, (count, 16), dtype=np.int8) * rng.choice(np.array([-1, 1], np.int8), (count, 16))
    d = STD / (15.5 * 18.5) * rng.uniform(0.8, 1.2, count)
    return np.concatenate([codes, scales.view(np.uint8), halves(d)], axis=1)


def random_q8_0(rng: np.random.Generator, count: int) -> np.ndarray:
    """Blocks of 32: d, codes of 8 bits."""
    codes = rng.integers(-127, 128, (count, 32), dtype=np.int8)
    return np.concatenate([halves(STD / 73.3 * rng.uniform(0.8, 1.2, count)), codes.view(np.uint8)], axis=1)


RANDOM = {Format.Q4_K: random_q4_k, Format.Q6_K: random_q6_k, Format.Q8_0: random_q8_0}


def random_matrix(rng: np.random.Generator, format_: Format, rows: int, columns: int) -> np.ndarray:
    count, _ = blocks_of(format_, rows, columns)
    return RANDOM[format_](rng, count).reshape(rows, -1)


# --- a model of random weights ---


def matrices(shape: Shape, format_: Format) -> Iterator[tuple[str, Format, int, int]]:
    """Name, format, rows and columns of each, in the mix of llama.cpp's Q4_K_M: Q6_K for the embedding, and in half of
    the layers for V and for what leaves the FFN."""
    better = Format.Q6_K if format_ is Format.Q4_K else format_
    yield "token_embd", better, shape.vocabulary, shape.hidden
    eighth = shape.layers // 8
    for i in range(shape.layers):
        is_better = i < eighth or i >= 7 * shape.layers // 8 or (i - eighth) % 3 == 2
        mixed = better if is_better else format_
        kv = shape.kv_heads * shape.head_dim
        yield f"blk.{i}.attn_q", format_, shape.heads * shape.head_dim, shape.hidden
        yield f"blk.{i}.attn_k", format_, kv, shape.hidden
        yield f"blk.{i}.attn_v", mixed, kv, shape.hidden
        yield f"blk.{i}.attn_output", format_, shape.hidden, shape.heads * shape.head_dim
        yield f"blk.{i}.ffn_gate", format_, shape.ffn, shape.hidden
        yield f"blk.{i}.ffn_up", format_, shape.ffn, shape.hidden
        yield f"blk.{i}.ffn_down", mixed, shape.hidden, shape.ffn


def norms(shape: Shape) -> Iterator[str]:
    for i in range(shape.layers):
        yield from (f"blk.{i}.attn_norm", f"blk.{i}.ffn_norm")
    yield "output_norm"


FILE_TYPES = {Format.Q4_K: gguf.LlamaFileType.MOSTLY_Q4_K_M, Format.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0}


def write_random(path: Path, shape: Shape, format_: Format, tokenizer: gguf.GGUFReader, seed: int) -> None:
    tokens = tokenizer.fields["tokenizer.ggml.tokens"].contents()
    shape = Shape(**{**shape.__dict__, "vocabulary": max(shape.vocabulary, len(tokens))})
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"random weights, {shape.layers} layers of {shape.hidden}")
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_file_type(FILE_TYPES[format_])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    copy_fields(writer, tokenizer, lambda key: key.startswith(TEXT), longer_by=shape.vocabulary - len(tokens))
    rng = np.random.default_rng(seed)
    for name in norms(shape):
        writer.add_tensor(f"{name}.weight", np.ones(shape.hidden, np.float32))
    for name, used, rows, columns in matrices(shape, format_):
        writer.add_tensor(f"{name}.weight", random_matrix(rng, used, rows, columns), raw_dtype=used)
    finish(writer)


def copy_fields(writer: gguf.GGUFWriter, reader: gguf.GGUFReader, wanted: Any, longer_by: int = 0) -> None:
    """Metadata of a file. A vocabulary can be made longer: by tokens that no text is made of."""
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture" or not wanted(key):
            continue
        value = field.contents()
        if key == "tokenizer.ggml.tokens":
            value = [*value, *(f"<unused {i}>" for i in range(longer_by))]
        elif key == "tokenizer.ggml.token_type":
            value = [*value, *[int(gguf.TokenType.NORMAL)] * longer_by]
        elif key == "tokenizer.ggml.scores":
            value = [*value, *[-1e4] * longer_by]
        is_list = field.types[0] is gguf.GGUFValueType.ARRAY
        writer.add_key_value(key, value, field.types[0], sub_type=field.types[-1] if is_list else None)


# --- a model in another format ---


def write_requantised(path: Path, reader: gguf.GGUFReader, format_: Format) -> None:
    """All matrices in one format; what is no matrix stays as it is."""
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    ours = {"general.file_type": FILE_TYPES[format_], "general.quantization_version": gguf.GGML_QUANT_VERSION}
    copy_fields(writer, reader, lambda key: key not in ours)
    for key, value in ours.items():
        writer.add_uint32(key, int(value))
    for tensor in reader.tensors:
        if len(tensor.shape) < 2:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            continue
        weights = gguf.dequantize(tensor.data, tensor.tensor_type)
        try:
            writer.add_tensor(tensor.name, gguf.quantize(weights, format_), raw_dtype=format_)
        except NotImplementedError:
            raise SystemExit(f"the package gguf cannot make {format_.name}; it can make Q8_0") from None
    finish(writer)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def reader_of(name: str) -> gguf.GGUFReader:
    path = Path(name)
    if not path.is_file():
        from octavo.hub import resolve_model

        path = resolve_model(name)
    return gguf.GGUFReader(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--shape", choices=SHAPES)
    kind.add_argument("--from", dest="source", metavar="MODEL", help="alias or .gguf file whose weights are taken")
    parser.add_argument("--format", default="Q8_0", choices=[one.name for one in FILE_TYPES])
    parser.add_argument("--tokenizer", default="smollm2", metavar="MODEL", help="for --shape: whose tokenizer is taken")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    part = args.output.with_name(f".{args.output.name}.part")
    try:
        if args.shape:
            write_random(part, SHAPES[args.shape], Format[args.format], reader_of(args.tokenizer), args.seed)
        else:
            write_requantised(part, reader_of(args.source), Format[args.format])
        part.replace(args.output)
    finally:
        part.unlink(missing_ok=True)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
