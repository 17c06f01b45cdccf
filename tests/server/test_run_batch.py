"""`octavo run-batch`: the server's answers, in a file; and a batch that goes on wherever it was interrupted."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from octavo.server.batch.requests import URLS
from tests.cli.conftest import Invoke, invoke  # noqa: F401 - a fixture
from tests.server.batches import BODIES, COMPLETIONS, MODEL, all_kinds, answers, as_lines, by_id, plain, request
from tests.server.conftest import ENGINE, Running, serving
from tests.server.processes import engines_of, is_engine

pytestmark = pytest.mark.usefixtures("_own_home")

SOURCE = Path(__file__).parents[2] / "src"
ENV = {**os.environ, "PYTHONPATH": str(SOURCE), "OPENBLAS_NUM_THREADS": "1"}
FLAGS = ["--served-model-name", MODEL, *(f"--{name.replace('_', '-')}={value}" for name, value in ENGINE.items())]
Batch = Callable[..., Any]


@pytest.fixture
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_HOME", str(tmp_path / "home"))


def started(model: Path, source: object, output: object, *flags: str, **more: Any) -> subprocess.Popen[str]:
    """The program."""
    command = [sys.executable, "-m", "octavo.cli.main", "run-batch", "-i", str(source), "-o", str(output)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*command, "-m", str(model), *FLAGS, *flags], text=True, env=ENV, **{**pipes, **more})


def until(true: Callable[[], bool], process: subprocess.Popen[str]) -> bool:
    """False if the program ended before."""
    limit = time.monotonic() + 120
    while not true():
        assert time.monotonic() < limit
        if process.poll() is not None:
            return true()
        time.sleep(0.002)
    return True


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


# --- answers ---

# Routes that are not for batches: they change something, name something that another request has made, or tell what
# programs that prepare a batch ask a tokenizer.
OTHER_ROUTES = {
    "/reset_prefix_cache",
    "/tokenize",
    "/detokenize",
    "/v1/messages/count_tokens",
    "/v1/octavo/sessions",
}


def test_which_routes_may_be_asked(exact: Running) -> None:
    """Every one, that it is decided of."""
    paths = exact.get("/openapi.json").json()["paths"]
    posts = {path for path, methods in paths.items() if "post" in methods and "{" not in path}
    assert posts - OTHER_ROUTES == set(URLS) == set(BODIES)


@pytest.fixture
def exact(tiny_dir: Path) -> Iterator[Running]:
    """A server with the backend whose answers are the same bits in any batch."""
    with serving(tiny_dir) as running:
        yield running


def test_answers_are_the_servers(exact: Running, tiny_dir: Path, tmp_path: Path, invoke: Invoke) -> None:  # noqa: F811
    """Of every route, errors included, whatever else is in the batch."""
    requests = all_kinds()
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(as_lines(requests))
    code, out, err = invoke("run-batch", "-i", source, "-o", output, "-m", tiny_dir, *FLAGS)
    found = by_id(output)
    assert (code, out) == (3, "") and list(map(str, sorted(found))) == sorted(one["custom_id"] for one in requests)
    failed = 0
    for one in requests:
        expected = exact.post(one["url"], one["body"])
        status, body = found[one["custom_id"]][1]
        assert (status, body) == (expected.status_code, plain(expected.json())), one
        failed += status != 200
    assert f"octavo: {len(requests) - failed} answered, {failed} failed\n" in err and 5 < failed < len(requests) / 2
    assert len({one["id"] for one in answers(output)}) == len(requests)
    for one in answers(output):
        assert one["response"]["request_id"] and "\n" not in one["custom_id"]
        assert one["response"]["status_code"] != 200 or one["response"]["request_id"] in one["response"]["body"]["id"]


def test_answers_are_the_same_in_any_batch(tiny_dir: Path, tmp_path: Path, invoke: Invoke) -> None:  # noqa: F811
    """One after the other and backwards: bit for bit, on the backend that has such."""
    requests = all_kinds()
    other = ["--max-num-seqs", "4", "--no-enable-prefix-caching"]
    found = []
    for number, (order, flags) in enumerate([(requests, []), (requests[::-1], other)]):
        source, output = tmp_path / f"in{number}.jsonl", tmp_path / f"out{number}.jsonl"
        source.write_text(as_lines(order))
        assert invoke("run-batch", "-i", source, "-o", output, "-m", tiny_dir, *FLAGS, *flags).code == 3
        found.append(by_id(output))
    assert found[0] == found[1]


BAD: list[tuple[str, str | None, str, str]] = [
    ("not json", None, "invalid_json", "line 1 is not JSON: Expecting value at character 0"),
    ('{"custom_id": "a"', None, "invalid_json", "is not JSON"),
    ('{"custom_id": NaN}', None, "invalid_json", "NaN is no number"),
    ('{"custom_id": "a", "custom_id": "b"}', None, "invalid_json", "'custom_id' stands twice"),
    ('{"custom_id": "\\ud800"}', None, "invalid_json", "lone surrogate"),
    ("[" * 5000, None, "invalid_json", "line 1 is "),
    ('["a"]', None, "invalid_line", "line 1 must be an object with custom_id, method, url, body"),
    ("null", None, "invalid_line", "must be an object"),
    ("x" * (40 << 20), None, "invalid_line", "has more than"),
    (json.dumps(request(None)), None, "invalid_custom_id", "line 1: custom_id: is missing"),
    (json.dumps({"method": "POST"}), None, "invalid_custom_id", "custom_id: is missing"),
    (json.dumps(request(5)), None, "invalid_custom_id", "custom_id: must be a string, not empty, not 5"),
    (json.dumps(request("")), None, "invalid_custom_id", "custom_id: must be a string, not empty, not ''"),
    (json.dumps(request("good")), None, "duplicate_custom_id", "custom_id: 'good' is that of an earlier line"),
    (json.dumps(request("x", more=1)), "x", "unknown_field", "'more': is not known here"),
    (json.dumps(request("x", Method=1)), "x", "unknown_field", "did you mean method?"),
    (json.dumps({"custom_id": "x", "url": COMPLETIONS, "body": {}}), "x", "invalid_method", "method: is missing"),
    (json.dumps(request("x", method="GET")), "x", "invalid_method", "method: must be POST, not 'GET'"),
    (json.dumps({**request("x"), "body": None}), "x", "invalid_body", "body: is missing"),
    (json.dumps(request("x", url="/v1/images/generations")), "x", "invalid_url", "url: must be one of /v1/"),
    (json.dumps(request("x", url="http://127.0.0.1/v1/completions")), "x", "invalid_url", "url: must be one of"),
    (json.dumps(request("x", url="/reset_prefix_cache")), "x", "invalid_url", "url: must be one of"),
    (json.dumps(request("x", url=["/v1/completions"])), "x", "invalid_url", "url: must be one of"),
    (json.dumps(request("x", {"prompt": "a", "stream": True})), "x", "invalid_body", "body.stream: must not be true"),
    (json.dumps(request("x", {"prompt": "a", "request_id": "y"})), "x", "invalid_body", "body.request_id: is not for"),
]


def test_lines_that_are_no_requests(tiny_llama_dir: Path, tmp_path: Path, invoke: Invoke) -> None:  # noqa: F811
    """Each is told by its number, and stops nothing; what was mended is asked when the batch goes on."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [json.dumps(request("good"))]
    for number, (line, _, _, _) in enumerate(BAD):
        lines += ["", line.replace('"x"', f'"{number}"', 1)]
    lines += ["  ", json.dumps(request("also good", {"prompt": "the fox", "stream": False}))]
    source.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    arguments = ("run-batch", "-i", source, "-o", output, "-m", tiny_llama_dir, *FLAGS)
    code, _, err = invoke(*arguments)
    assert code == 3 and f"octavo: 2 answered, {len(BAD)} failed\n" in err and f"and {len(BAD) - 5} more" in err
    found = {one["error"]["message"].split()[1].strip(":"): one for one in answers(output) if one["error"]}
    for number, (_, custom_id, code_, problem) in enumerate(BAD):
        at = str(2 * number + 3)
        one = found.pop(at)
        assert one["custom_id"] == (custom_id and str(number)) and one["response"] is None
        assert one["error"]["code"] == code_ and problem.replace("line 1", f"line {at}") in one["error"]["message"]
        assert len(one["error"]["message"]) < 1100
    assert not found and num_lines(output) == len(BAD) + 2
    kept = [line for line in output.read_bytes().splitlines() if b'"error":null' in line]

    source.write_text("\n".join([lines[0], *(json.dumps(request(str(number))) for number in range(30)), lines[-1]]))
    code, _, err = invoke(*arguments)
    assert code == 0 and "octavo: 30 answered; 2 had been before\n" in err
    assert output.read_bytes().splitlines()[:2] == kept and num_lines(output) == 32


