"""Tiny tokenizers trained on the spot: as transformers has them (the oracle) and as the metadata of a GGUF file."""

from __future__ import annotations

import copy
import functools
import io
import json
import random
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as FastTokenizer
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from .corpus import corpus

# The pre-tokenizers of the models' own tokenizer.json files, written out.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
USER_DEFINED = ["<think>", "</think>"]

# What puts a space before a text, in the models' tokenizer.json files of older and newer make.
PREPEND = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def _pre_tokenizer(kind: str) -> pre_tokenizers.PreTokenizer:
    if kind in ("gpt-2", "default"):
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        return pre_tokenizers.Sequence(steps)
    split = pre_tokenizers.Split(Regex(QWEN2 if kind == "qwen2" else LLAMA3), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def byte_level(kind: str, vocab_size: int = 1500) -> tuple[PreTrainedTokenizerFast, dict[str, Any]]:
    """A byte-level BPE tokenizer with pre-tokenizer `kind`: (transformers tokenizer, GGUF metadata), both new."""
    spec, metadata = _byte_level(kind, vocab_size)
    fast = FastTokenizer.from_str(spec)
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|im_end|>"), copy.deepcopy(metadata)


@functools.cache
def _byte_level(kind: str, vocab_size: int) -> tuple[str, dict[str, Any]]:
    fast = FastTokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    fast.pre_tokenizer = _pre_tokenizer(kind)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=CONTROL,
        show_progress=False,
    )
    fast.train_from_iterator(corpus(seed=1) * 2, trainer)
    fast.add_tokens([AddedToken(text, normalized=False) for text in USER_DEFINED])
    spec = fast.to_str()
    tokens = [fast.id_to_token(n) for n in range(fast.get_vocab_size())]
    types = [3 if t in CONTROL else 4 if t in USER_DEFINED else 1 for t in tokens]
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": kind,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in json.loads(spec)["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
    }
    return spec, metadata


def scored(seed: int, add_space_prefix: bool, byte_fallback: bool = True) -> tuple[LlamaTokenizer, dict[str, Any]]:
    """A SentencePiece-style tokenizer with random scores, some equal: (transformers tokenizer, which everybody
    shares, and GGUF metadata, the caller's own)."""
    theirs, metadata = _scored(seed, add_space_prefix, byte_fallback)
    return theirs, copy.deepcopy(metadata)


@functools.cache
def _scored(seed: int, add_space_prefix: bool, byte_fallback: bool) -> tuple[LlamaTokenizer, dict[str, Any]]:
    rng = random.Random(seed)
    texts = [text.replace(" ", "▁") for text in corpus(seed=seed)]
    pieces = set()
    for text in texts:
        for size in (1, 2, 3, 4, 6, 8):
            for _ in range(2):
                start = rng.randrange(max(1, len(text) - size + 1))
                pieces.add(text[start : start + size])
    # Every part of a piece as well, so that merging can reach it.
    pieces |= {piece[:n] for piece in pieces for n in range(1, len(piece)) if rng.random() < 0.8}
    pieces |= {piece[n:] for piece in pieces for n in range(1, len(piece)) if rng.random() < 0.5}
    pieces |= set("▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?'\"()<>|/")
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)] if byte_fallback else []
    control, user = ["<s>", "</s>"], ["<think>", "</think>"]
    # transformers may merge an unknown character with its neighbours where a token spells "<unk>" out.
    ordinary = sorted({p for p in pieces if "<unk>" not in p} - {"", *control, *user, *byte_tokens})
    rng.shuffle(ordinary)
    tokens = ["<unk>", *control, *byte_tokens, *user, *ordinary]
    types = [2] + [3] * 2 + [6] * len(byte_tokens) + [4] * 2 + [1] * len(ordinary)
    scores = [0.0] * (len(tokens) - len(ordinary)) + [-float(rng.randrange(len(ordinary))) for _ in ordinary]
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": add_space_prefix,
    }
    return _llama_oracle(metadata, add_space_prefix), metadata


