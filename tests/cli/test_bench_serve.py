"""`octavo bench serve`, beside a server whose answers are known."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from .conftest import Invoke


class Known(BaseHTTPRequestHandler):
    """Three pieces of text for five tokens; a prompt of the number 1 is refused."""

    asked: ClassVar[list[tuple[str, Any, str | None]]] = []

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._send(200, json.dumps({"data": [{"id": "known"}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, body, self.headers.get("Authorization")))
        prompt = body.get("prompt") or body["messages"][0]["content"]
        if " 1 " in f" {prompt} ":
            self._send(429, b'{"error": {"message": "full"}}')
            return
        chat = "messages" in body
        pieces = [{"delta": {"content": "x"}} if chat else {"text": "x"}] * 3
        events = [{"choices": [piece]} for piece in pieces]
        events.append({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5}})
        data = b": keep-alive\n\n" + b"".join(b"data: %s\n\n" % json.dumps(event).encode() for event in events)
        self._send(200, data + b"data: [DONE]\n\n")

    def _send(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def url() -> Iterator[str]:
    Known.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Known)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


# Those that vLLM's `bench serve` writes without --save-detailed, of the load and of what came of it.
NAMES = (
    "backend model_id num_prompts request_rate max_concurrency duration completed failed total_input_tokens "
    "total_output_tokens request_throughput output_throughput total_token_throughput"
).split()
NAMES += [f"{kind}_{name}_ms" for kind in ("mean", "median", "std", "p99") for name in ("ttft", "tpot", "itl", "e2el")]


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_figures(invoke: Invoke, url: str, tmp_path: Path, backend: str) -> None:
    file = tmp_path / "figures.json"
    flags = ("--num-prompts", "4", "--input-len", "3", "--output-len", "5", "--backend", backend, "--api-key", "k")
    code, out, err = invoke("bench", "serve", "--base-url", url, *flags, "--output-json", file)
    assert (code, err) == (0, "") and "3 done, 1 failed" in out and "429" in out
    told = json.loads(file.read_text())
    assert (told["completed"], told["failed"], told["model_id"]) == (3, 1, "known")
    assert (told["total_input_tokens"], told["total_output_tokens"]) == (21, 15)
    assert set(NAMES) <= set(told) and told["request_rate"] == "inf"
    assert told["request_throughput"] == pytest.approx(3 / told["duration"])
    assert told["output_throughput"] == pytest.approx(15 / told["duration"])
    for name in ("ttft", "tpot", "itl", "e2el"):
        assert 0 <= told[f"median_{name}_ms"] <= told[f"p99_{name}_ms"]
    assert told["mean_ttft_ms"] <= told["mean_e2el_ms"]
    path, body, key = Known.asked[0]
    assert path == ("/v1/completions" if backend == "openai" else "/v1/chat/completions")
    assert key == "Bearer k" and body["stream"] and body["ignore_eos"] and body["max_tokens"] == 5
    assert len({json.dumps(body) for _, body, _ in Known.asked}) == 4


def test_rates_and_places(invoke: Invoke, url: str) -> None:
    flags = ("--num-prompts", "6", "--request-rate", "500", "--max-concurrency", "1", "--shared-prefix-len", "4")
    code, out, _ = invoke("bench", "serve", "--base-url", url + "/v1/", *flags, "--no-ignore-eos", "--model", "m")
    assert code == 0 and "5 done, 1 failed" in out
    bodies = [body for _, body, _ in Known.asked]
    assert {body["model"] for body in bodies} == {"m"} and not any("ignore_eos" in body for body in bodies)
    assert len({" ".join(body["prompt"].split()[:4]) for body in bodies}) == 1


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (("--base-url", "ftp://x"), "--base-url: must be like"),
        (("--base-url", "http://127.0.0.1:99999"), "--base-url: Port out of range"),
        (("--base-url", "http://127.0.0.1:1"), "cannot be asked for its models"),
        (("--request-rate", "0"), "--request-rate: must be a number above 0"),
        (("--num-prompts", "0"), "--num-prompts: must be between 1"),
    ],
)
def test_refused(invoke: Invoke, flags: tuple[str, ...], problem: str) -> None:
    code, out, err = invoke("bench", "serve", *flags)
    assert (code, out) == (2, "") and problem in err and "Traceback" not in err
