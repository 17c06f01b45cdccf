"""`octavo pull`, `octavo models`, and what main() makes of errors, as a user meets them: exit codes, no traceback."""

from __future__ import annotations

import argparse
import json
import os
import signal
import struct
import subprocess
import sys
import types
from pathlib import Path

import pytest

from octavo.cli import main as cli
from octavo.core.errors import ConfigError
from octavo.hub import ALIASES

SOURCE = Path(__file__).parents[2] / "src"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OCTAVO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", str(SOURCE))
    for name in ("HF_HUB_CACHE", "OCTAVO_LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home"


def octavo(*arguments: str, cwd: Path | None = None) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the program."""
    done = subprocess.run(
        [sys.executable, "-m", "octavo.cli.main", *arguments],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def add_gguf(home: Path, folder: str, architecture: str) -> Path:
    """A GGUF file with one metadata key and no tensors."""
    key, value = b"general.architecture", architecture.encode()
    path = home / "models" / folder / "m.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(
        struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, len(key)) + key + struct.pack("<IQ", 8, len(value)) + value
    )
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pull", "smolm2"], "Did you mean smollm2?"),
        (["pull", "./nix.gguf"], "./nix.gguf does not exist"),
        (["pull", "org/name"], "HF_HUB_OFFLINE=1 forbids"),
        (["pull", "evil\x1b[31mname"], r"evil\x1b[31mname"),
        (["pull"], "required: NAME"),
        (["pull", "--bad", "x"], "unrecognized arguments: --bad"),
        (["models", "x"], "unrecognized arguments: x"),
        (["modles"], "did you mean models?"),
        (["--bad"], "unrecognized arguments: --bad"),
        ([], "usage: octavo"),
    ],
)
def test_wrong_input_gives_exit_code_2(arguments: list[str], message: str) -> None:
    """Guards against a traceback, silence, or success for input that is the user's mistake."""
    returncode, out, err = octavo(*arguments)
    assert returncode == 2
    assert message in err
    assert out == ""
    assert "Traceback" not in err and "\x1b" not in err


def test_deliberate_errors_are_one_line() -> None:
    _, _, err = octavo("pull", "smolm2")
    assert err.startswith("octavo: error: unknown model")
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["-v", "pull", "smolm2"], ["pull", "-v", "smolm2"]])
def test_verbose_shows_where_an_error_came_from(arguments: list[str]) -> None:
    returncode, _, err = octavo(*arguments)
    assert returncode == 2
    assert "Traceback" in err


@pytest.mark.parametrize("command", ["pull", "models"])
def test_help_of_commands(command: str) -> None:
    returncode, out, err = octavo(command, "--help")
    assert (returncode, err) == (0, "")
    assert f"usage: octavo {command}" in out


def test_help_and_version_need_no_command_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against `octavo --help` failing, or being slow, because of one command's module."""
    monkeypatch.setitem(cli.COMMANDS, "broken", ("octavo.cli.does_not_exist", "a command that can't be imported"))
    assert cli.main(["--help"]) == 0
    assert cli.main(["--version"]) == 0


def test_pull_of_a_local_file_prints_its_path(home: Path) -> None:
    path = add_gguf(home, "mine", "llama")
    assert octavo("pull", str(path)) == (0, f"{path}\n", "")


def test_models_of_an_empty_home(home: Path) -> None:
    returncode, out, err = octavo("models")
    assert (returncode, err) == (0, "")
    first, _, *rows = out.splitlines()
    assert first.startswith(f"no models in {home} yet")
    assert {row.split()[0] for row in rows} == set(ALIASES) >= {"smollm2", "gemma3-270m"}
    assert all(f"`octavo pull {row.split()[0]}`" in row for row in rows)
    listed = json.loads(octavo("models", "--json")[1])
    assert {entry["name"] for entry in listed} == set(ALIASES) and {entry["path"] for entry in listed} == {None}
    assert not home.exists(), "listing creates nothing"


