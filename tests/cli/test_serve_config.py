"""What `octavo serve` is told: by flags, variables and a file, in this order of strength, each setting in all three
ways; and what it says to what is wrong. All of it by the program's own --print-config."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from octavo.cli.serve_config import KINDS, kinds_of_settings
from octavo.config import EngineConfig
from octavo.core.settings import choices_of, flag, kind_of, type_hints, variable
from octavo.core.speculation import SpeculativeConfig
from octavo.server.settings import Limits, ServerSettings

from .conftest import Invoke

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "server.md"
SETTINGS = [(kind, one) for kind in KINDS for one in fields(kind)]
NAMES = [one.name for _, one in SETTINGS]
# What a setting needs beside it.
COMPANIONS: dict[str, dict[str, Any]] = {
    "ssl_keyfile": {"ssl_certfile": __file__},
    "ssl_certfile": {"ssl_keyfile": __file__},
    "max_concurrent_per_key": {"api_key": "k"},
    "max_log_len": {"enable_log_requests": True},
    "kv_offload_bytes": {"kv_offload_dir": "blocks"},
}
SAMPLES: dict[str, Any] = {
    "ssl_keyfile": __file__,
    "ssl_certfile": __file__,
    "root_path": "/llm",
    "otlp_traces_endpoint": "http://127.0.0.1:4318/v1/traces",
    "max_num_batched_tokens": 64,
    "kv_offload_dir": "blocks",
}


class Ways:
    """The three of them."""

    def __init__(self, invoke: Invoke, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self._invoke = invoke
        self._monkeypatch = monkeypatch
        self._folder = folder

    def run(self, flags: dict[str, Any], variables: dict[str, Any], file: dict[str, Any] | str) -> Any:
        """The program with --print-config."""
        arguments = [part for name, value in flags.items() for part in as_flags(name, value)]
        if file:
            path = self._folder / "octavo.yaml"
            path.write_text(file if isinstance(file, str) else yaml.safe_dump(file))
            arguments += ["--config", str(path)]
        with self._monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(variable(name), as_text(name, value))
            return self._invoke("serve", "--print-config", *arguments)

    def settings(
        self, flags: Any = None, variables: Any = None, file: Any = None
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Values, and where each is from."""
        result = self.run(flags or {}, variables or {}, file or {})
        assert result.code == 0, result.err
        values = yaml.safe_load(result.out)
        lines = [line.lstrip("# ") for line in result.out.splitlines()]
        return values, {line.partition(":")[0]: line.rpartition("  # ")[2] for line in lines}


