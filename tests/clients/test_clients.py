"""Clients that others wrote, against a server that runs: OpenAI's for Node, LangChain, LlamaIndex, and
lm-evaluation-harness. `make test-clients` installs them into build/clients, and nothing of Octavo's."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, SamplingParams
from tests.server.test_serve import served

HERE = Path(__file__).parent
CLIENTS = Path(__file__).parents[2] / "build" / "clients"
PYTHON = CLIENTS / "bin" / "python"
NODE, MODULES = shutil.which("node"), CLIENTS / "node_modules"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="make test-clients installs the clients"),
]


def run(*command: str | Path, cwd: Path = HERE, **variables: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **variables}, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def url(qwen2_path: Path) -> Iterator[str]:
    """Of a server with a model that has learnt to call tools."""
    flags = ["--served-model-name", "served", "--max-model-len", "4096", "--api-key", "sk-key"]
    with served(qwen2_path, *flags) as (_, url):
        yield url


def test_node(url: str, tmp_path: Path) -> None:
    if NODE is None:
        pytest.skip("there is no node")
    # Modules are looked for beside the program.
    (tmp_path / "node_modules").symlink_to(MODULES)
    shutil.copy(HERE / "node_client.mjs", tmp_path)
    told = run(NODE, "node_client.mjs", url, cwd=tmp_path)
    assert told.split() == ["chat", "toolCalls", "structured", "otherRoutes", "errors", "aborts"]


@pytest.mark.parametrize("name", ["langchain", "llama_index"])
def test_frameworks(url: str, name: str) -> None:
    told = run(PYTHON, f"{name}_client.py", url).split()
    assert told[:5] == ["messages", "tools", "structured", "texts", "embeddings"]


# --- lm-evaluation-harness ---


@pytest.fixture(scope="module")
def smollm2_url(smollm2_path: Path) -> Iterator[str]:
    flags = ["--served-model-name", "served", "--max-model-len", "1024", "--enable-tokenizer-info-endpoint"]
    with served(smollm2_path, *flags) as (_, url):
        yield url


@pytest.fixture(scope="module")
def llm(smollm2_path: Path) -> Iterator[LLM]:
    with LLM(str(smollm2_path), max_model_len=1024) as llm:
        yield llm


def samples(url: str, folder: Path, *flags: str, **arguments: Any) -> dict[str, list[dict[str, Any]]]:
    """What the harness has asked, and got, by task."""
    given = {"model": "served", "base_url": f"{url}/v1/completions", "max_length": 512, **arguments}
    model = ["--model", "local-completions", "--model_args", ",".join(f"{name}={given[name]}" for name in given)]
    tasks = ["--include_path", "lm_eval_tasks", "--tasks", "octavo_choice,octavo_loglikelihood,octavo_rolling"]
    tasks[-1] += ",octavo_generate"
    told = ["--output_path", str(folder / "out"), "--log_samples"]
    offline = {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    run(CLIENTS / "bin" / "lm_eval", *model, *tasks, *told, *flags, **offline)
    return {
        path.name.split("_20")[0].removeprefix("samples_octavo_"): [json.loads(line) for line in path.open()]
        for path in (folder / "out").rglob("samples_*.jsonl")
    }


def tokens_of(llm: LLM, context: str, more: str) -> tuple[list[int], int]:
    """Of both, and how many are the context's, as the harness has it: spaces at the context's end are the rest's."""
    stripped = context.rstrip()
    context, more = stripped, context[len(stripped) :] + more
    whole = llm.tokenizer.encode(context + more, add_special_tokens=False)
    if context:
        return whole, len(llm.tokenizer.encode(context, add_special_tokens=False))
    assert llm.tokenizer.bos_token_id is not None
    return [llm.tokenizer.bos_token_id, *whole], 1


def loglikelihood(llm: LLM, token_ids: list[int], start: int) -> tuple[float, bool]:
    """By the library: of the tokens from `start` on, and whether each is the most probable one."""
    (output,) = llm.generate([{"prompt_token_ids": token_ids}], SamplingParams(max_tokens=1, prompt_logprobs=0))
    assert output.prompt_logprobs is not None
    rows = [row or {} for row in output.prompt_logprobs]
    found = [rows[place][token_ids[place]] for place in range(start, len(token_ids))]
    return math.fsum(one.logprob for one in found), all(one.rank == 1 for one in found)


@pytest.mark.parametrize(
    ("flags", "arguments"),
    [
        ((), {"num_concurrent": 4}),
        ((), {"tokenized_requests": False}),
        (("--batch_size", "3"), {}),
    ],
    ids=["tokens", "texts", "batches"],
)
def test_lm_eval(smollm2_url: str, llm: LLM, tmp_path: Path, flags: tuple[str, ...], arguments: dict[str, Any]) -> None:
    """Its log-likelihoods, of choices, continuations and whole texts, are the library's; and so are its answers."""
    found = samples(smollm2_url, tmp_path, *flags, **arguments)
    assert {task: len(listed) for task, listed in found.items()} == {
        "choice": 2,
        "loglikelihood": 6,
        "rolling": 6,
        "generate": 6,
    }
    greedy = []
    for sample in found["choice"] + found["loglikelihood"]:
        for asked, (response,) in zip(sample["arguments"].values(), sample["resps"], strict=True):
            expected = loglikelihood(llm, *tokens_of(llm, asked["arg_0"], asked["arg_1"]))
            assert float(response[0]) == pytest.approx(expected[0], abs=1e-3)
            assert (response[1] == "True") == expected[1]
            greedy.append(expected[1])
    assert len(greedy) == 12 and any(greedy) and not all(greedy)
    assert all(sample["acc"] == 1 for sample in found["choice"])
    for sample in found["rolling"]:
        ((response,),) = sample["resps"]
        expected = loglikelihood(llm, *tokens_of(llm, "", sample["arguments"]["gen_args_0"]["arg_0"]))
        assert float(response) == pytest.approx(expected[0], abs=1e-3)
    for sample in found["generate"]:
        asked = sample["arguments"]["gen_args_0"]
        stop = [*asked["arg_1"]["until"], "<|im_end|>"]
        params = SamplingParams(temperature=0, max_tokens=20, stop=stop)
        (output,) = llm.generate([asked["arg_0"]], params)
        assert sample["resps"] == [[output.outputs[0].text]]
