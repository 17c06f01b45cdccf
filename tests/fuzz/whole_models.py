"""Whole models with something wrong in them, from the file to the answer: GGUF files and folders whose keys, values,
types, shapes and weights were changed with knowledge of what they are.

Whatever is wrong, there is an answer, or an error that names what is at fault. Anything else is a finding.
"""

from __future__ import annotations

import io
import json
import math
import random
import struct
import tempfile
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from octavo import LLM, SamplingParams
from octavo.core.errors import OctavoError
from tests.formats.builder import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I32,
    I64,
    STRING,
    U8,
    U32,
    U64,
    Raw,
    Tensor,
    array,
    entry,
    gguf_file,
    safetensors_file,
)

Pairs = list[tuple[str | bytes, int, Any]]

HIDDEN, FFN, HEADS, KV_HEADS, LAYERS = 32, 64, 2, 1, 2
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TOKENS = ["<unk>", "<s>", "</s>", *BYTES, "\u2581", "a", "\u2581a", "he", "llo", "\u2581hello"]
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
INTEGERS = [0, 1, -1, 2, 3, 7, 31, 33, 64, 255, 1 << 15, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1]
NUMBERS = [0.0, -0.0, 1.0, -1.0, 1e-30, 1e30, 1e300, math.nan, math.inf, -math.inf]
TEXTS = [
    "",
    "x",
    "llama",
    "gemma3",
    "qwen2",
    "qwen3",
    "gpt2",
    "none",
    "linear",
    "yarn",
    "\0",
    "é" * 50,
    "a" * 3000,
    "{{ 1 // 0 }}",
    "../x",
]
PARAMS = [
    SamplingParams(max_tokens=3, temperature=0),
    SamplingParams(max_tokens=3, seed=1, min_tokens=3, logprobs=2, top_p=0.9, stop=["a"], bad_words=["he"]),
    SamplingParams(max_tokens=2, seed=1, n=2, prompt_logprobs=1, repetition_penalty=1.2),
]


def run(path: Path, data: bytes) -> bool:
    """Open a model and ask it something, what depends on `data`; whether it answered."""
    rng = random.Random(data)
    backend = rng.choice(["cpu", "reference"])
    try:
        with LLM(str(path), backend=backend, threads=1, max_model_len=32, max_num_seqs=4) as llm:
            (output,) = llm.generate("hello", rng.choice(PARAMS), use_tqdm=False)
            llm.chat([{"role": "user", "content": "he"}], PARAMS[0])
            return output.error is None
    except OctavoError as error:
        if len(str(error)) > 1000:
            raise AssertionError("the message floods a log") from error
        return False


