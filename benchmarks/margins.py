"""What Writing in the Margins costs: a document read with notes, beside reading and answering it plainly.

Each round runs, one after the other and from an empty cache: `plain` (the document and the question, answered),
`overlapped` (margins are written while the document is read on), `sequential` (each before the next segment is read),
`sessions` (a script over sessions that does the same one margin after the other) and `second` (another question about a
document that was read overlapped). Margins and answers have a fixed number of tokens and all margins are kept, so that
the work is the same in each. Times are to the end of the answer but for `first` and `second`, which are to its first
token.

    python benchmarks/margins.py --model smollm2 --threads 2 --tokens 6000 --segments 512 1024 2048
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from octavo import LLM, AnswerDelta, MarginsParams, SamplingParams
from octavo.margins_request import MarginsRequest, make_margins

QUESTIONS = "How does the with statement work?", "What is a descriptor?"


def document_of(llm: LLM, num_tokens: int) -> str:
    """From the texts that `help()` shows, which come with Python."""
    text = "\n\n".join(pydoc_data.topics.topics.values())
    text = text[: 6 * num_tokens]
    while len(llm.tokenizer.encode(text)) > num_tokens:
        text = text[: len(text) - max(len(text) // 400, 1)]
    return text


class Bench:
    def __init__(self, llm: LLM, document: str, segment_tokens: int, margin_tokens: int, answer_tokens: int) -> None:
        self.llm = llm
        self.document = document
        self.margin = SamplingParams(temperature=0, max_tokens=margin_tokens, ignore_eos=True)
        self.answer = SamplingParams(temperature=0, max_tokens=answer_tokens, ignore_eos=True)
        self.params = MarginsParams(
            segment_tokens=segment_tokens, margin=self.margin, answer=self.answer, threshold=-1e6, seed=0
        )

    def request(self) -> MarginsRequest:
        return make_margins(self.llm._frontend, self.document, QUESTIONS[0], self.params)

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--tokens", type=int, default=6000, help="of the document")
    parser.add_argument("--segments", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--margin-tokens", type=int, default=60)
    parser.add_argument("--answer-tokens", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=["plain", "overlapped", "sequential", "sessions", "second"])
    parser.add_argument("--json", help="write all figures to this file")
    args = parser.parse_args()
    figures: dict[int, dict[str, list[float]]] = {}
    with LLM(args.model, threads=args.threads) as llm:
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
                if number:  # the first warms up
                    for name, value in row.items():
                        found.setdefault(name, []).append(value)
            print(f"segments of {segment_tokens}:", end="")
            for name, values in found.items():
                print(f" {name} {statistics.median(values):.2f} s", end="")
            for one, other in (
                ("overlapped", "sequential"),
                ("overlapped", "plain"),
                ("overlapped", "sessions"),
                ("second", "first"),
            ):
                if one in found and other in found:
                    ratios = [a / b for a, b in zip(found[one], found[other], strict=True)]
                    low, high = min(ratios), max(ratios)
                    print(f"; {one}/{other} {statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})", end="")
            print(flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
