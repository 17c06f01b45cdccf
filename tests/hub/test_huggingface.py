"""Hugging Face names, with the real huggingface_hub against a small Hub on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from .wheelhouse import SOURCE

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TENSORS = {
    "config.json": b'{"model_type": "llama", "torch_dtype": "bfloat16"}',
    "tokenizer.json": b"{}",
    "tokenizer.model": b"sp",
    "chat_template.jinja": b"{{ x }}",
    "additional_chat_templates/tool_use.jinja": b"{{ y }}",
    "other/tool_use.jinja": b"{{ z }}",
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    ).encode(),
    "model-00001-of-00002.safetensors": b"first",
    "model-00002-of-00002.safetensors": b"second",
    "consolidated.safetensors": b"the same again",
    "pytorch_model.bin": b"pickle",
    "model.pt": b"pickle",
    "modeling_evil.py": b"code",
    "onnx/config.json": b"{}",
    "README.md": b"hello",
}
QUANTISED = {
    "m-Q4_K_M.gguf": b"GGUF4",
    "m-Q8_0.gguf": b"GGUF8",
    "mmproj-Q8_0.gguf": b"GGUFx",
    "m-F16-00001-of-00002.gguf": b"GGUF1",
    "m-F16-00002-of-00002.gguf": b"GGUF2",
}
REPOSITORIES = {"org/tensors": TENSORS, "org/quantised": QUANTISED, "org/pickles": {"pytorch_model.bin": b"pickle"}}


class _Hub(BaseHTTPRequestHandler):
    """The four routes of the Hub that huggingface_hub uses to list and fetch a public repository."""

    protocol_version = "HTTP/1.1"

    def __init__(self, fetched: list[str], *args: object) -> None:
        self.fetched = fetched
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._api("/".join(parts[2:4]), parts[4:])
        elif len(parts) >= 5 and parts[2] == "resolve":
            self._file("/".join(parts[:2]), "/".join(parts[4:]))
        else:
            self._send(404, b"")

    do_HEAD = do_GET  # noqa: N815 (the name is http.server's)

    def _api(self, repo: str, rest: list[str]) -> None:
        files = REPOSITORIES.get(repo)
        if files is None:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif rest[:1] == ["tree"]:
            listing = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            self._send(200, json.dumps(listing).encode())
        else:
            info = {
                "id": repo,
                "modelId": repo,
                "sha": COMMIT,
                "private": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
            }
            info["siblings"] = [{"rfilename": name} for name in files]
            self._send(200, json.dumps(info).encode())

    def _file(self, repo: str, name: str) -> None:
        data = REPOSITORIES[repo].get(name)
        if data is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        if self.command == "GET":
            self.fetched.append(name)
        self._send(200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Starts the Hub; the list fills with the names of files that are fetched from it."""
    names: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Hub, names))  # type: ignore[arg-type]
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    for name in ("HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    yield names
    server.shutdown()
    server.server_close()
    thread.join()


def octavo(*arguments: str) -> tuple[int, str, str]:
    """huggingface_hub reads its settings when imported: each call is a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "octavo.cli.main", *arguments],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout.strip(), done.stderr


def test_folder_of_tensors_without_any_code(fetched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against fetching pickles or Python files, and against fetching weights twice over."""
    returncode, out, err = octavo("pull", "org/tensors")
    assert returncode == 0, err
    here = {path.relative_to(out).as_posix() for path in Path(out).rglob("*") if path.is_file()}
    assert here == {
        "additional_chat_templates/tool_use.jinja",
        "config.json",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    assert set(fetched) == here
    assert (Path(out) / "model-00002-of-00002.safetensors").read_bytes() == b"second"
    assert "\r" not in err, "no bars when stderr is no terminal"

    # What is in the cache is found without the network, and listed.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert octavo("pull", "org/tensors")[:2] == (0, out)
    returncode, listed, _ = octavo("models", "--json")
    entry = json.loads(listed)[0]
    assert (entry["name"], entry["path"], entry["format"]) == ("org/tensors", out, "safetensors")
    assert (entry["architecture"], entry["quantization"], entry["problem"]) == ("llama", "bfloat16", None)


def test_incomplete_folder_is_not_taken_from_the_cache(fetched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against loading a model whose download was interrupted."""
    _, out, _ = octavo("pull", "org/tensors")
    (Path(out) / "model-00002-of-00002.safetensors").unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    returncode, _, err = octavo("pull", "org/tensors")
    assert returncode == 2
    assert "org/tensors is not in the Hugging Face cache" in err


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("org/quantised", "m-Q4_K_M.gguf"),
        ("org/quantised:q8_0", "m-Q8_0.gguf"),
        ("org/quantised:m-Q8_0.gguf", "m-Q8_0.gguf"),
    ],
)
def test_one_file_of_many(name: str, file: str, fetched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against fetching every quantisation when one is meant."""
    returncode, out, err = octavo("pull", name)
    assert returncode == 0, err
    assert fetched == [file]
    assert Path(out).read_bytes() == QUANTISED[file]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert octavo("pull", name)[1] == out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/quantised:Q5_0", "choose one as org/quantised:FILE out of m-Q4_K_M.gguf, m-Q8_0.gguf (files split"),
        ("org/quantised:F16", "F16 matches 0"),
        ("org/pickles", "no weights Octavo can read"),
        ("org/nowhere", "Hugging Face has no model org/nowhere"),
    ],
)
def test_what_cannot_be_used_is_explained(name: str, message: str, fetched: list[str]) -> None:
    returncode, _, err = octavo("pull", name)
    assert returncode == 2
    assert message in err
    assert fetched == []


def test_offline_mode_is_respected(fetched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    returncode, _, err = octavo("pull", "org/tensors")
    assert returncode == 2
    assert "HF_HUB_OFFLINE=1 forbids" in err
    assert fetched == []


def test_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    returncode, _, err = octavo("pull", "org/tensors")
    assert returncode == 2
    assert "cannot fetch org/tensors from Hugging Face" in err
