"""What a name leads to when nothing has to be fetched."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from octavo import hub
from octavo.core.errors import ConfigError, ModelFormatError, ModelNotFoundError
from octavo.hub import huggingface
from octavo.hub.aliases import Alias


def offline(name: str | Path) -> Path:
    return hub.resolve_model(str(name), download=False)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_local_file_and_folder(model_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "a b.gguf"
    file.write_bytes(b"GGUF")
    assert offline(file) == file
    assert offline(model_folder) == model_folder
    (tmp_path / "no-suffix").write_bytes(b"GGUF....")
    assert offline(tmp_path / "no-suffix") == tmp_path / "no-suffix"


def test_folder_with_one_gguf_file_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x.gguf").write_bytes(b"GGUF")
    assert offline(tmp_path / "d") == tmp_path / "d" / "x.gguf"
    (tmp_path / "d" / "x.gguf").rename(tmp_path / "x.gguf")
    (tmp_path / "d" / "x.gguf").symlink_to(tmp_path / "x.gguf")
    with pytest.raises(ModelFormatError, match=r"'x\.gguf' is a link that leaves the folder"):
        offline(tmp_path / "d")
    (tmp_path / "d" / "y.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelNotFoundError, match=r"several models.*x\.gguf, y\.gguf"):
        offline(tmp_path / "d")


@pytest.mark.parametrize(
    "name", ["./nix.gguf", "/nix/nix", "~/nix-nix", "nix.gguf", "a/b/c", "..\\nix", "dir/nix.gguf"]
)
def test_missing_path_says_so(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against asking Hugging Face for what is meant as a path."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError, match=re.escape(f"{name} does not exist")):
        offline(name)


def test_misspelt_file_name_gets_a_hint(tmp_path: Path) -> None:
    (tmp_path / "model-q4.gguf").touch()
    with pytest.raises(ModelNotFoundError, match=r"did you mean .*/model-q4\.gguf\?"):
        offline(tmp_path / "model-q5.gguf")


def test_unknown_name_lists_what_is_allowed() -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        hub.resolve_model("smolm2")
    message = str(caught.value)
    assert "Did you mean smollm2?" in message
    for allowed in ("gemma3-270m", ".gguf file", "config.json", "org/name:QUANT"):
        assert allowed in message


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 5000, "~nobody-here/x", "\udcff", "a b c", "../..:Q4", "a/b:../c"])
def test_strange_names_give_the_same_error(name: str) -> None:
    """Guards against ValueError, OSError or RuntimeError from the path functions."""
    with pytest.raises(ModelNotFoundError):
        offline(name)


def test_files_that_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"\x80\x02")
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(ModelNotFoundError, match="is not a model"):
        offline(tmp_path / "x.bin")
    with pytest.raises(ModelNotFoundError, match="give its folder"):
        offline(tmp_path / "x.safetensors")
    with pytest.raises(ModelNotFoundError, match=r"without a config\.json"):
        offline(tmp_path)
    with pytest.raises(ModelNotFoundError, match="neither a file nor a folder"):
        offline("/dev/null")


def test_alias_is_not_hidden_by_an_unrelated_folder(
    alias: Alias, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`git clone …/smollm2` in the working directory must not hide the alias; a model there does."""
    path = hub.pull(alias.name)
    (tmp_path / alias.name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert offline(alias.name) == path
    (tmp_path / alias.name / "config.json").write_text("{}")
    assert offline(alias.name) == Path(alias.name)


def test_alias_that_is_not_here() -> None:
    with pytest.raises(ModelNotFoundError, match="octavo pull smollm2"):
        offline("smollm2")


def test_home_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OCTAVO_HOME", "~/models")
    assert hub.octavo_home(writable=False) == tmp_path / "models"
    monkeypatch.setenv("OCTAVO_HOME", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert hub.octavo_home(writable=False) == tmp_path / ".cache" / "octavo"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert hub.octavo_home(writable=False) == tmp_path / "xdg" / "octavo"
    monkeypatch.setenv("OCTAVO_HOME", "~nobody-here/x")
    with pytest.raises(ConfigError, match="OCTAVO_HOME"):
        hub.octavo_home()


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("org/name", ("org/name", None)),
        ("org/name-GGUF:Q4_K_M", ("org/name-GGUF", "Q4_K_M")),
        ("org/name:a-b.Q8_0.gguf", ("org/name", "a-b.Q8_0.gguf")),
        ("https://huggingface.co/org/name", ("org/name", None)),
        ("hf.co/org/name:Q4_0", ("org/name", "Q4_0")),
        ("name", None),
        ("org/..", None),
        ("a/b/c", None),
        ("org/name:", None),
        ("org/name:../x", None),
        ("org/--", None),
        ("-x/name", None),
        ("org/name\n", None),
    ],
)
def test_form_of_hugging_face_names(name: str, parsed: tuple[str, str | None] | None) -> None:
    assert huggingface.parse_name(name) == parsed