SENTENCE = "a whale is a mammal and a shark is a fish true London Paris hello world the quick brown fox"


def sentencepiece_json(normalizer: Any = PREPEND, pre_tokenizer: Any = None) -> FastTokenizer:
    """A tokenizer.json as models with a SentencePiece vocabulary have it: 256 byte tokens, some words, ``<s>`` and
    ``</s>``, and by default a space put before every piece of text."""
    trained = FastTokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, special_tokens=["<unk>", "<s>", "</s>"])
    trained.train_from_iterator([SENTENCE] * 2, trainer)
    model = json.loads(trained.to_str())["model"]
    vocab = model["vocab"]
    for text in [f"<0x{byte:02X}>" for byte in range(256)]:
        vocab[text] = len(vocab)
    merges = [tuple(merge) for merge in model["merges"]]
    fast = FastTokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    fast.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    fast.normalizer, fast.pre_tokenizer = normalizer, pre_tokenizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    fast.decoder = decoders.Sequence(steps)
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", fast.token_to_id("<s>"))]
    )
    return fast


def save_folder(fast: FastTokenizer, folder: Path, **config: Any) -> Path:
    """tokenizer.json and tokenizer_config.json of it; `config` goes into the latter."""
    fast.save(str(folder / "tokenizer.json"))
    named = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(named | config))
    return folder


def _llama_oracle(metadata: dict[str, Any], add_space_prefix: bool) -> LlamaTokenizer:
    """transformers' tokenizer for Llama 2, with the merges that the scores imply written out."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    vocab = {token: n for n, token in enumerate(tokens)}
    merges = []
    for n, token in enumerate(tokens):
        if metadata["tokenizer.ggml.token_type"][n] in (2, 3, 6):
            continue  # SentencePiece never merges into these
        for cut in range(1, len(token)):
            if token[:cut] in vocab and token[cut:] in vocab:
                merges.append((scores[n], cut, n, token[:cut], token[cut:]))
    merges.sort(key=lambda merge: (-merge[0], -merge[1], merge[1] - len(tokens[merge[2]]), merge[2]))
    hf = LlamaTokenizer(
        vocab=vocab, merges=[merge[3:] for merge in merges], add_prefix_space=add_space_prefix, add_bos_token=True
    )
    if not any(kind == 6 for kind in metadata["tokenizer.ggml.token_type"]):
        hf.backend_tokenizer.model.byte_fallback = False
        hf.backend_tokenizer.model.unk_token = "<unk>"
    if add_space_prefix:  # as the models' own files have it; LlamaTokenizer adds a space at the very start alone
        hf.backend_tokenizer.normalizer, hf.backend_tokenizer.pre_tokenizer = PREPEND, None  # type: ignore[assignment]
    hf.add_tokens([AddedToken(text, normalized=False, special=False) for text in ("<think>", "</think>")])
    return hf


@functools.cache
def sentencepiece_gguf() -> tuple[SentencePieceProcessor, dict[str, Any]]:
    """SentencePiece itself, trained with Llama 2's settings, and its vocabulary as the metadata of a GGUF file."""
    model = io.BytesIO()
    texts = [text for text in corpus(seed=5)[:400] if text.isascii() and "\x00" not in text]
    SentencePieceTrainer.Train(
        sentence_iterator=iter([SENTENCE, *texts, "[INST] Hello there [/INST]"]),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    theirs = SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(theirs.get_piece_size())
    types = [2 if theirs.is_unknown(n) else 3 if theirs.is_control(n) else 6 if theirs.is_byte(n) else 1 for n in ids]
    return theirs, {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [theirs.id_to_piece(n) for n in ids],
        "tokenizer.ggml.scores": [theirs.get_score(n) for n in ids],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": theirs.bos_id(),
        "tokenizer.ggml.eos_token_id": theirs.eos_id(),
        "tokenizer.ggml.unknown_token_id": theirs.unk_id(),
    }
