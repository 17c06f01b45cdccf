"""What a model name leads to: a local path, an alias, or a Hugging Face name, in this order."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from octavo.core.errors import ModelNotFoundError, shown
from octavo.core.model_folder import check_inside
from octavo.hub import huggingface
from octavo.hub.aliases import ALIASES, Alias, alias_path, find_alias, problem_of
from octavo.hub.home import models_dir
from octavo.hub.progress import Progress, default_progress


class LocalModel(NamedTuple):
    """A model on disk."""

    name: str  # what to give to `resolve_model`
    path: Path  # a .gguf file, or a folder with config.json
    num_bytes: int  # of the file, or of all files in the folder
    format: str  # "gguf" or "safetensors"
    source: str  # "alias", "file" (put into $OCTAVO_HOME by hand) or "huggingface"
    problem: str | None = None  # why it can't be used as it is


def resolve_model(name: str, *, download: bool = True, progress: Progress | None = None) -> Path:
    """The .gguf file, or the Hugging Face folder with config.json, that `name` stands for.

    With `download` what is missing is fetched; without, the network is not used. `progress` None draws bars on stderr
    when that is a terminal. Files already here are taken as they are, but for the size of an alias; `pull` verifies.

    Raises ModelNotFoundError (no such model; the message lists what is allowed) or DownloadError.
    """
    local = _local(name)
    if local is not None:
        return local
    alias = find_alias(name)
    if alias is not None:
        path = alias_path(alias)
        problem = problem_of(alias, path) if path.is_file() else "is not there"
        if problem is None:
            return path
        if not download:
            raise ModelNotFoundError(f"{path} {problem}; fetch it with `octavo pull {alias.name}`")
        return _pull_alias(alias, progress)
    parsed = _hugging_face_name(name)
    cached = huggingface.find_cached(*parsed)
    if cached is not None:
        return cached
    if not download:
        raise ModelNotFoundError(f"{name} is not in the Hugging Face cache; fetch it with `octavo pull {name}`")
    return huggingface.fetch(*parsed, progress or default_progress())


def pull(name: str, *, progress: Progress | None = None) -> Path:
    """Fetch `name`, or verify and update what is here: an alias by SHA-256, a Hugging Face name by its revision.

    A local path is returned as it is. Raises as `resolve_model` does.
    """
    local = _local(name)
    if local is not None:
        return local
    alias = find_alias(name)
    if alias is not None:
        return _pull_alias(alias, progress)
    return huggingface.fetch(*_hugging_face_name(name), progress or default_progress())


def _pull_alias(alias: Alias, progress: Progress | None) -> Path:
    from octavo.hub.store import pull_alias  # which needs much that a model which is there does not

    return pull_alias(alias, progress or default_progress())


def list_models() -> list[LocalModel]:
    """Models in $OCTAVO_HOME and in huggingface_hub's cache. Reads names and sizes only, no file contents."""
    models = []
    known = {alias_path(alias): alias for alias in ALIASES.values()}
    for path in sorted(models_dir(writable=False).glob("*/*.gguf")):
        if not path.is_file():  # A broken link.
            continue
        alias = known.get(path)
        models.append(
            LocalModel(
                name=alias.name if alias else str(path),
                path=path,
                num_bytes=path.stat().st_size,
                format="gguf",
                source="alias" if alias else "file",
                problem=problem_of(alias, path) if alias else None,
            )
        )
    for name, path in huggingface.cached_models():
        kind = "safetensors" if path.is_dir() else "gguf"
        models.append(LocalModel(name, path, _num_bytes(path), kind, "huggingface"))
    return models


def _num_bytes(path: Path) -> int:
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _local(name: str) -> Path | None:
    """The local model at the path `name`; None when it is no path. Raises ModelNotFoundError for a path to no model."""
    if not name or "\0" in name:
        raise ModelNotFoundError(f"a model name can't be empty. {_allowed()}")
    try:
        path = Path(name).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelNotFoundError(
            f"{shown(name)} can't be a path: {getattr(error, 'strerror', None) or error}"
        ) from error
    if exists:
        problem = _why_unusable(path)
        if problem is None:
            return path
        if find_alias(name) is not None:  # An unrelated folder called "smollm2" must not hide the alias.
            return None
        if not path.is_dir() or len(list(path.glob("*.gguf"))) != 1:
            raise ModelNotFoundError(f"{path} {problem}")
        return check_inside(path, next(path.glob("*.gguf")).name)
    if _looks_like_path(name):
        raise ModelNotFoundError(f"{name} does not exist{_nearby(path)}")
    return None


def _why_unusable(path: Path) -> str | None:
    if path.is_dir():
        if (path / "config.json").is_file():
            return None
        files = sorted(file.name for file in path.glob("*.gguf"))
        if len(files) > 1:
            return f"holds several models; give the path of one: {', '.join(files[:10])}"
        return "is a folder without a config.json and without a .gguf file"
    if not path.is_file():
        return "is neither a file nor a folder"
    if path.suffix.lower() == ".gguf":
        return None
    if path.suffix == ".safetensors":
        return "is a weight file; give its folder, which must have a config.json"
    try:
        with path.open("rb") as file:
            if file.read(4) == b"GGUF":
                return None
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return "is not a model: a .gguf file or a folder with config.json and .safetensors is"


def _looks_like_path(name: str) -> bool:
    if name.startswith(("/", "./", "../", "~")) or name in (".", ".."):
        return True
    if huggingface.parse_name(name) is not None:
        return name.count("/") == 1 and ":" not in name and name.endswith((".gguf", ".safetensors"))
    return "/" in name or "\\" in name or name.endswith((".gguf", ".safetensors"))


def _nearby(path: Path) -> str:
    """A hint when the folder is right and the file name is nearly so."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    import difflib

    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def _hugging_face_name(name: str) -> tuple[str, str | None]:
    parsed = huggingface.parse_name(name)
    if parsed is not None:
        return parsed
    import difflib

    close = difflib.get_close_matches(name.lower(), ALIASES, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise ModelNotFoundError(f"unknown model {name!r}.{hint} {_allowed()}")


def _allowed() -> str:
    return (
        f"Allowed are the short names {', '.join(ALIASES)}; the path of a .gguf file or of a folder with config.json "
        "and .safetensors; a Hugging Face name as org/name, org/name:QUANT or org/name:FILE.gguf."
    )