def weights(rng: np.random.Generator, *shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return (rng.standard_normal(shape) * 0.3).astype(np.float32)


FAMILIES = ("llama", "qwen2", "qwen3")


@cache
def tensors(family: str) -> dict[str, tuple[tuple[int, ...], bytes]]:
    """Name as in a folder, without "model." -> shape and float32 data."""
    rng = np.random.default_rng(0)
    head = HIDDEN // HEADS
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (len(TOKENS), HIDDEN), "norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        at = f"layers.{layer}."
        shapes |= {
            at + "input_layernorm.weight": (HIDDEN,),
            at + "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            at + "self_attn.k_proj.weight": (KV_HEADS * head, HIDDEN),
            at + "self_attn.v_proj.weight": (KV_HEADS * head, HIDDEN),
            at + "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            at + "post_attention_layernorm.weight": (HIDDEN,),
            at + "mlp.gate_proj.weight": (FFN, HIDDEN),
            at + "mlp.up_proj.weight": (FFN, HIDDEN),
            at + "mlp.down_proj.weight": (HIDDEN, FFN),
        }
        if family == "qwen2":
            shapes |= {at + f"self_attn.{part}_proj.bias": (HIDDEN if part == "q" else head,) for part in "qkv"}
        if family == "qwen3":
            shapes |= {at + f"self_attn.{part}_norm.weight": (head,) for part in "qk"}
    return {name: (shape, weights(rng, *shape).tobytes()) for name, shape in shapes.items()}


# --- GGUF ---

GGUF_NAMES = {
    "embed_tokens": "token_embd", "norm": "output_norm", "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip


def gguf_parts(family: str) -> tuple[Pairs, list[Tensor]]:
    kinds = [2, 3, 3, *[6] * 256, *[1] * (len(TOKENS) - 259)]
    pairs: Pairs = [
        ("general.architecture", STRING, family),
        ("general.name", STRING, "tiny"),
        (f"{family}.block_count", U32, LAYERS),
        (f"{family}.context_length", U32, 64),
        (f"{family}.embedding_length", U32, HIDDEN),
        (f"{family}.feed_forward_length", U32, FFN),
        (f"{family}.attention.head_count", U32, HEADS),
        (f"{family}.attention.head_count_kv", U32, KV_HEADS),
        (f"{family}.attention.layer_norm_rms_epsilon", F32, 1e-5),
        (f"{family}.rope.freq_base", F32, 10000.0),
        ("tokenizer.ggml.model", STRING, "llama"),
        ("tokenizer.ggml.tokens", ARRAY, array(STRING, TOKENS)),
        ("tokenizer.ggml.scores", ARRAY, array(F32, [-float(i) for i in range(len(TOKENS))])),
        ("tokenizer.ggml.token_type", ARRAY, array(I32, kinds)),
        ("tokenizer.ggml.bos_token_id", U32, 1),
        ("tokenizer.ggml.eos_token_id", U32, 2),
        ("tokenizer.ggml.unknown_token_id", U32, 0),
        ("tokenizer.ggml.add_bos_token", BOOL, 1),
        ("tokenizer.chat_template", STRING, TEMPLATE),
    ]
    made = []
    for name, (shape, data) in tensors(family).items():
        bare, kind = name.rsplit(".", 1)
        layer, own = ("", bare) if not bare.startswith("layers.") else (bare.split(".")[1], bare.split(".", 2)[2])
        gguf_name = f"{GGUF_NAMES[own]}.{kind}" if not layer else f"blk.{layer}.{GGUF_NAMES[own]}.{kind}"
        made.append(Tensor(gguf_name, list(reversed(shape)), 0, data))
    return pairs, made


def any_value(rng: random.Random) -> tuple[int, Any]:
    """A GGUF type and a value of it."""
    kind = rng.choice([U8, U32, I32, U64, I64, F32, F64, BOOL, STRING, ARRAY])
    if kind == STRING:
        return kind, rng.choice(TEXTS)
    if kind == ARRAY:
        inner = rng.choice([U32, I32, F32, STRING, BOOL])
        return kind, array(inner, [packed(inner, any_of(inner, rng)) for _ in range(rng.choice([0, 1, 3, 300]))])
    return kind, packed(kind, any_of(kind, rng))


def any_of(kind: int, rng: random.Random) -> Any:
    return rng.choice(TEXTS) if kind == STRING else rng.choice(NUMBERS if kind in (F32, F64) else INTEGERS)


def packed(kind: int, value: Any) -> Any:
    """A value that its type can hold."""
    bits = {U8: 8, U32: 32, I32: 32, U64: 64, I64: 64, BOOL: 1}.get(kind)
    if bits is None:
        return value if kind != F32 or not math.isfinite(value) or abs(value) < 3e38 else 3e38
    value &= (1 << bits) - 1
    return value - (1 << bits) if kind in (I32, I64) and value >> (bits - 1) else value


KEYS = [
    "general.alignment", "llama.rope.scaling.type", "llama.rope.scaling.factor", "llama.rope.dimension_count",
    "llama.attention.key_length", "llama.attention.value_length", "llama.attention.sliding_window",
    "llama.expert_count", "llama.vocab_size", "tokenizer.ggml.pre", "tokenizer.ggml.merges",
    "tokenizer.ggml.padding_token_id",
    "tokenizer.ggml.eot_token_id", "tokenizer.ggml.add_space_prefix", "tokenizer.ggml.add_eos_token",
    "tokenizer.chat_templates", "tokenizer.chat_template.tool_use", "split.count", "general.file_type",
]  # fmt: skip


def change_pairs(pairs: Pairs, family: str, rng: random.Random) -> None:
    keys = [key.replace("llama.", f"{family}.", 1) for key in KEYS]
    at = rng.randrange(len(pairs))
    key, kind, value = pairs[at]
    match rng.randrange(6):
        case 0:
            del pairs[at]
        case 1:
            pairs[at] = (key, *any_value(rng))
        case 2:
            pairs.append((rng.choice(keys), *any_value(rng)))
        case 3 if not isinstance(value, (str, Raw)):
            pairs[at] = (key, kind, packed(kind, any_of(kind, rng)))
        case 4 if isinstance(value, Raw):  # an array with a few elements changed, or cut
            data = bytearray(value)
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(min(12, len(data) - 1), len(data))] = rng.randrange(256)
            pairs[at] = (key, kind, Raw(data))
        case _:
            pairs[at] = (key, kind, value)
            pairs.append((rng.choice(keys), *any_value(rng)))


EXTRA_TENSORS = (
    *("output.weight", "rope_freqs.weight", "blk.0.attn_q.bias", "blk.0.attn_q_norm.weight", "blk.9.attn_q.weight"),
    "x",
)


def change_tensors(made: list[Tensor], rng: random.Random) -> None:
    at = rng.randrange(len(made))
    tensor = made[at]
    match rng.randrange(5):
        case 0:
            del made[at]
        case 1:
            made[at] = Tensor(tensor.name, [packed(U64, rng.choice(INTEGERS[1:])) for _ in tensor.dims], 0, tensor.data)
        case 2:  # the same bytes as another type
            made[at] = Tensor(tensor.name, tensor.dims, rng.choice([1, 2, 3, 8, 12, 14, 24, 30]), tensor.data)
        case 3:
            data = bytearray(tensor.data)
            for _ in range(rng.randint(1, 3)):
                where = rng.randrange(len(data) // 4) * 4
                data[where : where + 4] = struct.pack("<f", rng.choice([*NUMBERS[:6], math.nan, math.inf]))
            made[at] = Tensor(tensor.name, tensor.dims, 0, bytes(data))
        case 4:
            name = rng.choice(
                [
                    "output.weight",
                    "rope_freqs.weight",
                    "blk.0.attn_q.bias",
                    "blk.0.attn_q_norm.weight",
                    "blk.9.attn_q.weight",
                    "x",
                ]
            )
            size = rng.choice([1, 8, HIDDEN])
            made.append(Tensor(name, [size], 0, bytes(4 * size)))


def make_gguf(rng: random.Random) -> bytes:
    """One changed GGUF file."""
    family = rng.choice(FAMILIES)
    pairs, made = gguf_parts(family)
    for _ in range(rng.choice([0, 1, 1, 2, 4])):
        if rng.random() < 0.67 and pairs:
            change_pairs(pairs, family, rng)
        elif made:
            change_tensors(made, rng)
    return gguf_file(pairs, made)


def check_gguf(data: bytes) -> bool:
    """Whether it answered."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        path.write_bytes(data)
        return run(path, data)


# --- folders ---


@cache
def tokenizer_json() -> str:
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = {token: index for index, token in enumerate(TOKENS)}
    made = Tokenizer(models.BPE(vocabulary, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return str(made.to_str())


def folder_files(family: str) -> dict[str, Any]:
    header, data = {}, b""
    for name, (shape, values) in tensors(family).items():
        header[f"model.{name}"] = entry("F32", shape, len(data), len(data) + len(values))
        data += values
    return {
        "config.json": {
            "model_type": family, "vocab_size": len(TOKENS),
            "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu",
            "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "head_dim": HIDDEN // HEADS,
            "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1,
        },
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": [2], "temperature": 0.7, "top_p": 0.9},
        "tokenizer_config.json": {
            "bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}, "unk_token": "<unk>",
            "chat_template": TEMPLATE, "added_tokens_decoder": {"2": {"content": "</s>", "special": True}},
        },
        "special_tokens_map.json": {"bos_token": "<s>", "eos_token": "</s>"},
        "tokenizer.json": tokenizer_json(),
        "model.safetensors": (header, data),
    }  # fmt: skip


def any_json(rng: random.Random, depth: int = 0) -> Any:
    choice = rng.randrange(9 if depth < 3 else 6)
    if choice < 2:
        return rng.choice([*INTEGERS, 1 << 64, 10**30])
    if choice == 2:
        return rng.choice(NUMBERS)
    if choice == 3:
        return rng.choice(TEXTS)
    if choice == 4:
        return rng.choice([None, True, False])
    if choice < 7:
        return [any_json(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {
        rng.choice([*TEXTS, "type", "rope_type", "factor"]): any_json(rng, depth + 1) for _ in range(rng.randrange(4))
    }


EXTRA_KEYS = ("rope_scaling", "rope_theta", "head_dim", "sliding_window", "layer_types", "attention_bias", "x")


def change_json(value: Any, rng: random.Random) -> Any:
    """The value with one thing in it changed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        action = rng.randrange(5)
        if action == 0:
            return {name: item for name, item in value.items() if name != key}
        if action == 1:
            return value | {rng.choice(EXTRA_KEYS): any_json(rng)}
        return value | {key: change_json(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], change_json(value[at], rng), *value[at + 1 :]]
    return any_json(rng)


def make_folder(rng: random.Random) -> bytes:
    """One changed Hugging Face folder, as a ZIP archive."""
    files = folder_files(rng.choice(FAMILIES))
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        name = rng.choice(["config.json", "config.json", "generation_config.json", "tokenizer_config.json",
                           "special_tokens_map.json", "model.safetensors", "missing"])  # fmt: skip
        if name == "missing":
            files.pop(rng.choice(list(files)))
        elif name == "model.safetensors" and name in files:
            header, data = files[name]
            files[name] = (change_json(header, rng), data)
        elif name in files:
            files[name] = change_json(files[name], rng)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), encoded(content))
    return out.getvalue()


def check_folder(data: bytes) -> bool:
    """Whether it answered."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            archive.extractall(folder)
        return run(Path(folder), data)


def encoded(content: Any) -> bytes:
    if isinstance(content, tuple):
        return safetensors_file(*content)
    return (content if isinstance(content, str) else json.dumps(content)).encode("utf-8", "surrogatepass")