@pytest.fixture
def ways(invoke: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Ways:
    return Ways(invoke, monkeypatch, tmp_path)


def as_flags(name: str, value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [f"{flag(name)}={as_text(name, one)}" for one in values]


def as_text(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, dict) else ",".join(value) if isinstance(value, list) else str(value)


def sample(kind: type, one: Any) -> Any:
    """A value that is not the default."""
    of_type, _ = kind_of(type_hints(kind)[one.name])
    if one.name in SAMPLES:
        return SAMPLES[one.name]
    if (choices := choices_of(one.metadata)) is not None:
        return next(choice for choice in choices if choice != one.default)
    if of_type is bool:
        return not one.default
    if of_type is tuple:
        return ["a", "b"]
    if of_type is int:
        return (one.default or one.metadata["low"]) + 3
    return {float: 7.5, str: "words", Limits: {"max_n": 5}, SpeculativeConfig: {"method": "ngram"}}[of_type]


@pytest.mark.parametrize("way", ["flags", "variables", "file"])
@pytest.mark.parametrize("name", NAMES)
def test_every_setting_in_every_way(ways: Ways, tmp_path: Path, name: str, way: str) -> None:
    """Guards a setting that one of the ways forgets. The value is told, and where it is from."""
    kind = kinds_of_settings()[name]
    (one,) = [one for one in fields(kind) if one.name == name]
    value = sample(kind, one)
    if name == "api_key_file":
        value = str(tmp_path / "keys")
        Path(value).write_text("k1\nk2\n")
    if name == "api_key" and way == "variables":
        value = "a,b"  # one key, as ever
    values, sources = (
        ways.settings(COMPANIONS.get(name), **{way: {name: value}})
        if way != "flags"
        else ways.settings({**COMPANIONS.get(name, {}), name: value})
    )
    written = {"flags": flag(name), "variables": variable(name), "file": f"octavo.yaml, line 1: {name}"}[way]
    assert sources[name].endswith(written)
    if name == "api_key":
        assert name not in values  # secret
    elif name == "speculative_config":
        assert values[name] == {**asdict(SpeculativeConfig(method="ngram"))}
    elif name == "limits":
        assert values[name]["max_n"] == 5 and values[name]["max_prompts"] == Limits().max_prompts
    else:
        assert values[name] == value


def test_names_are_those_of_one_setting() -> None:
    assert len(set(NAMES)) == len(NAMES) and "config" not in NAMES


CASES = [
    ("max_num_seqs", [3, 4, 5], EngineConfig().max_num_seqs),
    ("port", [8001, 8002, 8003], 8000),
    ("enable_prefix_caching", [False, False, False], True),
    ("vllm_metric_names", [True, True, True], False),
    ("request_timeout", [1.5, 2.5, 3.5], None),
    ("allowed_origins", [["https://a"], ["https://b"], ["https://c", "https://d"]], []),
    ("model", ["a", "b", "c"], "smollm2"),
]


@pytest.mark.parametrize("given", list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize(("name", "offered", "default"), CASES)
def test_flag_over_variable_over_file_over_default(
    ways: Ways, name: str, offered: list[Any], default: Any, given: tuple[bool, ...]
) -> None:
    told = [{name: value} if is_given else {} for value, is_given in zip(offered, given, strict=True)]
    values, sources = ways.settings(*told)
    expected = [value for value, is_given in zip(offered, given, strict=True) if is_given]
    assert values[name] == (expected[0] if expected else default)
    strongest = next((way for way, is_given in enumerate(given) if is_given), 3)
    assert sources[name].startswith([flag(name), variable(name), "", "default"][strongest])


@pytest.mark.parametrize("stronger", ["true", "false"])
def test_a_switch_can_be_put_back(ways: Ways, stronger: str) -> None:
    for file in (True, False):
        values, _ = ways.settings({"pin_threads": stronger}, None, {"pin-threads": file})
        assert values["pin_threads"] == (stronger == "true")
    values, _ = ways.settings(None, {"pin_threads": stronger}, {"pin-threads": stronger != "true"})
    assert values["pin_threads"] == (stronger == "true")


def test_keys_add_up_and_are_never_told(ways: Ways, tmp_path: Path) -> None:
    """Guards a key that stops working because another was given, and one that a log or screen shows."""
    keys = tmp_path / "keys"
    keys.write_text("secret-1\nsecret-2\n")
    flags = {"api_key": ["secret-3", "secret-2"], "api_key_file": str(keys)}
    result = ways.run(flags, {"api_key": "secret-4"}, {"api-key": ["secret-5", "secret-6"]})
    assert result.code == 0 and "# api_key: 6 that are not told" in result.out
    assert "--api-key, OCTAVO_API_KEY, " in result.out and "secret-" not in result.out + result.err


def test_limits_add_up(ways: Ways) -> None:
    """Each is a setting of its own."""
    flags, variables = {"limits": {"max_n": 1, "max_tools": 1}}, {"limits": {"max_n": 2, "max_prompts": 2}}
    values, _ = ways.settings(flags, variables, {"limits": {"max_n": 3, "max_prompts": 3, "max_messages": 3}})
    found = values["limits"]
    assert (found["max_n"], found["max_tools"], found["max_prompts"], found["max_messages"]) == (1, 1, 2, 3)
    assert found["max_bad_words"] == Limits().max_bad_words


def test_what_is_printed_is_a_file(ways: Ways, tmp_path: Path) -> None:
    """Read again it gives the same settings, whatever characters they have."""
    names = ["a b", "#c", "d: e", "ä€", "yes", "1"]
    flags = {"served_model_name": names, "root_path": "/'\"", "request_timeout": 1e-05, "uds": "s.sock"}
    values, _ = ways.settings(flags, {"threads": 2})
    again, _ = ways.settings(None, None, ways.run(flags, {"threads": 2}, {}).out)
    assert again == values
    assert values["served_model_name"] == names and values["request_timeout"] == 1e-05 and "host" not in values


def test_the_file_is_named_by_a_variable_too(invoke: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, port in (("a.yaml", 1111), ("b.yaml", 2222)):
        (tmp_path / name).write_text(f"port: {port}\n")
    monkeypatch.setenv("OCTAVO_CONFIG", str(tmp_path / "a.yaml"))
    assert "port: 1111 " in invoke("serve", "--print-config").out
    assert "port: 2222 " in invoke("serve", "--print-config", "--config", tmp_path / "b.yaml").out


def test_empty_is_as_if_it_were_not_there(ways: Ways) -> None:
    values, _ = ways.settings(None, {"max_num_seqs": "", "api_key": ""}, "port:\nthreads: null\n# nothing else\n")
    assert (values["max_num_seqs"], values["port"], values["threads"]) == (32, 8000, None)
    for text in ("", "# nothing\n", "---\n"):
        assert ways.settings(None, None, text or " ")[0]["port"] == 8000


WRONG_FILES = [
    ("port: many\n", "line 1: port: must be an integer, not 'many'"),
    ("\n\nport: 99999\n", "line 3: port: must be at most 65535, not 99999"),
    ("port: '8000'\n", "line 1: port: must be an integer, not '8000'"),
    ("port: true\n", "line 1: port: must be an integer, not True"),
    ("port: 8000.0\n", "line 1: port: must be an integer, not 8000.0"),
    ("port: [1]\n", "line 1: port: must be an integer, not [1]"),
    ("model: 7\n", "line 1: model: must be a string, not 7"),
    ("request-timeout: soon\n", "line 1: request-timeout: must be a number, not 'soon'"),
    ("request-timeout: .inf\n", "line 1: request-timeout: must be a number, not inf"),
    ("request-timeout: 0\n", "line 1: request-timeout: must be more than 0, not 0"),
    ("vllm_metric_names: 1\n", "line 1: vllm_metric_names: must be true or false, not 1"),
    ("served-model-name: [a, 1]\n", "line 1: served-model-name: must be strings, not empty"),
    ("served-model-name: {a: 1}\n", "line 1: served-model-name: must be a string or a list of strings, not dict"),
    ("log-format: xml\n", "line 1: log-format: must be one of text, json, not 'xml'"),
    ("api_key: [sekret, 1]\n", "line 1: api_key: must be strings, not empty"),
    ("api_key: sekret sekret\n", "line 1: api_key: must be at most 4096 visible ASCII characters"),
    ("limits: {max_n: x}\n", "line 1: limits.max_n: must be an integer, not 'x'"),
    ("limits: {max_m: 1}\n", "line 1: limits: 'max_m' is not one; there are"),
    ("limits: 4\n", 'line 1: limits: must be an object such as {"max_n": 16}, not 4'),
    ("max_num_seq: 3\n", "line 1: 'max_num_seq' is no setting; did you mean max_num_seqs?"),
    ("config: x\n", "line 1: 'config' is no setting"),
    ("3: x\n", "line 1: a key must be the name of a setting, not 3"),
    ("[a]: x\n", "line 1: a key must be the name of a setting, not ['a']"),
    ("port: 1\nport: 2\n", "line 2: port is there twice; it stands in line 1 as well"),
    ("root-path: /a\nroot_path: /b\n", "line 2: root_path is there twice; it stands in line 1 as well"),
    ("limits: {max_n: 1, max_n: 2}\n", "line 1: the key 'max_n' is there twice"),
    ("limits: {[a]: 1}\n", "line 1: a key must be a name"),
    ("limits: {{a: b}: 1}\n", "line 1: a key must be a name"),
    ("limits: &a {max_n: *a}\n", "line 1: found unconstructable recursive node"),
    ("- a\n", "must hold settings, such as max_num_seqs: 16"),
    ("words\n", "must hold settings, such as max_num_seqs: 16"),
    ("a: [\n", "line 2: "),
    ("a: b: c\n", "line 1: "),
    ("port: 1\n---\nport: 2\n", "line 2: "),
    ("model: !!python/object/apply:os.system [ls]\n", "line 1: could not determine a constructor"),
    ("a: \x1b[31m\n", "is no YAML: "),
    ("a: " + "[" * 100_000, "is nested too deeply"),
    ("#" * (1 << 20) + "\n", "has more than 1048576 bytes"),
    ("backend: reference\nthreads: 3\n", "line 2: threads: has no effect with the reference backend"),
    (f"ssl-keyfile: {__file__}\n", "line 1: ssl-keyfile: needs ssl_certfile"),
    ("port: 1\nuds: /tmp/x\n", "line 2: uds: is instead of host and port; "),
]  # fmt: skip


@pytest.mark.parametrize(("text", "problem"), WRONG_FILES, ids=map(str, range(len(WRONG_FILES))))
def test_files_that_are_wrong(ways: Ways, text: str, problem: str) -> None:
    """Each is told with its file, its line and what was meant, and ends the program as other wrong usage does."""
    result = ways.run({}, {}, text)
    assert (result.code, result.out) == (2, "")
    assert "octavo.yaml" in result.err and problem in result.err, result.err
    assert result.err.count("\n") == 1 and "sekret" not in result.err and "\x1b" not in result.err


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir, lambda path: path.write_bytes(b"port: \xff\xfe")])
def test_files_that_cannot_be_read(invoke: Invoke, tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "octavo.yaml"
    make(path)
    result = invoke("serve", "--print-config", "--config", path)
    assert result.code == 2 and result.err.startswith(f"octavo: error: config: {path} ") and result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("port", "x", "OCTAVO_PORT: must be an integer, not 'x'"),
        ("port", "99999", "OCTAVO_PORT: must be at most 65535"),
        ("vllm_metric_names", "maybe", "OCTAVO_VLLM_METRIC_NAMES: must be true or false"),
        ("limits", "{", "OCTAVO_LIMITS: must be a JSON object"),
        ("limits", "[1]", "OCTAVO_LIMITS: must be an object"),
        ("limits", '{"max_n": 0}', "OCTAVO_LIMITS.max_n: must be at least 1, not 0"),
        ("shutdown_timeout", "nan", "OCTAVO_SHUTDOWN_TIMEOUT: must be a number"),
        ("shutdown_timeout", "-1", "OCTAVO_SHUTDOWN_TIMEOUT: must be at least 0"),
        ("api_key", "sekret sekret", "OCTAVO_API_KEY: must be at most"),
        ("api_key_file", "/nowhere", "OCTAVO_API_KEY_FILE: '/nowhere' cannot be read"),
        ("log_level", "loud", "OCTAVO_LOG_LEVEL: must be one of debug, info, warning, error, critical"),
        ("max_num_seqs", "0", "OCTAVO_MAX_NUM_SEQS: must be at least 1"),
        ("root_path", "llm", "OCTAVO_ROOT_PATH: must begin with /"),
        ("otlp_traces_endpoint", "collector:4318", "OCTAVO_OTLP_TRACES_ENDPOINT: must be a URL"),
        ("otlp_traces_endpoint", "http://u:sekret@c", "OCTAVO_OTLP_TRACES_ENDPOINT: must hold no password"),
        ("max_log_len", "5", "OCTAVO_MAX_LOG_LEN: has no effect without enable_log_requests"),
        ("config", "/nowhere", "config: /nowhere cannot be read"),
    ],
)  # fmt: skip
def test_variables_that_are_wrong(ways: Ways, name: str, text: str, problem: str) -> None:
    result = ways.run({}, {name: text}, {})
    assert (result.code, result.out) == (2, "") and problem in result.err, result.err
    assert "sekret" not in result.err


def test_variables_that_are_none_of_ours(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told by name: Kubernetes' word for a service called octavo, and a misspelt one, with what was meant."""
    monkeypatch.setattr("octavo.config._told", set())
    monkeypatch.setenv("OCTAVO_PORT", "tcp://10.0.0.1:8000")
    monkeypatch.setenv("OCTAVO_SHUTDOWN_TIMEOUTS", "3")
    monkeypatch.setenv("OCTAVO_HOST", "0.0.0.0")  # known
    result = invoke("serve", "--print-config")
    assert result.code == 0 and "port: 8000 " in result.out and "host: 0.0.0.0 " in result.out
    told = result.err.splitlines()
    assert len(told) == 2
    assert "OCTAVO_SHUTDOWN_TIMEOUTS: no such variable" in told[0] and "OCTAVO_SHUTDOWN_TIMEOUT?" in told[0]
    assert "OCTAVO_PORT: 'tcp://10.0.0.1:8000' is Kubernetes'" in told[1]


def test_the_servers_variables_are_known_to_other_commands(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One environment is often that of several."""
    monkeypatch.setattr("octavo.config._told", set())
    monkeypatch.setenv("OCTAVO_HOME", str(tmp_path))
    for name in ("PORT", "LIMITS", "CONFIG", "LOG_FORMAT"):
        monkeypatch.setenv(f"OCTAVO_{name}", "x")
    assert invoke("models").err == ""


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--uds", "s", "--host", "127.0.0.1"], "--uds: is instead of host and port; --host is given, too"),
        (["--uds", "s", "--port", "8000"], "--uds: is instead of host and port; --port is given, too"),
        (["--uds", "s" * 108], "uds: must be a path of at most 107 bytes"),
        (["--uds", ""], "uds: must be a path"),
        (["--log-level", "info", "-v"], "--log-level: is given, and so is -v"),
        (["--print-config", "a", "b"], "unrecognized arguments: b"),
        (["--pin-threads=maybe"], "--pin-threads: must be true or false"),
        (["--host", ""], "host: is empty"),
    ],
)
def test_flags_that_are_wrong(invoke: Invoke, arguments: list[str], problem: str) -> None:
    result = invoke("serve", *arguments)
    assert (result.code, result.out) == (2, "") and problem in result.err, result.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--enable-debug-routes", "m"],
        ["--enable-debug-routes=true", "m"],
        ["--enable-debug-routes", "true", "m"],
        ["m", "--enable-debug-routes"],
        ["--no-pin-threads", "--enable-debug-routes", "--", "m"],
    ],
)
def test_a_switch_before_the_model(invoke: Invoke, arguments: list[str]) -> None:
    """Guards a model's name that is taken for the value of the flag before it."""
    values = yaml.safe_load(invoke("serve", "--print-config", *arguments).out)
    assert (values["model"], values["enable_debug_routes"], values["pin_threads"]) == ("m", True, False)


@pytest.mark.parametrize(("arguments", "level"), [([], "info"), (["-v"], "info"), (["-vv"], "debug")])
def test_how_much_is_told(ways: Ways, invoke: Invoke, arguments: list[str], level: str) -> None:
    assert yaml.safe_load(invoke("serve", "--print-config", *arguments).out)["log_level"] == level
    assert ways.settings(None, {"log_level": "WARNING"})[0]["log_level"] == "warning"


def test_the_file_in_the_documentation(ways: Ways) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", DOCUMENTATION.read_text(), re.DOTALL)
    values, sources = ways.settings(None, None, text)
    assert values["max_num_seqs"] == values["limits"]["max_n"] == 16 and values["port"] == 8000
    assert sum("octavo.yaml" in source for source in sources.values()) == text.count(":") - 1 - text.count("://")


def test_help_is_made_of_the_settings(invoke: Invoke) -> None:
    """Every setting with its help, default and choices, and how it can be given otherwise."""
    text = " ".join(invoke("serve", "--help").out.split())
    for _, one in SETTINGS:
        assert f"{flag(one.name)} " in text and " ".join(one.metadata["help"].split()[:4]) in text
    for part in ("(default 8000)", "{text,json}", "OCTAVO_PORT", "--config FILE", "(default false)", "(default 60)"):
        assert part in text, part


def test_settings_of_the_library_are_checked_likewise() -> None:
    """ServerSettings is the same for who makes one in Python."""
    assert ServerSettings(log_level="INFO").log_level == "info"
    assert ServerSettings(limits=Limits(max_n=3)).limits.max_n == 3


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of the machine's own."""
    for name in [*NAMES, "config"]:
        monkeypatch.delenv(variable(name), raising=False)
