"""What Writing in the Margins costs: a document read with notes, beside reading and answering it plainly.

Each round runs, one after the other and from an empty cache: `plain` (the document and the question, answered),
`overlapped` (margins are written while the document is read on), `sequential` (each before the next segment is read),
`sessions` (a script over sessions that does the same one margin after the other) and `second` (another question about a
document that was read overlapped). Margins and answers have a fixed number of tokens and all margins are kept, so that
the work is the same in each. Times are to the end of the answer but for `first` and `second`, which are to its first
token.

Then there are scripts that only send requests, one a margin, one a verdict and one for the answer, and leave it to the
prefix cache that the document is read once: `requests` sends them one after the other to Octavo's engine,
`requests-batched` all margins at once behind the document, then all verdicts, and `llama-server` one after the other to
llama.cpp's server. Of each, NAME-first and NAME-second are the times to the first token of the answer and of a second
question's.

    python benchmarks/margins.py --model smollm2 --threads 2 --tokens 6000 --segments 512 1024 2048 \
        --peer llama-server=PATH/llama-server
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import shlex
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

from llama_server import LlamaServer
from octavo import LLM, AnswerDelta, MarginsParams, SamplingParams
from octavo.hub import resolve_model
from octavo.margins_request import MarginsRequest, make_margins

QUESTIONS = "How does the with statement work?", "What is a descriptor?"
ONCE = SamplingParams(temperature=0, max_tokens=1)
VERDICT = SamplingParams(temperature=0, max_tokens=1, logprobs=20)


def document_of(llm: LLM, num_tokens: int) -> str:
    """From the texts that `help()` shows, which come with Python."""
    text = "\n\n".join(pydoc_data.topics.topics.values())
    text = text[: 6 * num_tokens]
    while len(llm.tokenizer.encode(text)) > num_tokens:
        text = text[: len(text) - max(len(text) // 400, 1)]
    return text


class Peer(Protocol):
    """Answers requests, and keeps the KV of their prompts for those that begin alike."""

    def forget(self) -> None:
        """Nothing is cached any more."""

    def set_by(self) -> None:
        """Another question about what was read last is to come; what is done for that now is in nobody's time."""

    def texts(self, prompts: Sequence[list[int]], params: SamplingParams) -> list[str]: ...

    def stream(self, prompt: list[int], params: SamplingParams) -> Iterator[Any]: ...


class Octavo:
    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    def forget(self) -> None:
        self.llm.reset_prefix_cache()

    def set_by(self) -> None: ...

    def texts(self, prompts: Sequence[list[int]], params: SamplingParams) -> list[str]:
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [output.outputs[0].text for output in self.llm.generate(given, params, use_tqdm=False)]

    def stream(self, prompt: list[int], params: SamplingParams) -> Iterator[Any]:
        return self.llm.stream({"prompt_token_ids": prompt}, params)


class Llama:
    """llama.cpp's server. A slot of it keeps what it computed for its last request, cut back to what the next has in
    common with that. So verdicts have a slot of their own, and a second question gets a copy of the document: its
    margins cut back the one, its answer follows the other."""

    TRUNK, VERDICTS, COPY = range(3)

    def __init__(self, command: Sequence[str], model: str, threads: int, context: int, folder: str) -> None:
        # Without prompts put away in memory: these would outlive `forget`, and here every prompt has its slot.
        settings = ["--parallel", "3", "--no-kv-unified", "--ctx-size", str(3 * context), "--cache-ram", "0"]
        self.server = LlamaServer(command, model, threads, *settings, "--swa-full", "--slot-save-path", folder)
        self.held: dict[int, list[int]] = {}  # by slot
        self.margins_slot = self.TRUNK

    def forget(self) -> None:
        for slot in range(3):
            self.server.ask(f"/slots/{slot}?action=erase", {})
        self.held.clear()
        self.margins_slot = self.TRUNK

    def set_by(self) -> None:
        for slot, action in (self.TRUNK, "save"), (self.COPY, "restore"):
            self.server.ask(f"/slots/{slot}?action={action}", {"filename": "trunk"})
        self.held[self.COPY] = self.held[self.TRUNK]
        self.margins_slot = self.COPY

    def texts(self, prompts: Sequence[list[int]], params: SamplingParams) -> list[str]:
        found = []
        for prompt in prompts:
            slot = self.VERDICTS if params is VERDICT else self.margins_slot
            answer = self.server.ask("/completion", self._body(prompt, params, slot))
            self._check(slot, prompt, answer, params)
            found.append(answer["content"])
        return found

    def stream(self, prompt: list[int], params: SamplingParams) -> Iterator[Any]:
        token_ids: list[int] = []
        for event in self.server.stream("/completion", self._body(prompt, params, self.TRUNK)):
            token_ids += event.get("tokens", [])
            yield event
        self._check(self.TRUNK, prompt, event | {"tokens": token_ids}, params)

    def _body(self, prompt: list[int], params: SamplingParams, slot: int) -> dict[str, Any]:
        return {
            "prompt": prompt,
            "id_slot": slot,
            "cache_prompt": True,
            "n_predict": params.max_tokens,
            "n_probs": params.logprobs or 0,
            "ignore_eos": params.ignore_eos,
            "temperature": 0,
            "top_k": 1,
            "samplers": ["top_k"],
            "return_tokens": True,
            "response_fields": ["content", "tokens", "tokens_predicted", "completion_probabilities", "timings"],
        }

    def _check(self, slot: int, prompt: list[int], answer: dict[str, Any], params: SamplingParams) -> None:
        """Everything that the slot held of the prompt was taken from there, and nothing else."""
        common = takewhile(lambda pair: pair[0] == pair[1], zip(self.held.get(slot, []), prompt, strict=False))
        num_cached = min(sum(1 for _ in common), len(prompt) - 1)
        self.held[slot] = [*prompt, *answer["tokens"]]
        cached, computed = answer["timings"]["cache_n"], answer["timings"]["prompt_n"]
        if (cached, computed) != (num_cached, len(prompt) - num_cached):
            raise RuntimeError(f"llama-server computed {computed} tokens and had {cached}, not {num_cached}")
        if answer["tokens_predicted"] != params.max_tokens:
            raise RuntimeError(f"llama-server gave {answer['tokens_predicted']} tokens, not {params.max_tokens}")