def test_an_input_that_is_none(tiny_llama_dir: Path, tmp_path: Path, invoke: Invoke) -> None:  # noqa: F811
    """Before a model is looked for, and nothing is left behind."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n  \n")
    for name, problem in (
        (tmp_path / "nothing", "cannot be read: No such"),
        (tmp_path, "Is a dir"),
        (source, "holds no"),
    ):
        code, out, err = invoke("run-batch", "-i", name, "-o", output, "-m", "/no/such/model")
        assert (code, out) == (2, "") and "--input-file: " in err and problem in err
        assert not output.exists()
    source.write_text(as_lines([request("a")]))
    for name, problem in (
        (tmp_path, "Is a dir"),
        (tmp_path / "no" / "x", "No such file"),
        (source, "is the input as well"),
    ):
        code, out, err = invoke("run-batch", "-i", source, "-o", name, "--overwrite", "-m", "/no/such/model")
        assert (code, out) == (2, "") and "--output-file: " in err and problem in err
    assert source.read_text() == as_lines([request("a")])
    code, _, err = invoke("run-batch", "-i", source, "-o", output, "-m", "/no/such/model")
    assert code == 2 and "/no/such/model" in err and not output.exists()
    for flags, problem in (
        (["--limits", "{"], "--limits: must be a JSON object"),
        (["--limits", '{"max_n": 0}'], "limits.max_n"),
        (["--generation-config", "x"], "generation_config: must be"),
        (["--max-num-seqs", "0"], "max_num_seqs: "),
    ):
        code, _, err = invoke("run-batch", "-i", source, "-o", output, "-m", tiny_llama_dir, *flags)
        assert code == 2 and problem in err and not output.exists()


def test_pipes(tiny_llama_dir: Path, tmp_path: Path, invoke: Invoke) -> None:  # noqa: F811
    requests = [request(f"\u00e9{number}") for number in range(3)]
    stdin = as_lines(requests).encode()
    code, out, err = invoke("run-batch", "-i", "-", "-o", "-", "-m", tiny_llama_dir, *FLAGS, stdin=stdin)
    assert code == 0 and "octavo: 3 answered\n" in err
    found = [json.loads(line) for line in out.splitlines()]
    assert sorted(one["custom_id"] for one in found) == [one["custom_id"] for one in requests]
    code, _, err = invoke("run-batch", "-i", "-", "-o", "/dev/full", "-m", tiny_llama_dir, *FLAGS, stdin=stdin)
    assert code == 2 and "--output-file: /dev/full cannot be written: No space left" in err
    code, _, err = invoke("run-batch", "-i", "-", "-o", "-", "--overwrite", "-m", tiny_llama_dir, *FLAGS, stdin=stdin)
    assert code == 2 and "--overwrite: has no effect" in err


# --- going on ---


def test_going_on_with_other_things(tiny_llama_dir: Path, tmp_path: Path, invoke: Invoke) -> None:  # noqa: F811
    """Only what has failed is asked again; another input, another model and somebody else's file are refused."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(as_lines([request("a"), request("b", {"prompt": "the fox", "model": "other"}), request("c")]))
    arguments = ["run-batch", "-i", source, "-o", output, "-m", tiny_llama_dir, *FLAGS]
    code, _, err = invoke(*arguments)
    assert code == 3 and "line 2: 404: the model 'other' does not exist here" in err
    before = by_id(output)
    first = output.read_bytes()
    code, _, err = invoke(*arguments, "--served-model-name", "other")
    after = by_id(output)
    assert code == 0 and "octavo: 1 answered; 2 had been before" in err
    assert after["b"][1][0] == 200 and {**before, "b": after["b"]} == after
    # Nothing is left to do: no model is needed.
    whole = output.read_bytes()
    code, _, err = invoke(*arguments[:5], "-m", "/no/such/model")
    assert code == 0 and "octavo: 0 answered; 3 had been before" in err and output.read_bytes() == whole

    source.write_text(as_lines([request("a"), request("c", {"prompt": "the dog"}), request("d")]))
    code, _, err = invoke(*arguments)
    assert code == 2 and "--input-file: line 2: 'c' was another request when it was answered" in err
    assert output.read_bytes() == whole
    source.write_text(as_lines([request("a"), request("d")]))
    code, _, err = invoke(*arguments)
    assert code == 0 and f"{output} answers 2 requests that {source} does not hold" in err

    other = whole.replace(b'"system_fingerprint":"octavo-', b'"system_fingerprint":"octavo-0')
    for content, problem in (
        (other, "has answers of another model"),
        (b"my notes", "was not written by octavo run-batch"),
    ):
        output.write_bytes(content)
        code, _, err = invoke(*arguments)
        assert code == 2 and f"--output-file: {output} {problem}" in err and output.read_bytes() == content
    assert invoke(*arguments, "--overwrite").code == 0 and sorted(by_id(output)) == ["a", "d"]
    assert first.count(b"\n") == 3


