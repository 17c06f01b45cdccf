"""llama.cpp's own server as a peer: started on a port of its own, asked over HTTP, ended with the benchmark."""

from __future__ import annotations

import atexit
import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import suppress
from http.client import HTTPResponse
from typing import Any


class LlamaServer:
    """Raises RuntimeError if it does not start. COMPARE_VERBOSE in the environment lets it speak."""

    def __init__(self, command: Sequence[str], model: str, threads: int, *settings: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        given = ["--model", model, "--port", str(port), "--threads", str(threads), "--threads-batch", str(threads)]
        self._process = subprocess.Popen(
            [command[0], *given, *settings, *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=None if os.environ.get("COMPARE_VERBOSE") else subprocess.DEVNULL,
        )
        atexit.register(self.close)
        for _ in range(600):
            with suppress(OSError):
                if self.ask("/health")["status"] == "ok":
                    return
            if self._process.poll() is not None:
                break
            time.sleep(0.1)
        raise RuntimeError(f"{command[0]} does not start")

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        with self._open(path, body) as answer:
            return json.load(answer)

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        with self._open(path, body | {"stream": True}) as answer:
            for line in answer:
                if line.startswith(b"data: "):
                    yield json.loads(line.removeprefix(b"data: "))

    def _open(self, path: str, body: dict[str, Any] | None) -> HTTPResponse:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        answer: HTTPResponse = urllib.request.urlopen(request, timeout=600)
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
