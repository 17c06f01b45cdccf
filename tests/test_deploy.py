"""What is in deploy/ is true: of the Dockerfile and of systemd's unit, all that can be tried without either."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from octavo.cli.serve_config import kinds_of_settings
from octavo.config import OTHER_VARIABLES
from octavo.server.access import OPEN
from octavo.server.settings import DEFAULT_PORT, ServerSettings
from tests.cli.conftest import Invoke, invoke  # noqa: F401 - a fixture
from tests.server.test_serve import served

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
UNIT = ROOT / "deploy" / "octavo.service"
SHUTDOWN = ServerSettings().shutdown_timeout
ENGINE_SECONDS = 10.0  # that an engine may take to end, behind the requests


def instructions() -> list[tuple[str, str]]:
    """Of the Dockerfile, each on one line."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip()]
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in lines]


def of(name: str) -> list[str]:
    return [rest for kind, rest in instructions() if kind == name]


def test_what_the_image_is_made_of() -> None:
    copied = [rest.split() for rest in of("COPY") if not rest.startswith("--from")]
    sources = [source for *several, _ in copied for source in several]
    assert all((ROOT / source).exists() for source in sources) and "src" in sources and "constraints.txt" in sources
    (install,) = [run for run in of("RUN") if "pip install" in run]
    extras = re.search(r'"\.\[([\w,]+)\]"', install)
    assert extras is not None
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"server", "otel"} <= set(extras[1].split(",")) <= set(known)
    assert not [rest for kind, rest in instructions() if ".gguf" in rest or "pull" in rest]  # no model


def test_how_the_image_runs(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Not as root; on all addresses and the port that is told; by settings that there are."""
    assert of("USER") == ["10001"] and "--uid 10001" in "".join(of("RUN"))
    assert of("EXPOSE") == [str(DEFAULT_PORT)] and of("STOPSIGNAL") == ["SIGTERM"]
    variables = dict(part.split("=", 1) for env in of("ENV") for part in env.split())
    for name, value in variables.items():
        if name.startswith("OCTAVO_"):
            bare = name.removeprefix("OCTAVO_")
            assert bare.lower() in kinds_of_settings() or bare in OTHER_VARIABLES
            monkeypatch.setenv(name, value)
    assert of("VOLUME") == [variables["OCTAVO_HOME"]] and "OCTAVO_API_KEY" not in variables
    command = json.loads(of("ENTRYPOINT")[0])
    assert command[0] == "octavo"
    result = invoke(*command[1:], "smollm2", "--print-config")
    assert result.code == 0 and "host: 0.0.0.0 " in result.out and f"port: {DEFAULT_PORT} " in result.out


def test_the_time_that_the_image_is_given_to_end() -> None:
    (told,) = re.findall(r"--stop-timeout (\d+)", DOCKERFILE)
    assert int(told) >= SHUTDOWN + ENGINE_SECONDS


def test_the_health_check(tiny_llama_dir: Path) -> None:
    """Asks a route that needs no key, and fails where nobody answers."""
    command = json.loads(of("HEALTHCHECK")[0].partition("CMD ")[2])
    address = f"http://127.0.0.1:{DEFAULT_PORT}"
    assert command[:2] == ["python", "-c"] and address in command[2]
    (path,) = re.findall(rf"{address}(/\w+)", command[2])
    assert path in OPEN
    with served(tiny_llama_dir, "--api-key", "k") as (process, url):
        code = command[2].replace(address, url)
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
        process.kill()
        process.wait()
        assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode != 0


@pytest.fixture
def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(UNIT.read_text())
    return parser


def test_the_unit(unit: configparser.ConfigParser, invoke: Invoke, tmp_path: Path) -> None:  # noqa: F811
    """Requests under way have the time that they are given: no SIGTERM for the engine, and no SIGKILL too early."""
    service = unit["Service"]
    assert service["KillMode"] == "mixed"
    assert float(service["TimeoutStopSec"]) >= SHUTDOWN + ENGINE_SECONDS
    assert service["DynamicUser"] == "yes" and service["EnvironmentFile"].startswith("-/etc/octavo/")
    assert service["Environment"] == "OCTAVO_HOME=%C/" + service["CacheDirectory"]
    program, *arguments = shlex.split(service["ExecStart"])
    assert program.endswith("/octavo") and arguments[:2] == ["serve", "--config"]
    config = tmp_path / "octavo.yaml"
    (text,) = re.findall(r'octavo\.yaml <<< "(.*)"', UNIT.read_text())
    config.write_text(text)
    result = invoke("serve", "--config", config, *arguments[3:], "--print-config")
    assert result.code == 0 and "model: smollm2 " in result.out


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    """Of a copy whose program there is."""
    copy = tmp_path / "octavo.service"
    copy.write_text(UNIT.read_text().replace("/opt/octavo/bin/octavo", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
