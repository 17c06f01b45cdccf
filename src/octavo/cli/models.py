"""List the models on this machine, those in $OCTAVO_HOME and those in the cache of huggingface_hub, and the short names
of models that `octavo pull` can fetch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.core.errors import OctavoError
from octavo.core.model_folder import read_file

if TYPE_CHECKING:
    from octavo.hub import LocalModel
    from octavo.hub.aliases import Alias

_COLUMNS = ("NAME", "SIZE", "FORMAT", "ARCHITECTURE", "QUANTIZATION", "PATH")
# general.file_type of GGUF metadata: what the file as a whole is called. Types of single tensors may differ.
_FILE_TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    32: "BF16",
}
_MAX_CONFIG_BYTES = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `octavo models`."""
    parser.add_argument("--json", action="store_true", help="print a JSON list; sizes in bytes, path null: not here")


def run(args: argparse.Namespace) -> int:
    """Print the models. One that can't be read is listed with its problem and does not hide the others."""
    from octavo import hub

    entries = [_describe(model) for model in hub.list_models()]
    here = {entry["name"] for entry in entries}
    entries += [_not_here(alias) for alias in hub.ALIASES.values() if alias.name not in here]
    if args.json:
        print(json.dumps(entries, indent=2))
        return 0
    if not here:
        print(f"no models in {hub.octavo_home(writable=False)} yet; these have a short name:")
    if sys.stdout.isatty():
        _print_table(entries)
    else:
        _print_aligned(entries)
    return 0


def _describe(model: LocalModel) -> dict[str, Any]:
    architecture = quantization = None
    problem = model.problem
    if problem is None:
        try:
            architecture, quantization = _inspect_folder(model.path) if model.path.is_dir() else _inspect(model.path)
        except (OctavoError, OSError, ValueError) as error:
            problem = str(error)
    return {
        "name": model.name,
        "path": str(model.path),
        "size": model.num_bytes,
        "format": model.format,
        "architecture": architecture,
        "quantization": quantization,
        "source": model.source,
        "description": None,
        "problem": problem,
    }


def _not_here(alias: Alias) -> dict[str, Any]:
    return {
        "name": alias.name,
        "path": None,
        "size": alias.num_bytes,
        "format": "gguf",
        "architecture": None,
        "quantization": None,
        "source": "alias",
        "description": alias.description,
        "problem": None,
    }


def _inspect(path: Path) -> tuple[str | None, str | None]:
    """(architecture, quantisation) of a GGUF file."""
    from octavo.formats.gguf import GGUFFile

    with GGUFFile(path) as file:
        architecture = file.metadata.get("general.architecture")
        quantization = _FILE_TYPES.get(file.metadata.get("general.file_type", -1))
        if quantization is None:
            num_bytes: Counter[str] = Counter()
            for tensor in file.tensors.values():
                num_bytes[tensor.dtype.name] += tensor.nbytes
            quantization = num_bytes.most_common(1)[0][0] if num_bytes else None
    return (architecture if isinstance(architecture, str) else None), quantization


def _inspect_folder(folder: Path) -> tuple[str | None, str | None]:
    """(architecture, quantisation or weight type) of a Hugging Face folder, from its config.json."""
    config = json.loads(read_file(folder, "config.json", _MAX_CONFIG_BYTES) or b"")
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'config.json'}: not a JSON object")
    quantized = config.get("quantization_config")
    method = quantized.get("quant_method") if isinstance(quantized, dict) else None
    kind = method or config.get("dtype") or config.get("torch_dtype")
    architecture = config.get("model_type")
    return (str(architecture) if architecture else None), (str(kind) if kind else None)


def _cells(entry: dict[str, Any]) -> list[str]:
    size = f"{entry['size'] / 1e6:,.1f} MB"
    if entry["path"] is None:
        told = f"{entry['description']}; not here yet: `octavo pull {entry['name']}`"
        return [entry["name"], size, entry["format"], "-", "-", told]
    architecture = entry["architecture"] or ("unreadable" if entry["problem"] else "?")
    return [entry["name"], size, entry["format"], architecture, entry["quantization"] or "?", entry["path"]]


def _print_table(entries: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*_COLUMNS, box=None, header_style="bold", pad_edge=False)
    for entry in entries:
        table.add_row(*map(Text, _cells(entry)))  # Text: names are shown, not read as markup.
    Console(width=10_000).print(table)  # Never wrapped by us: a path broken in two can't be copied.
    _print_problems(entries)


def _print_aligned(entries: list[dict[str, Any]]) -> None:
    rows = [list(_COLUMNS), *map(_cells, entries)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    _print_problems(entries)


def _print_problems(entries: list[dict[str, Any]]) -> None:
    for entry in entries:
        if entry["problem"]:
            remedy = f"; fetch it again with `octavo pull {entry['name']}`" if entry["source"] == "alias" else ""
            sys.stderr.write(f"octavo: {entry['path']}: {entry['problem']}{remedy}\n")
