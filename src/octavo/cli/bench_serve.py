"""`octavo bench serve`: requests to a server that speaks OpenAI's protocol, and vLLM's figures of its answers."""

from __future__ import annotations

import argparse
import http.client
import json
import random
import socket
import statistics
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from octavo import __version__
from octavo.core.errors import InvalidRequestError, RequestFailedError

_WORDS = (
    "the of and to in is that it was for on are as with his they at be this have from or one had by word but not what "
    "all were we when your can said there use an each which she do how their if will up other about out many then them "
    "these so some her would make like him into time has look two more write go see number no way could people my than "
    "first water been call who oil its now find long down day did get come made may part"
).split()
_PATHS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}
_TOLD = {"ttft": "time to first token", "tpot": "time per token", "itl": "between deliveries", "e2el": "whole"}
_TIMEOUT = 600.0  # seconds that a server may say nothing


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that are no numbers."""
    add = parser.add_argument
    add("--base-url", default="http://127.0.0.1:8000", metavar="URL", help="of the server (default: %(default)s)")
    add("--model", "-m", metavar="NAME", help="as the server calls it (default: the first it lists)")
    add("--backend", choices=_PATHS, default="openai", help="completions, or chat (default: %(default)s)")
    add("--request-rate", default="inf", metavar="R", help="requests a second, at random (default: all at once)")
    add("--api-key", metavar="KEY", help="sent as a bearer token")
    add(
        "--no-ignore-eos",
        action="store_true",
        help="answers may end by themselves: for servers that have no ignore_eos",
    )


@dataclass(slots=True)
class _Answer:
    """One request, in seconds from its start."""

    began: float
    first: float | None = None
    ended: float = 0.0
    gaps: list[float] = field(default_factory=list)  # between two deliveries of text
    input_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None


class _Server:
    def __init__(self, base_url: str, key: str | None) -> None:
        parts = urlsplit(base_url if "//" in base_url else f"http://{base_url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidRequestError("--base-url", f"must be like http://127.0.0.1:8000, not {base_url!r}")
        self._https = parts.scheme == "https"
        self._host, self._prefix = parts.hostname, parts.path.rstrip("/").removesuffix("/v1")
        try:
            self._port = parts.port
        except ValueError as error:
            raise InvalidRequestError("--base-url", str(error)) from None
        self._headers = {"Content-Type": "application/json"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"

    def connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._https else http.client.HTTPConnection
        return kind(self._host, self._port, timeout=_TIMEOUT)

    def ask(self, connection: http.client.HTTPConnection, path: str, body: Any = None) -> http.client.HTTPResponse:
        data = None if body is None else json.dumps(body)
        connection.request("GET" if data is None else "POST", self._prefix + path, data, self._headers)
        if connection.sock is not None:
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection.getresponse()

    def first_model(self) -> str:
        """Raises RequestFailedError."""
        connection = self.connect()
        try:
            answer = self.ask(connection, "/v1/models")
            found = json.loads(answer.read())
            if answer.status != 200 or not found["data"]:
                raise RequestFailedError(f"the server lists no model: {answer.status} {found}")
            return str(found["data"][0]["id"])
        except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException) as error:
            raise RequestFailedError(f"the server cannot be asked for its models: {error}") from None
        finally:
            connection.close()


def run(args: argparse.Namespace, numbers: dict[str, int]) -> dict[str, Any]:
    """Raises InvalidRequestError naming the flag, RequestFailedError for a server that answers nothing."""
    rate = _rate(args.request_rate)
    server = _Server(args.base_url, args.api_key)
    model = server.first_model() if args.model is None else args.model
    rng = random.Random(numbers["seed"])
    prefix, prompts = texts(rng, numbers)
    waits, now = [], 0.0
    for _ in prompts:
        waits.append(now)
        now += 0.0 if rate is None else rng.expovariate(rate)
    places = threading.Semaphore(numbers["max_concurrency"] or len(prompts))
    began, cpu = time.perf_counter(), time.process_time()

    def one(number: int) -> _Answer:
        time.sleep(max(began + waits[number] - time.perf_counter(), 0.0))
        with places:
            return _measure(server, _body(args, model, prefix, prompts[number], numbers), _PATHS[args.backend])

    with ThreadPoolExecutor(min(len(prompts), 1024)) as pool:
        answers = list(pool.map(one, range(len(prompts))))
    elapsed, cpu = time.perf_counter() - began, time.process_time() - cpu
    load = {"model_id": model, "backend": args.backend, "request_rate": rate or "inf", **numbers}
    return {"benchmark": "serve", "octavo_version": __version__, **load, **_figures(answers, elapsed, cpu)}


def _rate(text: str) -> float | None:
    try:
        rate = float(text)
    except ValueError:
        rate = -1.0
    if not rate > 0:
        raise InvalidRequestError("--request-rate", f"must be a number above 0, or inf, not {text!r}")
    return None if rate == float("inf") else rate


def texts(rng: random.Random, numbers: dict[str, int]) -> tuple[str, list[str]]:
    """What all prompts begin with, and what each goes on with."""
    prefix = _text(rng, numbers["shared_prefix_len"])
    return prefix, [f"{number} {_text(rng, numbers['input_len'])}".strip() for number in range(numbers["num_prompts"])]


def conversation(prefix: str, prompt: str) -> list[dict[str, str]]:
    """What prompts share is what the system says."""
    system = [{"role": "system", "content": prefix}] if prefix else []
    return [*system, {"role": "user", "content": prompt}]


def _text(rng: random.Random, words: int) -> str:
    """Common words, which most tokenizers have a token for."""
    return " ".join(rng.choices(_WORDS, k=words))


def _body(args: argparse.Namespace, model: str, prefix: str, prompt: str, numbers: dict[str, int]) -> dict[str, Any]:
    is_chat = args.backend == "openai-chat"
    body = {
        "model": model,
        **({"messages": conversation(prefix, prompt)} if is_chat else {"prompt": f"{prefix} {prompt}".strip()}),
        "max_tokens": numbers["output_len"],
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return body if args.no_ignore_eos else body | {"ignore_eos": True}


def _measure(server: _Server, body: dict[str, Any], path: str) -> _Answer:
    answer = _Answer(time.perf_counter())
    connection = server.connect()
    try:
        _read(server.ask(connection, path, body), answer)
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException) as error:
        answer.error = f"{type(error).__name__}: {error}"
    finally:
        connection.close()
    answer.ended = time.perf_counter() - answer.began
    return answer


def _read(response: http.client.HTTPResponse, answer: _Answer) -> None:
    if response.status != 200:
        answer.error = f"{response.status}: {response.read(2000).decode(errors='replace')}"
        return
    last = None
    for line in response:
        if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
            continue
        event = json.loads(line.removeprefix(b"data: "))
        if "error" in event:
            answer.error = str(event["error"])
            return
        usage = event.get("usage")
        if usage is not None:
            answer.input_tokens, answer.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        if any(choice.get("text") or (choice.get("delta") or {}).get("content") for choice in event.get("choices", ())):
            now = time.perf_counter() - answer.began
            if answer.first is None:
                answer.first = now
            if last is not None:
                answer.gaps.append(now - last)
            last = now


def _figures(answers: Sequence[_Answer], elapsed: float, cpu: float) -> dict[str, Any]:
    done = [one for one in answers if one.error is None]
    figures: dict[str, Any] = {
        "duration": elapsed,
        "client_cpu_seconds": cpu,
        "completed": len(done),
        "failed": len(answers) - len(done),
        "errors": sorted({one.error[:300] for one in answers if one.error is not None})[:5],
        "total_input_tokens": sum(one.input_tokens for one in done),
        "total_output_tokens": sum(one.output_tokens for one in done),
    }
    figures["request_throughput"] = len(done) / elapsed
    figures["output_throughput"] = figures["total_output_tokens"] / elapsed
    figures["total_token_throughput"] = (figures["total_input_tokens"] + figures["total_output_tokens"]) / elapsed
    later = [one for one in done if one.first is not None and one.output_tokens > 1]
    for name, seconds in (
        ("ttft", [one.first for one in done if one.first is not None]),
        ("tpot", [(one.ended - one.first) / (one.output_tokens - 1) for one in later if one.first is not None]),
        ("itl", [gap for one in done for gap in one.gaps]),
        ("e2el", [one.ended for one in done]),
    ):
        figures |= _summary(name, [1000 * one for one in seconds])
    return figures


def _summary(name: str, values: list[float]) -> dict[str, float | None]:
    """Milliseconds; None where nothing was measured."""
    if not values:
        return {f"{kind}_{name}_ms": None for kind in ("mean", "median", "std", "p99")}
    ordered = sorted(values)
    return {
        f"mean_{name}_ms": statistics.fmean(values),
        f"median_{name}_ms": statistics.median(values),
        f"std_{name}_ms": statistics.pstdev(values),
        f"p99_{name}_ms": ordered[min(len(ordered) - 1, round(0.99 * (len(ordered) - 1)))],
    }


def lines(report: dict[str, Any]) -> list[str]:
    """For people."""
    found = [
        f"requests               {report['completed']} done, {report['failed']} failed in {report['duration']:.2f} s",
        f"tokens                 {report['total_input_tokens']} in, {report['total_output_tokens']} out",
        f"throughput             {report['request_throughput']:.2f} requests/s, "
        f"{report['output_throughput']:.1f} tokens/s out, {report['total_token_throughput']:.1f} in all",
    ]
    for name, told in (
        ("ttft", "time to first token"),
        ("tpot", "time per token"),
        ("itl", "between deliveries"),
        ("e2el", "whole"),
    ):
        if report[f"mean_{name}_ms"] is not None:
            mean, median, p99 = (report[f"{kind}_{name}_ms"] for kind in ("mean", "median", "p99"))
            found.append(f"{told:22} mean {mean:.1f} ms, median {median:.1f}, p99 {p99:.1f}")
    found.append(f"client                 {report['client_cpu_seconds']:.2f} s of processor time")
    found += [f"error                  {error}" for error in report["errors"]]
    return found
