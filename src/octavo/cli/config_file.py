"""Settings in a YAML file, and written as one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from octavo.core.errors import ConfigError, shown
from octavo.core.settings import Given, checked, type_hints
from octavo.server.errors import instead, printable

_MOST_BYTES = 1 << 20


class _Loader(yaml.SafeLoader):
    """Of plain values alone. A key that comes twice in a mapping is an error: which one was meant nobody knows."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names: set[Any] = set()
        for key, _ in node.value:
            problem = f"the key {shown(key.value)} is there twice"
            if not isinstance(key, yaml.ScalarNode):
                problem = "a key must be a name"
            elif key.value not in names:
                names.add(key.value)
                continue
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        return super().construct_mapping(node, deep=deep)


def read_config_file(path: str, kinds: Mapping[str, type]) -> dict[str, Given]:
    """What a file says of settings. `kinds`: the class of each setting there is.

    Raises ConfigError naming the file, and where it is known the line and the key.
    """
    name = shown(path)[1:-1]
    loader = None
    try:
        with Path(path).open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise ConfigError(f"config: {name} has more than {_MOST_BYTES} bytes")
        loader = _Loader(data)
        return _settings(name, loader, kinds)
    except OSError as error:
        raise ConfigError(f"config: {name} cannot be read: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = name if mark is None else f"{name}, line {mark.line + 1}"
        raise ConfigError(f"{where}: {printable(error.problem or str(error))}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        problem = "is nested too deeply" if isinstance(error, RecursionError) else printable(str(error))
        raise ConfigError(f"config: {name} is no YAML: {problem}") from None
    finally:
        if loader is not None:
            loader.dispose()


def _settings(name: str, loader: _Loader, kinds: Mapping[str, type]) -> dict[str, Given]:
    node = loader.get_single_node()
    if node is None or node.tag == "tag:yaml.org,2002:null":  # it is empty
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"config: {name} must hold settings, such as max_num_seqs: 16, and no list or text alone")
    found: dict[str, Given] = {}
    lines: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        where = f"{name}, line {line}"
        written = loader.construct_object(key, deep=True)
        if not isinstance(written, str):
            raise ConfigError(f"{where}: a key must be the name of a setting, not {shown(written)}")
        setting = written.replace("-", "_")
        if setting not in kinds:
            hint = instead(setting, kinds)
            raise ConfigError(f"{where}: {printable(shown(written))} is no setting; {hint}")
        if setting in lines:
            raise ConfigError(f"{where}: {written} is there twice; it stands in line {lines[setting]} as well")
        lines[setting] = line
        source = f"{where}: {written}"
        given = loader.construct_object(value, deep=True)
        if given is None:  # as if it were not there
            continue
        (field,) = [one for one in fields(kinds[setting]) if one.name == setting]
        checked(source, given, type_hints(kinds[setting])[setting], field.metadata)
        found[setting] = Given(given, source)
    return found


def written(values: Mapping[str, Any], sources: Mapping[str, str], secrets: Mapping[str, int]) -> str:
    """Settings as such a file, each with where it is from. Of secret ones only how many there are."""
    texts = {name: f"{name}: {_yaml(value)}" for name, value in values.items()}
    texts |= {name: f"# {name}: {count} that are not told" for name, count in secrets.items() if count}
    width = min(60, max(map(len, texts.values())))
    lines = [f"{text:{width}}  # {sources.get(name, 'default')}" for name, text in texts.items()]
    return "\n".join(lines) + "\n"


def _yaml(value: Any) -> str:
    """On one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, sort_keys=False, width=math.inf)
    return text.removesuffix("...\n").strip()
