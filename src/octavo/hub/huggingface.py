"""Models by their Hugging Face name: ``org/name``, ``org/name:Q4_K_M`` or ``org/name:file.gguf``.

huggingface_hub does the transfers and owns the cache, so HF_HOME, HF_TOKEN, HF_HUB_OFFLINE and HF_ENDPOINT apply. Only
weights without code are ever fetched: .safetensors, .gguf and the JSON and tokenizer files beside them.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from octavo.core.errors import DownloadError, ModelNotFoundError
from octavo.hub.progress import Progress

_NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95})(?::(?P<variant>[\w.+ -]+))?")
_PREFIXES = ("https://huggingface.co/", "https://hf.co/", "huggingface.co/", "hf.co/", "hf://")
_BESIDE_WEIGHTS = frozenset({"tokenizer.model", "vocab.txt", "merges.txt", "chat_template.jinja"})
_TEMPLATE = re.compile(r"additional_chat_templates/[^/]+\.jinja")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
_DEFAULT_VARIANT = "Q4_K_M"


def parse_name(name: str) -> tuple[str, str | None] | None:
    """("org/name", variant or None) when `name` has the form of a Hugging Face model name, else None."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    found = _NAME.fullmatch(name)
    if found is None or ".." in found["repo"] or "--" in found["repo"] or found["repo"].endswith((".", ".git")):
        return None
    return found["repo"], found["variant"]


def find_cached(repo: str, variant: str | None) -> Path | None:
    """The model in huggingface_hub's cache, when all its files are there; uses no network."""
    snapshot = cached_snapshot(repo)
    if snapshot is None:
        return None
    try:
        names = [path.name for path in snapshot.iterdir() if path.exists()]
        wanted = _choose(repo, variant, names)
    except (ModelNotFoundError, OSError):
        return None
    if _is_gguf(wanted):
        return snapshot / wanted[0]
    return snapshot if is_complete_folder(snapshot) else None


def fetch(repo: str, variant: str | None, progress: Progress) -> Path:
    """Download what is missing or outdated of the model; returns a .gguf file or a folder with config.json.

    Raises ModelNotFoundError when the repository, or the variant in it, does not exist or can't be used, DownloadError
    when the Hub can't be reached and the cache has no complete copy.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        cached = find_cached(repo, variant)
        if cached is not None:
            return cached
        raise DownloadError(f"{repo} is not in the Hugging Face cache, and HF_HUB_OFFLINE=1 forbids to fetch it")
    try:
        siblings = huggingface_hub.HfApi().model_info(repo).siblings or []
        wanted = _choose(repo, variant, [sibling.rfilename for sibling in siblings])
        progress.note(f"fetching {repo} from Hugging Face: {', '.join(wanted)}")
        snapshot = Path(
            huggingface_hub.snapshot_download(
                repo, allow_patterns=[glob.escape(name) for name in wanted], tqdm_class=_bars(progress)
            )
        )
    except errors.GatedRepoError as error:
        raise ModelNotFoundError(
            f"{repo} is gated: accept its terms on https://huggingface.co/{repo} and set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"Hugging Face has no model {repo} that may be read (a private one needs HF_TOKEN), "
            "and no local file or folder has this name"
        ) from error
    except ModelNotFoundError:
        raise
    except Exception as error:  # The transport's own errors are not part of huggingface_hub's interface.
        cached = find_cached(repo, variant)
        if cached is not None:
            progress.note(f"Hugging Face can't be reached; using {repo} as it is in the cache")
            return cached
        reason = str(error).strip().splitlines()
        raise DownloadError(
            f"cannot fetch {repo} from Hugging Face: {type(error).__name__}: {reason[0] if reason else 'no details'}"
        ) from error
    return snapshot / wanted[0] if _is_gguf(wanted) else snapshot


def cached_models() -> Iterable[tuple[str, Path]]:
    """(name, path) of every usable model in huggingface_hub's cache; a GGUF file is ``org/name:file.gguf``."""
    from huggingface_hub import constants

    for folder in sorted(Path(constants.HF_HUB_CACHE).glob("models--*--*")):
        repo = folder.name.removeprefix("models--").replace("--", "/", 1)
        snapshot = cached_snapshot(repo)
        if snapshot is None:
            continue
        if is_complete_folder(snapshot):
            yield repo, snapshot
        for file in sorted(snapshot.glob("*.gguf")):
            if file.exists():
                yield f"{repo}:{file.name}", file


def cached_snapshot(repo: str) -> Path | None:
    """The folder of the revision "main" of `repo` in huggingface_hub's cache."""
    from huggingface_hub import constants

    root = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    try:
        commit = (root / "refs" / "main").read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        return None
    snapshot = root / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None


def is_complete_folder(folder: Path) -> bool:
    """Whether `folder` has config.json and every weight file that its index names."""
    if not (folder / "config.json").is_file():
        return False
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return any(path.is_file() for path in folder.glob("*.safetensors"))
    try:
        shards = set(json.loads(index.read_text())["weight_map"].values())
        return bool(shards) and all((folder / Path(shard).name).is_file() for shard in shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _choose(repo: str, variant: str | None, names: list[str]) -> list[str]:
    """The files to use of a repository: one .gguf, or safetensors with what belongs to them. Top-level files only, but
    for chat templates."""
    templates = sorted(filter(_TEMPLATE.fullmatch, names))
    names = sorted(name for name in names if "/" not in name)
    ggufs = [name for name in names if name.lower().endswith(".gguf") and not name.lower().startswith("mmproj")]
    weights = [name for name in names if name.endswith(".safetensors")]
    if variant is not None:
        return [_choose_gguf(repo, variant, ggufs)]
    if weights and "config.json" in names:
        # Some repositories hold the same weights twice, as model*.safetensors and as consolidated*.safetensors.
        weights = [name for name in weights if name.startswith("model")] or weights
        beside = [name for name in names if name.endswith(".json") or name in _BESIDE_WEIGHTS]
        return beside + templates + weights
    if len(ggufs) == 1:
        return [_choose_gguf(repo, ggufs[0], ggufs)]
    if ggufs:
        return [_choose_gguf(repo, _DEFAULT_VARIANT, ggufs)]
    raise ModelNotFoundError(
        f"{repo} has no weights Octavo can read: neither .gguf files nor .safetensors with a config.json "
        "(.bin and .pt files can hold code and are never fetched)"
    )


def _choose_gguf(repo: str, variant: str, ggufs: list[str]) -> str:
    whole = [name for name in ggufs if not _SHARD.search(name)]
    if variant in whole:
        return variant
    quantisation = re.compile(rf"(^|[-._]){re.escape(variant)}\.gguf$", re.IGNORECASE)
    matching = [name for name in whole if quantisation.search(name)]
    if len(matching) == 1:
        return matching[0]
    split = " (files split in shards can't be used)" if len(whole) < len(ggufs) else ""
    if not whole:
        raise ModelNotFoundError(f"{repo} has no single .gguf file{split}")
    raise ModelNotFoundError(
        f"{repo}: {variant} matches {len(matching)} of its .gguf files; choose one as {repo}:FILE out of "
        f"{', '.join(whole)}{split}"
    )


def _is_gguf(wanted: list[str]) -> bool:
    return len(wanted) == 1 and wanted[0].lower().endswith(".gguf")


def _bars(progress: Progress) -> Any:
    """huggingface_hub's own progress bars, silent unless `progress` draws bars."""
    from huggingface_hub.utils.tqdm import tqdm

    if progress.interactive:
        return tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    return Silent
