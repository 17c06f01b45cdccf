"""Outputs by many JSON schemas of many kinds: each that ends is valid, as another library sees it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from octavo import LLM, InvalidRequestError, SamplingParams

NAMES = ["name", "age", "tags", "a b", "Größe", "x"]
WORDS = ["a", "whale", "日本", 'q"uote', "", "new\nline"]
PATTERNS = ["^[a-z]{1,4}$", "^[0-9]{3}-[0-9]{2}$", "^(yes|no)$", "^x?y?$"]
FORMATS = ["date", "uuid", "ipv4"]


def a_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """Small enough that a model of random weights comes to an end."""
    kinds = ["string", "integer", "boolean", "null", "enum", "const"]
    if depth < 3:
        kinds += ["object", "object", "object", "array", "array", "anyOf"]
    kind = rng.choice(kinds) if depth else rng.choice(["object", "array", "anyOf", "object"])
    if kind == "object":
        names = rng.sample(NAMES, rng.randint(0, 4))
        made: dict[str, Any] = {
            "type": "object",
            "properties": {name: a_schema(rng, depth + 1) for name in names},
            "required": [name for name in names if rng.random() < 0.7],
            "additionalProperties": False,
        }
        return made
    if kind == "array":
        least = rng.randint(0, 2)
        made = {
            "type": "array",
            "items": a_schema(rng, depth + 1),
            "minItems": least,
            "maxItems": least + rng.randint(0, 2),
        }
        if rng.random() < 0.3:
            made["prefixItems"] = [a_schema(rng, depth + 1)]
            made["maxItems"] = max(made["maxItems"], 1)
        return made
    if kind == "anyOf":
        return {"anyOf": [a_schema(rng, depth + 1) for _ in range(rng.randint(1, 3))]}
    if kind == "string":
        return {"type": "string"} | rng.choice(
            [
                {"maxLength": rng.randint(0, 6)},
                {"minLength": 1, "maxLength": 3},
                {"pattern": rng.choice(PATTERNS)},
                {"format": rng.choice(FORMATS)},
                {"enum": rng.sample(WORDS, 2)},
            ]
        )
    if kind == "integer":
        low = rng.randint(-200, 200)
        return {"type": "integer", "minimum": low, "maximum": low + rng.choice([0, 3, 500])}
    if kind == "enum":
        return {"enum": rng.sample([*WORDS, 1, -2.5, None, True, [1, "a"], {"b": None}], rng.randint(1, 4))}
    if kind == "const":
        return {"const": rng.choice([*WORDS, 7, None, False])}
    return {"type": kind}


SPECIAL: list[dict[str, Any]] = [
    {"$defs": {"n": {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}},
     "required": ["next"], "additionalProperties": False}}, "$ref": "#/$defs/n"},
    {"type": ["integer", "null"], "minimum": 0, "maximum": 9},
    {"type": "object", "additionalProperties": {"type": "integer", "minimum": 0, "maximum": 9}, "maxProperties": 2},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 3, "maxItems": 3},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]},
    {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.5},
    {"oneOf": [{"type": "boolean"}, {"type": "null"}]},
]  # fmt: skip


def run(llm: LLM, count: int) -> tuple[int, int]:
    """How many schemas were taken, and how many outputs ended."""
    rng = random.Random(7)
    schemas = SPECIAL + [a_schema(rng) for _ in range(count)]
    taken = []
    for schema in schemas:
        params = SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=400, structured_outputs={"json": schema})
        try:
            llm._frontend.checked_fields(params)
        except InvalidRequestError as error:
            assert error.field == "structured_outputs.json"
        else:
            taken.append((schema, params))
    outputs = llm.generate(["A"] * len(taken), [params for _, params in taken], use_tqdm=False)
    ended = 0
    for (schema, _), output in zip(taken, outputs, strict=True):
        assert output.error is None
        for one in output.outputs:
            if one.finish_reason == "stop":
                ended += 1
                jsonschema.validate(json.loads(one.text), schema, jsonschema.Draft202012Validator)
    return len(taken), ended


def test_some_schemas(tiny_llama_dir: Path) -> None:
    with LLM(str(tiny_llama_dir), max_num_seqs=32, max_model_len=512) as llm:
        taken, ended = run(llm, 40)
    assert taken >= 40 and ended >= 2.5 * taken


@pytest.mark.slow
def test_many_schemas(tiny_llama_dir: Path) -> None:
    with LLM(str(tiny_llama_dir), max_num_seqs=32, max_model_len=512) as llm:
        taken, ended = run(llm, 600)
    assert taken >= 500 and ended >= 2.5 * taken
