"""What a model folder can make us read: its own files, regular and not too large, and no link that leads away."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from octavo import LLM
from octavo.core.errors import ModelFormatError, OctavoError
from octavo.core.model_folder import check_inside, read_file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder beside somebody's secret."""
    (tmp_path / "secret.json").write_text('{"secret": 1}')
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text("{}")
    return made


def test_its_own_files(folder: Path) -> None:
    assert read_file(folder, "config.json", 100) == b"{}"
    assert read_file(folder, "nothing.json", 100) is None
    (folder / "again.json").symlink_to("config.json")
    (folder / "broken.json").symlink_to("gone.json")
    assert read_file(folder, "again.json", 100) == b"{}" and read_file(folder, "broken.json", 100) is None
    (folder / "more").mkdir()
    (folder / "more" / "one.jinja").write_bytes(b"x")
    assert read_file(folder, "one.jinja", 100, "more") == b"x"
    with pytest.raises(ModelFormatError, match=r"config\.json: file: is larger than 1 bytes"):
        read_file(folder, "config.json", 1)


@pytest.mark.parametrize("target", ["../secret.json", "/dev/zero", "/proc/self/environ", "/dev/stdin", ".."])
def test_links_that_leave_the_folder(folder: Path, target: str) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(target)
    with pytest.raises(ModelFormatError, match=r"'config\.json' is a link that leaves the folder"):
        read_file(folder, "config.json", 100)


def test_a_sub_folder_that_is_a_link(folder: Path) -> None:
    (folder / "more").symlink_to("..")
    with pytest.raises(ModelFormatError, match=r"'more/secret\.json' is a link that leaves the folder"):
        read_file(folder, "secret.json", 100, "more")


def test_what_is_no_file(folder: Path) -> None:
    os.mkfifo(folder / "pipe.json")
    (folder / "folder.json").mkdir()
    for name in ("pipe.json", "folder.json"):
        with pytest.raises(ModelFormatError, match="is not a regular file"):
            read_file(folder, name, 100)
    for name in ("", ".", "..", "../secret.json", "a/b", "a\\b", "c:d", "a\0b"):
        with pytest.raises(ModelFormatError, match="is not a bare file name"):
            check_inside(folder, name)


def test_the_cache_of_hugging_face(tmp_path: Path) -> None:
    """Its snapshots are links into the blobs of the same repository; to another's they are not followed."""
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "123"
    other = tmp_path / "models--c--d" / "blobs"
    for made in (blobs, snapshot / "more", other):
        made.mkdir(parents=True)
    (blobs / "abc").write_bytes(b"{}")
    (other / "abc").write_bytes(b"{}")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    (snapshot / "more" / "one.jinja").symlink_to("../../../blobs/abc")
    (snapshot / "tokenizer.json").symlink_to("../../../models--c--d/blobs/abc")
    assert read_file(snapshot, "config.json", 100) == b"{}"
    assert read_file(snapshot, "one.jinja", 100, "more") == b"{}"
    with pytest.raises(ModelFormatError, match="leaves the folder"):
        read_file(snapshot, "tokenizer.json", 100)


@pytest.mark.parametrize(
    "name",
    [
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "added_tokens.json", "chat_template.jinja", "chat_template.json", "additional_chat_templates/tool_use.jinja",
        "model.safetensors",
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_whole_model(tiny_llama_dir: Path, tmp_path: Path, name: str, kind: str) -> None:
    """Whichever of its files is planted: what it leads to reaches no prompt, and no pipe is waited for."""
    model = Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))
    path = model / name
    path.parent.mkdir(exist_ok=True)
    secret = tmp_path / "secret"
    secret.write_bytes(path.read_bytes() if path.exists() else b"{}")
    path.unlink(missing_ok=True)
    if kind == "link":
        path.symlink_to(secret)
    else:
        os.mkfifo(path)
    wanted = (
        "leaves the folder"
        if kind == "link"
        else "not a regular file|no such file|no tokenizer.json|is neither|without a"
    )
    with pytest.raises(OctavoError, match=wanted):
        LLM(str(model), max_model_len=32)