class Bench:
    def __init__(self, llm: LLM, document: str, segment_tokens: int, margin_tokens: int, answer_tokens: int) -> None:
        self.llm = llm
        self.document = document
        self.margin = SamplingParams(temperature=0, max_tokens=margin_tokens, ignore_eos=True)
        self.answer = SamplingParams(temperature=0, max_tokens=answer_tokens, ignore_eos=True)
        self.params = MarginsParams(
            segment_tokens=segment_tokens, margin=self.margin, answer=self.answer, threshold=-1e6, seed=0
        )

    def request(self, question: str = QUESTIONS[0]) -> MarginsRequest:
        return make_margins(self.llm._frontend, self.document, question, self.params)

    def plain(self) -> float:
        spec = self.request().spec
        before = [*spec.prefix, *spec.document]
        rest = self.llm.tokenizer.encode_following(before, spec.questions[0].answer_without)
        self.llm.reset_prefix_cache()
        began = time.perf_counter()
        self.llm.generate({"prompt_token_ids": [*before, *rest]}, self.answer, use_tqdm=False)
        return time.perf_counter() - began

    def read(self, overlap: bool, question: str = QUESTIONS[0], reset: bool = True) -> tuple[float, float]:
        """Seconds to the answer's first token, and to its last."""
        if reset:
            self.llm.reset_prefix_cache()
        began = time.perf_counter()
        first = 0.0
        for event in self.llm.stream_margins(self.document, question, self.params.but(overlap=overlap)):
            if isinstance(event, AnswerDelta) and not first:
                first = time.perf_counter() - began
        return first, time.perf_counter() - began

    def sessions(self) -> float:
        """One margin after the other, by the verbs that anybody can call."""
        request = self.request()
        spec, question, tokenizer = request.spec, request.spec.questions[0], self.llm.tokenizer
        self.llm.reset_prefix_cache()
        began = time.perf_counter()
        kept = []
        with self.llm.session() as trunk:
            trunk.extend({"prompt_token_ids": list(spec.prefix)})
            for segment, extract in zip(spec.segments, question.extract, strict=True):
                trunk.extend({"prompt_token_ids": list(spec.tokens_of(segment.index, segment.index + 1))})
                (branch,) = trunk.fork()
                branch.extend({"prompt_token_ids": list(extract)})
                text = branch.generate(self.margin).text.strip()
                branch.drop()
                rest = tokenizer.encode_following(question.classify_before, text + question.classify_after)
                with self.llm.session() as judge:
                    judge.extend({"prompt_token_ids": [*question.classify_before, *rest]})
                    judge.select([" YES", " NO"])
                kept.append(spec.margin_before + text + spec.margin_after)
            final = question.answer_before + "".join(kept) + question.answer_after
            trunk.extend({"prompt_token_ids": tokenizer.encode_following(trunk.token_ids, final)})
            trunk.generate(self.answer)
        return time.perf_counter() - began

    def requests(self, peer: Peer, batched: bool = False, second: bool = False) -> tuple[float, float]:
        """Seconds to the answer's first token, and to its last, by a request for each margin, each verdict and the
        answer. `second`: of another question, after the first."""
        spec = self.request(QUESTIONS[second]).spec
        question, encode_following = spec.questions[0], self.llm.tokenizer.encode_following
        if second:
            peer.set_by()
        else:
            peer.forget()
        began = time.perf_counter()
        trunk = [*spec.prefix, *spec.document]
        places = [segment.index for segment in spec.segments]
        turns = [places] if batched else [[place] for place in places]
        if batched:
            peer.texts([trunk], ONCE)
        elif second:
            turns.reverse()  # longest first: so nothing of the document is cut off before it is needed
        texts: dict[int, str] = {}
        for turn in turns:
            prompts = [[*spec.prefix, *spec.tokens_of(0, i + 1), *question.extract[i]] for i in turn]
            written = [text.strip() for text in peer.texts(prompts, self.margin)]
            rests = [encode_following(question.classify_before, text + question.classify_after) for text in written]
            peer.texts([[*question.classify_before, *rest] for rest in rests], VERDICT)
            texts |= zip(turn, written, strict=True)
        margins = "".join(spec.margin_before + texts[i] + spec.margin_after for i in places)
        rest = encode_following(trunk, question.answer_before + margins + question.answer_after)
        first = 0.0
        for _ in peer.stream([*trunk, *rest], self.answer):
            first = first or time.perf_counter() - began
        return first, time.perf_counter() - began

    def bound(self, rate: Callable[[int], float]) -> float:
        """Seconds that the tokens of an overlapped reading take as rows of prompts: prefill, margins, final prompt."""
        spec = self.request().spec
        question = spec.questions[0]
        trunk = len(spec.prefix) + len(spec.document)
        margins = sum(len(one) for one in question.extract) + len(spec.segments) * (
            2 * spec.margin.max_tokens + len(question.classify_before) + 30
        )
        final = len(spec.segments) * (spec.margin.max_tokens + 3) + 60
        return trunk / rate(trunk) + (margins + final) / rate(trunk)


