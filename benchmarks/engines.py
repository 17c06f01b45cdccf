"""The engines that compare.py asks, and the commands that start-up is timed of."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_PROMPT = "The capital of France is"
MAX_SEQUENCES, MAX_TOKENS = 32, 8192  # at once; of each


@dataclass(frozen=True)
class Work:
    """What is timed."""

    name: str
    sequences: int
    prompt: int  # tokens of each
    new: int  # tokens of each; 0: the prompt alone is timed
    beams: int = 0  # width of a beam search; 0: greedy
    shared: int = 0  # tokens of the prompts that are the same in all sequences; then the whole is timed
    warm: bool = False  # the same prompts a second time, with whatever the engine has kept of them
    unit: str = "tok/s"


# --- engines: each gives run(prompts, work): the prompts, and `work.new` tokens after the first of each ---

Run = Callable[[list[list[int]], Work], None]


class MissingError(Exception):
    """An engine cannot do a work; the message says why."""


def load_octavo(model: str, threads: int) -> Run:
    import octavo

    llm = octavo.LLM(model, threads=threads, max_num_seqs=MAX_SEQUENCES, max_model_len=MAX_TOKENS)

    def run(prompts: list[list[int]], work: Work) -> None:
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        if work.beams:
            params = octavo.BeamSearchParams(beam_width=work.beams, max_tokens=work.new + 1, ignore_eos=True)
            llm.beam_search(given, params)
        else:
            params = octavo.SamplingParams(temperature=0, max_tokens=work.new + 1, ignore_eos=True, detokenize=False)
            llm.generate(given, params)

    return run


def load_beams_by_requests(model: str, threads: int) -> Run:
    """Beam search as vLLM's `LLM.beam_search` does it, on Octavo's engine: in each step a request of one token for each
    beam, with the log-probabilities of twice as many tokens as there are beams; the prefix cache carries the KV."""
    import octavo

    llm = octavo.LLM(model, threads=threads, max_num_seqs=MAX_SEQUENCES, max_model_len=MAX_TOKENS)

    def run(prompts: list[list[int]], work: Work) -> None:
        if not work.beams:
            raise MissingError("it is a way to search")
        params = octavo.SamplingParams(max_tokens=1, temperature=0, logprobs=2 * work.beams, detokenize=False)
        beams = [(0.0, prompts[0])]
        for _ in range(work.new + 1):
            outputs = llm.generate([{"prompt_token_ids": tokens} for _, tokens in beams], params)
            candidates = [
                (score + entry.logprob, [*tokens, token_id])
                for (score, tokens), output in zip(beams, outputs, strict=True)
                for token_id, entry in output.outputs[0].logprobs[0].items()
            ]
            beams = sorted(candidates, key=lambda candidate: -candidate[0])[: work.beams]

    return run


def load_llama_cpp(model: str, threads: int) -> Run:
    import ctypes

    import llama_cpp

    llama_cpp.llama_backend_init()
    llama_cpp.llama_log_set(ctypes.cast(None, llama_cpp.llama_log_callback), ctypes.c_void_p(0))
    loaded = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()  # flash attention is on where it can be
    params.kv_unified = True
    return llama_loop(
        llama_cpp,
        loaded,
        params,
        threads,
        lambda context: llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False),
    )


def load_ik_llama_cpp(model: str, threads: int) -> Run:
    """The same loop over ik_llama.cpp: its library has the interface of an older llama.cpp."""
    from ik_llama_cpp import _ctypes_api as ik  # what the package offers beside it decodes one sequence only

    ik.llama_backend_init()
    model_params = ik.llama_model_default_params()
    model_params.n_seq_max = MAX_SEQUENCES
    loaded = ik.llama_model_load_from_file(model.encode(), model_params)
    params = ik.llama_context_default_params()
    params.flash_attn = True  # the package's own class turns it off on every processor but those with AVX-VNNI
    return llama_loop(ik, loaded, params, threads, ik.llama_kv_cache_clear)


def llama_loop(api: Any, loaded: Any, params: Any, threads: int, clear: Callable[[Any], None]) -> Run:
    """Greedy decoding with `llama_decode` alone. `api` has the functions, `clear` empties the context's KV cache."""
    import numpy as np

    if not loaded:
        raise RuntimeError("it does not read the model")
    vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(loaded))
    params.n_ctx, params.n_seq_max, params.n_batch, params.n_ubatch = 32 * 640, MAX_SEQUENCES, MAX_TOKENS, 512
    params.n_threads = params.n_threads_batch = threads
    context = api.llama_init_from_model(loaded, params)
    if not context:
        raise RuntimeError("it makes no context")
    batch = api.llama_batch_init(MAX_TOKENS, 0, 1)

    def put(token: int, position: int, sequence: int, wanted: bool) -> None:
        i = batch.n_tokens
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
        batch.seq_id[i][0] = sequence
        batch.n_tokens += 1

    def best(row: int) -> int:
        logits = api.llama_get_logits_ith(context, row)
        return int(np.ctypeslib.as_array(logits, (vocab_size,)).argmax())

    def decode() -> None:
        if api.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")

    def run_batch(rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """(token, position, sequence, wanted) of any number; the best next token after each wanted one."""
        found = []
        for first in range(0, len(rows), MAX_TOKENS):
            batch.n_tokens = 0
            for row in rows[first : first + MAX_TOKENS]:
                put(*row)
            decode()
            found += [best(i) for i, row in enumerate(rows[first : first + MAX_TOKENS]) if row[3]]
        return found

    def run(prompts: list[list[int]], work: Work) -> None:
        if work.beams:
            raise MissingError("it has no beam search")
        if work.shared:
            raise MissingError("its server shares prefixes: see llama-server")
        clear(context)
        last = len(prompts[0]) - 1
        tokens = run_batch([(id_, i, s, i == last) for s, prompt in enumerate(prompts) for i, id_ in enumerate(prompt)])
        for step in range(work.new):
            tokens = run_batch([(token, last + 1 + step, s, True) for s, token in enumerate(tokens)])

    return run


def load_llama_server(model: str, threads: int) -> Run:
    """llama.cpp's own server, with a slot for each request of a burst; asked over HTTP, all at once."""
    from concurrent.futures import ThreadPoolExecutor

    from llama_server import LlamaServer

    settings = ["--parallel", "16", "--kv-unified", "--ctx-size", "20480"]
    ask = LlamaServer([os.environ["COMPARE_LLAMA_SERVER"]], model, threads, *settings).ask

    def run(prompts: list[list[int]], work: Work) -> None:
        if not work.shared:
            raise MissingError("it is timed with bursts of requests only")
        body = {"n_predict": work.new + 1, "temperature": 0, "ignore_eos": True, "cache_prompt": True}
        with ThreadPoolExecutor(len(prompts)) as users:
            for answer in users.map(lambda prompt: ask("/completion", body | {"prompt": prompt}), prompts):
                if answer["tokens_predicted"] != work.new + 1:
                    raise RuntimeError(f"it gave {answer['tokens_predicted']} tokens")

    return run


def load_openvino(model: str, threads: int, **more: str) -> Run:
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    pipelines: dict[bool, Any] = {}  # by whether requests share a prefix; each is made when it is needed

    def pipeline(shared: bool) -> Any:
        if shared not in pipelines:
            pipelines.clear()
            settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, **more}
            if shared:  # continuous batching with its prefix cache
                settings["scheduler_config"] = scheduler = genai.SchedulerConfig()
                scheduler.enable_prefix_caching = True
                scheduler.max_num_batched_tokens, scheduler.cache_size = 512, 4
            pipelines[shared] = genai.LLMPipeline(model, "CPU", **settings)
        return pipelines[shared]

    def run(prompts: list[list[int]], work: Work) -> None:
        config = genai.GenerationConfig()
        config.do_sample, config.ignore_eos = False, True
        if work.beams:
            config.num_beams, config.num_beam_groups, config.num_return_sequences = work.beams, 1, 1
            config.stop_criteria = genai.StopCriteria.NEVER
        config.max_new_tokens = config.min_new_tokens = work.new + 1
        ids = np.array(prompts, np.int64)
        inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        pipeline(bool(work.shared)).generate(inputs, config)

    return run


