"""`octavo serve` as a program: what it prints, how it ends, and what it refuses before a model is loaded."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cli.conftest import Invoke, invoke  # noqa: F401 - a fixture
from tests.server.processes import engines_of

SOURCE = Path(__file__).parents[2] / "src"
LONG = {"prompt": "the fox", "max_tokens": 1500, "ignore_eos": True, "stream": True}


@contextmanager
def served(
    model: Path, *flags: str, place: Sequence[str] = ("--port", "0"), **variables: str
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The program, and its address once it has told it."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OPENBLAS_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-m", "octavo.cli.main", "serve", str(model), *place, *flags]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, restore_signals=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if line.startswith("{"):
            yield process, json.loads(line)["url"]
        else:
            assert line.startswith("octavo: serving "), (line, process.stderr and process.stderr.read())
            yield process, line.split()[-1]
    finally:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def test_a_server_and_its_end(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """Keys come from flags, a file and the environment. At SIGTERM a stream goes on to its end, and new requests are
    refused."""
    file = tmp_path / "keys"
    file.write_text("from-file\n")
    flags = ["--api-key", "from-flag", "--api-key-file", str(file), "--max-num-seqs", "4"]
    with served(tiny_llama_dir, *flags, OCTAVO_API_KEY="from-environment") as (process, url):
        for key in ("from-flag", "from-file", "from-environment"):
            models = httpx.get(url + "/v1/models", headers={"x-api-key": key}).json()["data"]
            assert [one["id"] for one in models] == [tiny_llama_dir.name]
        assert httpx.get(url + "/v1/models").status_code == 401
        headers = {"Authorization": "Bearer from-flag"}
        with httpx.stream("POST", url + "/v1/completions", json=LONG, headers=headers, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            until = time.monotonic() + 30
            while (status := httpx.get(url + "/ready", headers=headers).status_code) == 200:
                assert time.monotonic() < until
            assert status == 503
            assert httpx.get(url + "/live").status_code == 200
            assert httpx.post(url + "/v1/completions", json={"prompt": "x"}, headers=headers).status_code == 503
            told = [line for line in lines if line]
        assert told[-1] == "data: [DONE]" and '"finish_reason":"length"' in told[-2]
        code, err = ended(process)
        assert code == 0 and "SIGTERM: shutting down" in err and "no such variable" not in err


def test_a_signal_that_goes_to_all_processes(tiny_llama_dir: Path) -> None:
    """As some supervisors send it: the engine goes on for the requests that are to end."""
    with served(tiny_llama_dir) as (process, url):
        with httpx.stream("POST", url + "/v1/completions", json=LONG, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            engines = engines_of(process.pid)
            assert len(engines) == 1
            for pid in (*engines, process.pid):
                os.kill(pid, signal.SIGTERM)
            told = [line for line in lines if line]
        assert told[-1] == "data: [DONE]" and '"finish_reason":"length"' in told[-2]
        code, err = ended(process)
        assert code == 0 and "it is started again" not in err
        assert not Path(f"/proc/{engines[0]}").exists()


@pytest.mark.parametrize("how", ["twice", "late"])
def test_an_end_that_does_not_wait(tiny_llama_dir: Path, how: str) -> None:
    """At a second signal, or when the time is over: who waits is told by an error."""
    timeout = "30" if how == "twice" else "0.2"
    with served(tiny_llama_dir, "--shutdown-timeout", timeout) as (process, url):
        with httpx.stream("POST", url + "/v1/completions", json={**LONG, "n": 16}, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            if how == "twice":
                time.sleep(0.1)
                process.send_signal(signal.SIGINT)
            told = [line for line in lines if line]
        assert json.loads(told[-1][6:])["error"]["code"] == 503
        assert ended(process)[0] == (130 if how == "twice" else 0)


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_an_end_with_nothing_to_do(tiny_llama_dir: Path, sig: signal.Signals) -> None:
    with served(tiny_llama_dir) as (process, _):
        process.send_signal(sig)
        assert ended(process)[0] == 0


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_bench_serve(tiny_llama_dir: Path, tmp_path: Path, invoke: Invoke, backend: str) -> None:  # noqa: F811
    """Our own client of any server's."""
    file = tmp_path / "figures.json"
    flags = ["--num-prompts", "6", "--input-len", "8", "--output-len", "5", "--max-concurrency", "3"]
    with served(tiny_llama_dir, "--api-key", "k") as (_, url):
        where = ["--base-url", url, "--api-key", "k", "--backend", backend, "--output-json", file]
        result = invoke("bench", "serve", *where, *flags, "--request-rate", "500")
    assert result.code == 0 and "6 done, 0 failed" in result.out
    told = json.loads(file.read_text())
    assert (told["total_output_tokens"], told["request_rate"]) == (30, 500)
    assert 0 < told["mean_ttft_ms"] <= told["mean_e2el_ms"] and told["p99_itl_ms"] > 0


def test_a_port_that_is_in_use(tiny_llama_dir: Path, invoke: Invoke) -> None:  # noqa: F811
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = invoke("serve", tiny_llama_dir, "--port", port)
    assert (result.code, result.out) == (2, "")
    assert f"port: {port} on 127.0.0.1 is in use" in result.err


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--port", "x"], "--port: must be an integer"),
        (["--port", "99999"], "port: must be"),
        (["--host", "no.such.host.invalid", "--port", "0"], "host: "),
        (["--host", "203.0.113.1", "--port", "0"], "host: "),
        (["--ssl-keyfile", "/nowhere", "--ssl-certfile", "/nowhere"], "ssl_keyfile: "),
        (["--ssl-keyfile", __file__, "--ssl-certfile", __file__], "ssl_certfile: "),
        (["--ssl-keyfile", __file__], "ssl_keyfile: needs ssl_certfile"),
        (["--limits", "{"], "--limits: must be a JSON object"),
        (["--limits", '{"max_n": "many"}'], "limits.max_n: "),
        (["--api-key-file", "/nowhere"], "api_key_file: "),
        (["--model", "other"], "--model: 'other' contradicts"),
        (["--max-num-queued-reqs", "-1"], "max_num_queued_reqs: "),
        (["--request-timeout", "soon"], "--request-timeout: must be a number"),
        (["--trust-remote-code"], "never run"),
        (["--max-num-seqs", "0"], "max_num_seqs: "),
    ],
)
def test_flags_that_are_refused(invoke: Invoke, flags: list[Any], problem: str) -> None:  # noqa: F811
    """Before anything is loaded: there is no such model."""
    result = invoke("serve", "/no/such/model", *flags)
    assert result.code == 2 and problem in result.err, result.err


def test_help_lists_every_setting(invoke: Invoke) -> None:  # noqa: F811
    result = invoke("serve", "--help")
    for name in ("--host", "--api-key", "--max-num-queued-reqs", "--served-model-name", "--limits", "--max-model-len"):
        assert name in result.out