def show(segment_tokens: int, found: dict[str, list[float]], peers: Sequence[str]) -> None:
    medians = [f"{name} {statistics.median(values):.2f} s" for name, values in found.items()]
    print(f"segments of {segment_tokens}:", ", ".join(medians))
    pairs = [("overlapped", "sequential"), ("overlapped", "plain"), ("overlapped", "sessions"), ("second", "first")]
    for name in peers:
        pairs += [("overlapped", name), ("first", f"{name}-first"), ("second", f"{name}-second")]
    for one, other in pairs:
        if one in found and other in found:
            ratios = [a / b for a, b in zip(found[one], found[other], strict=True)]
            low, high = min(ratios), max(ratios)
            print(f"  {one} / {other}: {statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--tokens", type=int, default=6000, help="of the document")
    parser.add_argument("--segments", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--margin-tokens", type=int, default=60)
    parser.add_argument("--answer-tokens", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    own = ["plain", "overlapped", "second", "sequential", "sessions", "requests", "requests-batched"]
    parser.add_argument("--only", nargs="+", default=own, help=f"of these: {', '.join(own)}")
    said = (
        "repeatable; settings of the server may follow the program, in the same argument, and are part of its name then"
    )
    parser.add_argument("--peer", action="append", default=[], metavar="llama-server=PROGRAM", help=said)
    parser.add_argument("--json", help="write all figures to this file")
    args = parser.parse_args()
    figures: dict[int, dict[str, list[float]]] = {}
    with ExitStack() as stack:
        llm = stack.enter_context(LLM(args.model, threads=args.threads))
        peers: dict[str, Peer] = {name: Octavo(llm) for name in ("requests", "requests-batched") if name in args.only}
        for given in args.peer:
            name, _, program = given.partition("=")
            command = shlex.split(program)
            if name != "llama-server" or not command or args.threads is None:
                parser.error("--peer takes llama-server=PROGRAM, and needs --threads")
            memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=memory))
            model, context = str(resolve_model(args.model)), llm._frontend.limits.max_model_len
            llama = Llama(command, model, args.threads, context, folder)
            stack.callback(llama.server.close)
            peers[" ".join([name, *command[1:]])] = llama
        document = document_of(llm, args.tokens)
        for segment_tokens in args.segments:
            bench = Bench(llm, document, segment_tokens, args.margin_tokens, args.answer_tokens)
            found: dict[str, list[float]] = figures.setdefault(segment_tokens, {})
            for number in range(args.rounds + 1):
                row: dict[str, float] = {}
                if "plain" in args.only:
                    row["plain"] = bench.plain()
                if "overlapped" in args.only:
                    row["first"], row["overlapped"] = bench.read(overlap=True)
                if "second" in args.only:
                    row["second"], _ = bench.read(overlap=True, question=QUESTIONS[1], reset=False)
                if "sequential" in args.only:
                    _, row["sequential"] = bench.read(overlap=False)
                if "sessions" in args.only:
                    row["sessions"] = bench.sessions()
                for name, peer in peers.items():
                    batched = name == "requests-batched"
                    row[f"{name}-first"], row[name] = bench.requests(peer, batched)
                    row[f"{name}-second"], _ = bench.requests(peer, batched, second=True)
                if number:  # the first warms up
                    for name, value in row.items():
                        found.setdefault(name, []).append(value)
            show(segment_tokens, found, list(peers))
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