def load_openvino_f32(model: str, threads: int) -> Run:
    """OpenVINO in float32, as it computes by default where the processor has no bfloat16."""
    return load_openvino(model, threads, INFERENCE_PRECISION_HINT="f32")


def load_transformers(model: str, threads: int) -> Run:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    path = Path(model)
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)

    def run(prompts: list[list[int]], work: Work) -> None:
        ids = torch.tensor(prompts)
        with torch.no_grad():
            loaded.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=work.new + 1,
                min_new_tokens=work.new + 1,
                do_sample=False,
                num_beams=work.beams or 1,
                pad_token_id=0,
                **({"early_stopping": "never"} if work.beams else {}),
            )

    return run


# --- vLLM: it reads no GGUF on processors, so it gets the same weights dequantised ---


def load_vllm(model: str, threads: int) -> Run:
    """In bfloat16 where the processor has AVX-512, for which its products of bfloat16 are made, else in float32.

    Its prefix cache is on: beam search and bursts need it. In other works it finds nothing, since their prompts differ.
    """
    folder = float_checkpoint(Path(model))
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import BeamSearchParams

    llm = LLM(
        str(folder),
        dtype="bfloat16" if "avx512f" in processor_flags() else "float32",
        max_model_len=MAX_TOKENS,
        max_num_seqs=MAX_SEQUENCES,
        enable_prefix_caching=True,
    )

    def run(prompts: list[list[int]], work: Work) -> None:
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        if work.beams:
            beams = BeamSearchParams(beam_width=work.beams, max_tokens=work.new + 1, ignore_eos=True)
            llm.beam_search(given, beams)
        else:
            greedy = SamplingParams(temperature=0, max_tokens=work.new + 1, ignore_eos=True, detokenize=False)
            llm.generate(given, greedy, use_tqdm=False)

    return run


