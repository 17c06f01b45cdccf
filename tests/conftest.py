"""Models for tests: the small real ones, fetched on first use, and tiny random ones made on the spot."""

from __future__ import annotations

import os
import sys

# Before NumPy and PyTorch load: their threads wait for one another actively, which on a busy machine costs more than
# they bring.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Programs that tests start, dozens of them, and pytest itself would otherwise compile every module anew each time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from octavo.hub import resolve_model

if TYPE_CHECKING:
    from octavo import LLM

sys.dont_write_bytecode = False  # as above

# A suite that a shell runs in the background would ignore Ctrl-C, and with it the programs that it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that use a real model are marked with its name, so that ``-m "not smollm2"`` leaves them out."""
    for item in items:
        for fixture in getattr(item, "fixturenames", ()):
            if fixture in ("smollm2_path", "gemma3_path", "qwen2_path"):
                item.add_marker(fixture.removesuffix("_path"))


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct, Q4_1 GGUF."""
    return resolve_model("smollm2")


@pytest.fixture(scope="session")
def gemma3_path() -> Path:
    """Gemma 3 270M (base), Q4_K_M GGUF."""
    return resolve_model("gemma3-270m")


@pytest.fixture(scope="session")
def qwen2_path() -> Path:
    """Qwen2.5-Coder 0.5B Instruct, Q4_K_M GGUF: for slow tests only, since it is half a gigabyte."""
    from tests.qwen2_from_pypi import qwen2_file

    return qwen2_file()


@pytest.fixture(scope="session")
def smollm2_llm(smollm2_path: Path) -> Iterator[LLM]:
    """The real small model. Shared by the session: leave no request behind."""
    from octavo import LLM

    with LLM(str(smollm2_path), backend="reference", max_model_len=2048, max_num_seqs=16) as llm:
        yield llm


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with grouped heads, a context of 4096 and a byte-level tokenizer with ChatML."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    vocab_size = _save_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        **_special_ids(),
    )
    _save_model(LlamaForCausalLM, config, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of sizes that the cpu backend takes, whose answers are the same bit for bit."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    vocab_size = _save_tokenizer(folder)
    _save_model(LlamaForCausalLM, LlamaConfig(vocab_size=vocab_size, **sizes, **heads, **_special_ids()), folder)
    return folder


@pytest.fixture(scope="session")
def tiny_gemma3_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Gemma 3 of six layers, the last with full attention, the others with a window of 16."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    folder = tmp_path_factory.mktemp("tiny-gemma3")
    vocab_size = _save_tokenizer(folder)
    config = Gemma3TextConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=16,
        max_position_embeddings=1024,
        **_special_ids(),
    )
    _save_model(Gemma3ForCausalLM, config, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sentencepiece_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of one layer whose tokenizer puts a space before every text. It has a token ``<pad>`` for which
    the model has no row, and two chat templates."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.text.tiny import save_folder, sentencepiece_json

    folder = tmp_path_factory.mktemp("tiny-sentencepiece")
    fast = sentencepiece_json()
    config = LlamaConfig(
        vocab_size=fast.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    _save_model(LlamaForCausalLM, config, folder)
    fast.add_special_tokens(["<pad>"])
    sources = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools[0].name }}: {{ messages[0].content }}"}
    templates = [{"name": name, "template": source} for name, source in sources.items()]
    save_folder(fast, folder, pad_token="<pad>", chat_template=templates)
    return folder


def _special_ids() -> dict[str, int]:
    return {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _save_model(kind: type, config: object, folder: Path) -> None:
    import torch

    torch.manual_seed(0)
    model = kind(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # far from uniform, so that greedy choices are clear
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)


def _save_tokenizer(folder: Path) -> int:
    """Writes tokenizer.json and tokenizer_config.json: the 256 bytes, some pairs and ChatML's tokens. Its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=272,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=_SPECIAL,
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog and then the other one"] * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": _CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer.get_vocab_size()