def requests_for_kills(count: int) -> list[dict[str, Any]]:
    draws = random.Random(4)
    return [
        request(f"r{number}", {"prompt": "the fox", "seed": number, "max_tokens": draws.randint(1, 40), "n": 2})
        for number in range(count)
    ]


def killed_and_resumed(model: Path, tmp_path: Path, invoke: Invoke, kills: int, seed: int) -> None:  # noqa: F811
    """SIGKILL whenever so many more lines are there, the end of the file cut off now and then, until a run that is left
    alone. The input has no end before, so that no other run can come to one."""
    requests = requests_for_kills(120)
    lines = as_lines([*requests, "bad"])
    source, whole, output = (tmp_path / name for name in ("in.jsonl", "whole.jsonl", "out.jsonl"))
    source.write_text(lines)
    assert invoke("run-batch", "-i", source, "-o", whole, "-m", model, *FLAGS).code == 3
    draws = random.Random(seed)
    for _ in range(kills):
        most = min(num_lines(output) + draws.randint(0, 2 * len(requests) // kills), len(requests))
        process = started(model, "-", output, stderr=subprocess.DEVNULL)
        assert process.stdin is not None
        process.stdin.write(lines)
        process.stdin.flush()
        assert until(lambda most=most: num_lines(output) >= most, process)
        engines = engines_of(process.pid)
        process.kill()
        process.communicate()
        for engine in engines:  # it ends with the program
            limit = time.monotonic() + 60
            while is_engine(engine):
                assert time.monotonic() < limit
                time.sleep(0.01)
        if output.exists() and draws.random() < 0.5:
            os.truncate(output, max(0, output.stat().st_size - draws.randint(0, 400)))
    assert invoke("run-batch", "-i", source, "-o", output, "-m", model, *FLAGS).code == 3
    assert by_id(output) == by_id(whole) and len(by_id(output)) == len(requests) + 1
    assert sorted(path.name for path in tmp_path.glob("*.jsonl*")) == ["in.jsonl", "out.jsonl", "whole.jsonl"]


def test_killed_at_random_moments(tiny_dir: Path, tmp_path: Path, invoke: Invoke) -> None:  # noqa: F811
    killed_and_resumed(tiny_dir, tmp_path, invoke, kills=4, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 7))
def test_killed_often(tiny_dir: Path, tmp_path: Path, invoke: Invoke, seed: int) -> None:  # noqa: F811
    killed_and_resumed(tiny_dir, tmp_path, invoke, kills=10, seed=seed)


LONG = [request(f"r{number}", {"prompt": "the fox", "seed": number, "max_tokens": 300}) for number in range(64)]


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_requests_finish(tiny_dir: Path, tmp_path: Path, sig: signal.Signals) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(as_lines(LONG))
    with started(tiny_dir, source, output) as process:
        assert until(lambda: num_lines(output) > 0, process)
        process.send_signal(sig)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "requests under way are finished first" in err and "the same command goes on from here" in err
    # Those that were under way, 8 running and as many waiting, and no others were begun.
    assert 8 <= len(by_id(output)) < 60
    assert all(told[0] == 200 for _, told in by_id(output).values())


def test_a_second_signal_ends_it_at_once(tiny_dir: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    long = [
        request(f"r{number}", {"prompt": "the fox", "max_tokens": 2000, "ignore_eos": True}) for number in range(99)
    ]
    source.write_text(as_lines([request("first", {"prompt": "a", "max_tokens": 1}), *long]))
    with started(tiny_dir, source, output) as process:
        assert until(lambda: num_lines(output) > 0, process)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.05)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "requests under way are ended" in err
    assert len(by_id(output)) < 50


def test_waiting_for_input(tiny_dir: Path, tmp_path: Path) -> None:
    """What comes is answered while the rest is not there yet, and Ctrl-C is heard."""
    output = tmp_path / "out.jsonl"
    with started(tiny_dir, "-", output) as process:
        assert process.stdin is not None
        for number in range(3):
            process.stdin.write(as_lines([request(f"r{number}")]))
            process.stdin.flush()
            assert until(lambda number=number: num_lines(output) == number + 1, process)
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130
    assert len(by_id(output)) == 3


def test_one_at_a_time(tiny_dir: Path, tmp_path: Path, invoke: Invoke) -> None:  # noqa: F811
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(as_lines([request("a")]))
    with started(tiny_dir, "-", output) as process:
        assert process.stdin is not None
        process.stdin.write(as_lines([request("b")]))
        process.stdin.flush()
        assert until(lambda: num_lines(output) == 1, process)
        code, _, err = invoke("run-batch", "-i", source, "-o", output, "-m", tiny_dir, *FLAGS)
        assert code == 2 and "is being written by another program" in err
        process.stdin.close()
        process.stdin = None
        process.communicate(timeout=120)
        assert process.returncode == 0
    assert invoke("run-batch", "-i", source, "-o", output, "-m", tiny_dir, *FLAGS).code == 0


def test_an_engine_that_dies(tiny_dir: Path, tmp_path: Path) -> None:
    """It is started again, and what it was at is asked again: nothing fails."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(as_lines(LONG))
    with started(tiny_dir, source, output) as process:
        assert until(lambda: num_lines(output) > 0, process)
        (engine,) = engines_of(process.pid)
        os.kill(engine, signal.SIGKILL)
        _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "is started again" in err and len(by_id(output)) == len(LONG)
    assert all(told[0] == 200 for _, told in by_id(output).values())