def float_checkpoint(model: Path) -> Path:
    """A folder of safetensors in bfloat16 of a GGUF file's weights and its tokenizer, written when first asked for."""
    import shutil
    import tempfile

    import torch
    import transformers

    folder = Path(os.environ["COMPARE_CHECKPOINTS"])
    done = folder / f"{model.stem}-{model.stat().st_size}-{model.stat().st_mtime_ns}"
    if not done.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=folder, prefix=f".{model.stem}."))
        try:
            settings: dict[str, Any] = {"gguf_file": model.name, "dtype": torch.bfloat16}
            if hasattr(transformers, "GgufConfig"):  # newer versions keep the weights as they are unless told so
                settings["quantization_config"] = transformers.GgufConfig(dequantize=True)
            transformers.AutoModelForCausalLM.from_pretrained(model.parent, **settings).save_pretrained(part)
            transformers.AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name).save_pretrained(part)
            part.rename(done)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return done


def vllm_environment(python: str, threads: int) -> dict[str, str]:
    """What vLLM reads before it starts: a processor for each thread, 4 GiB of KV cache, and the libraries it recommends
    to load first, where they are: OpenMP's, which its wheel brings along, and the allocator's."""
    processors = sorted(os.sched_getaffinity(0))[:threads]
    beside = Path(python).parent.parent / "lib" / "libiomp5.so"
    found = [beside, *Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4")]
    preload = [os.environ.get("LD_PRELOAD", ""), *(str(library) for library in found if library.exists())]
    return {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, processors)),
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "LD_PRELOAD": ":".join(filter(None, preload)),
    }


def processor_flags() -> list[str]:
    """What the processor can do, as Linux names it; nothing where it does not say."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line.split(":", 1)[1].split()
    return []


ENGINES: dict[str, Callable[[str, int], Run]] = {
    "octavo": load_octavo,
    "vllm-method": load_beams_by_requests,
    "llama.cpp": load_llama_cpp,
    "ik_llama.cpp": load_ik_llama_cpp,
    "llama-server": load_llama_server,
    "openvino": load_openvino,
    "openvino-f32": load_openvino_f32,
    "transformers": load_transformers,
    "vllm": load_vllm,
}


PACKAGES = {"octavo": "octavo", "vllm-method": "octavo", "llama.cpp": "llama-cpp-python"}
PACKAGES |= {"ik_llama.cpp": "ik-llama-cpp-python", "openvino": "openvino-genai", "openvino-f32": "openvino-genai"}
PACKAGES |= {"transformers": "transformers", "vllm": "vllm-cpu"}


def version(engine: str) -> str:
    """Of the package that an engine is; unknown of a program, and of a package that is not installed."""
    try:
        return importlib.metadata.version(PACKAGES[engine])
    except (KeyError, importlib.metadata.PackageNotFoundError):
        return "unknown"


# --- start-up: what a user would run, in a process of its own; compare.py's imports are not part of it ---

LLAMA_CPP_START = """
import sys
import llama_cpp
model, threads, prompt = sys.argv[1], int(sys.argv[2]), sys.argv[3]
llm = llama_cpp.Llama(model, n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)
for part in llm(prompt, max_tokens=1, temperature=0, stream=True):
    print(part["choices"][0]["text"], flush=True)
    break
"""


def start_command(engine: str, python: str, model: str, threads: int) -> list[str]:
    if engine == "octavo":
        settings = [
            "--model",
            model,
            "--threads",
            str(threads),
            "--max-tokens",
            "1",
            "--ignore-eos",
            "--temperature",
            "0",
        ]
        return [str(Path(python).with_name("octavo")), "run", "--raw", *settings, START_PROMPT]
    if engine == "llama.cpp":
        return [python, "-c", LLAMA_CPP_START, model, str(threads), START_PROMPT]
    raise MissingError("its start-up is not timed")