def test_models_are_described(home: Path) -> None:
    path = add_gguf(home, "mine", "llama")
    returncode, out, err = octavo("models")
    assert (returncode, err) == (0, "")
    header, row, *others = out.splitlines()
    assert [other.split()[0] for other in others] == [*ALIASES], "those that can be fetched"
    assert header.split() == ["NAME", "SIZE", "FORMAT", "ARCHITECTURE", "QUANTIZATION", "PATH"]
    assert row.index("llama") == header.index("ARCHITECTURE")
    entry = json.loads(octavo("models", "--json")[1])[0]
    assert entry["path"] == str(path)
    assert entry["size"] == path.stat().st_size
    assert (entry["format"], entry["architecture"], entry["source"]) == ("gguf", "llama", "file")


def test_a_broken_model_does_not_hide_the_others(home: Path) -> None:
    """Guards against one bad file making `octavo models` fail."""
    good = add_gguf(home, "good", "gemma3")
    bad = add_gguf(home, "bad", "llama")
    bad.write_bytes(b"GGUF\xff\xff")
    cut = home / "models" / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    cut.parent.mkdir()
    cut.write_bytes(b"GGUF")
    returncode, out, err = octavo("models")
    assert returncode == 0
    assert str(good) in out and "gemma3" in out and out.count("unreadable") == 2
    assert f"octavo: {bad}:" in err
    assert "4 bytes where 98,362,432 are expected; fetch it again with `octavo pull smollm2`" in err
    entries = {entry["path"]: entry for entry in json.loads(octavo("models", "--json")[1])}
    assert entries[str(good)]["problem"] is None
    assert entries[str(bad)]["problem"] and entries[str(cut)]["problem"]


def test_reader_that_goes_away(home: Path) -> None:
    """Guards against a traceback in `octavo models | head -0`."""
    add_gguf(home, "mine", "llama")
    read_end, write_end = os.pipe()
    os.close(read_end)
    child = subprocess.Popen(
        [sys.executable, "-m", "octavo.cli.main", "models"], stdout=write_end, stderr=subprocess.PIPE, text=True
    )
    os.close(write_end)
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (141, "")


def run_command(run: object, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """main() with one more command, whose work is `run`."""
    module = types.ModuleType("octavo_test_command", "A command for tests.")
    module.add_arguments = lambda parser: parser.add_argument("--n", type=int, default=1)  # type: ignore[attr-defined]
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(cli.COMMANDS, "try", (module.__name__, "test"))
    return cli.main([*arguments])


def test_arguments_reach_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[argparse.Namespace] = []

    def run(args: argparse.Namespace) -> int:
        seen.append(args)
        return 7

    assert run_command(run, monkeypatch, "-v", "try", "--n", "3", "-v") == 7
    assert (seen[0].n, seen[0].verbose) == (3, 2)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("threads: must be positive"), 2, "octavo: error: threads: must be positive\n"),
        (KeyboardInterrupt(), 130, ""),
        (ZeroDivisionError("by zero"), 1, "octavo: error: unexpected ZeroDivisionError: by zero\nThis is a bug"),
    ],
)
def test_exit_codes_of_errors(
    error: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(args: argparse.Namespace) -> int:
        raise error

    assert run_command(run, monkeypatch, "try") == code
    assert capsys.readouterr().err.startswith(message)
    assert run_command(run, monkeypatch, "-v", "try") == code
    assert ("Traceback" in capsys.readouterr().err) == (code != 130)


def test_interrupt_signal_ends_with_130() -> None:
    """Guards against a traceback on Ctrl-C."""
    child = subprocess.Popen(
        [sys.executable, "-c", _SLEEPER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=30)
    assert (child.returncode, err) == (130, "")


_SLEEPER = """
import sys, time, types
from octavo.cli import main as cli
def run(args):
    print("ready", flush=True)
    time.sleep(60)
command = types.ModuleType("sleeper")
command.add_arguments, command.run = (lambda parser: None), run
sys.modules["sleeper"] = command
cli.COMMANDS["sleep"] = ("sleeper", "")
sys.exit(cli.main(["sleep"]))
"""
