"""Questions over a folder of documents: what the index costs, what it finds, and when the answer begins.

- `index`: the folder read into a new index, seconds and size; looked through again with nothing new; one file changed.
- `hits`: questions made from headings of the documents: whether a passage under that heading (of any file) is among the
  best 1, 4 and 8. The words of headings are in the index, where they count twice.
- `first token`: of `--asked` of these questions, each asked cold (an empty prefix cache) and again, with 4 passages;
  and of the same questions one after the other with passages in the order of the documents, and of the cache.

    python benchmarks/documents.py --docs /usr/share/doc/python3/html --model smollm2 --threads 2
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

from octavo import LLM, AnswerDelta, AskParams, SamplingParams
from octavo.documents.index import DocumentIndex

ASK = "What does the documentation say about {}?"


def headings_of(index: DocumentIndex, count: int, seed: int) -> list[str]:
    """Of passages with some text, each heading once, of three to ten words."""
    found = {
        source.headings[-1]
        for source in index.first(1 << 30)
        if source.headings and 3 <= len(source.headings[-1].split()) <= 10 and len(source.text) > 200
    }
    return random.Random(seed).sample(sorted(found), min(count, len(found)))


def hit_rates(index: DocumentIndex, headings: list[str]) -> dict[int, float]:
    ranks = []
    for heading in headings:
        found = index.search(ASK.format(heading), 8)
        ranks.append(next((rank for rank, one in enumerate(found) if one.headings[-1:] == (heading,)), 99))
    return {most: sum(rank < most for rank in ranks) / len(ranks) for most in (1, 4, 8)}


def first_token(llm: LLM, question: str, folder: Path, params: AskParams, index: Path) -> tuple[float, int, int]:
    """Seconds, tokens of the prompt, and how many of them were cached."""
    began, first = time.perf_counter(), 0.0
    with llm.stream_ask(question, folder, params, index_path=index) as run:
        for event in run:
            if isinstance(event, AnswerDelta) and not first:
                first = time.perf_counter() - began
        result = run.result()
    return first, len(result.prompt_token_ids), result.metrics.num_cached_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--questions", type=int, default=50)
    parser.add_argument("--asked", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write all figures to this file")
    args = parser.parse_args()
    figures: dict[str, object] = {}
    with LLM(args.model, threads=args.threads) as llm, tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary, "index.sqlite3")
        began = time.perf_counter()
        with DocumentIndex(args.docs, llm.tokenizer, path=place) as index:
            told = index.update()
            figures["index_s"] = time.perf_counter() - began
            figures |= {"files": told.num_files, "unread": told.num_problems, "passages": index.num_passages}
            began = time.perf_counter()
            index.update()
            figures["unchanged_s"] = time.perf_counter() - began
            texts = [p for p in sorted(args.docs.rglob("*.html")) if 20_000 < p.stat().st_size < 100_000]
            before = texts[len(texts) // 2].stat()
            try:
                texts[len(texts) // 2].touch()
                began = time.perf_counter()
                told = index.update()
                figures["one_file_s"], figures["one_file_read"] = time.perf_counter() - began, told.num_read
            finally:
                import os

                os.utime(texts[len(texts) // 2], ns=(before.st_atime_ns, before.st_mtime_ns))
            index.update()
            headings = headings_of(index, args.questions, args.seed)
            began = time.perf_counter()
            figures["hits"] = hit_rates(index, headings)
            figures["search_s"] = (time.perf_counter() - began) / len(headings)
        figures["size_bytes"] = place.stat().st_size
        figures["read_bytes"] = sum(p.stat().st_size for p in args.docs.rglob("*") if p.suffix in (".html", ".txt"))
        params = AskParams(num_passages=4, answer=SamplingParams(temperature=0, max_tokens=1))
        cold, warm, tokens = [], [], []
        for heading in headings[: args.asked]:
            question = ASK.format(heading)
            llm.reset_prefix_cache()
            seconds, count, _ = first_token(llm, question, args.docs, params, place)
            cold.append(seconds)
            tokens.append(count)
            warm.append(first_token(llm, question, args.docs, params, place)[0])
        figures["first_token_cold_s"], figures["first_token_again_s"] = map(statistics.median, (cold, warm))
        figures["prompt_tokens"] = statistics.median(tokens)
        for order in ("document", "cache"):
            llm.reset_prefix_cache()
            rows = []
            for heading in headings[: args.asked]:  # about one thing in two ways, as people ask
                for text in (ASK.format(heading), f"{heading}: how is it done?"):
                    rows.append(first_token(llm, text, args.docs, params.but(order=order), place))
            figures[f"order_{order}_s"] = statistics.median(row[0] for row in rows[1::2])
            figures[f"order_{order}_cached"] = sum(row[2] for row in rows[1::2]) / sum(row[1] for row in rows[1::2])
    for name, value in figures.items():
        print(f"{name}: {value}")
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
