"""`open_weights`: the right reader for whatever a path names."""

from __future__ import annotations

from pathlib import Path

import pytest

from octavo.core.errors import ModelFormatError, ModelNotFoundError, UnsupportedModelError
from octavo.formats import GGUFFile, SafetensorsModel, open_weights

from .builder import U16, gguf_file, sample_gguf, sample_safetensors
from .test_safetensors import make_shards


def test_files_by_content_not_by_name(tmp_path: Path) -> None:
    """A model file without its suffix (a cache's blob) opens too."""
    (tmp_path / "blob1").write_bytes(sample_gguf())
    (tmp_path / "blob2").write_bytes(sample_safetensors())
    with open_weights(str(tmp_path / "blob1")) as gguf, open_weights(tmp_path / "blob2") as safetensors:
        assert isinstance(gguf, GGUFFile)
        assert isinstance(safetensors, SafetensorsModel)
        assert "linear" in gguf.tensors
        assert "matrix" in safetensors.tensors


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no \.safetensors and no \.gguf"):
        open_weights(tmp_path)
    (tmp_path / "m.gguf").write_bytes(sample_gguf())
    with open_weights(tmp_path) as model:
        assert isinstance(model, GGUFFile)
    (tmp_path / "n.gguf").write_bytes(sample_gguf())
    with pytest.raises(ModelFormatError, match=r"2 \.gguf files"):
        open_weights(tmp_path)
    index = make_shards(tmp_path)
    for path in (tmp_path, index):
        with open_weights(path) as model:
            assert isinstance(model, SafetensorsModel)


@pytest.mark.parametrize("content", [b"ggjt" + bytes(64), b"PK\x03\x04" + bytes(64), b"G", b"\x80\x02}q\x00."])
def test_other_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ModelFormatError, match="neither a GGUF nor a safetensors file"):
        open_weights(tmp_path / "file")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        open_weights(tmp_path / "absent")
    with pytest.raises(ModelNotFoundError):
        open_weights(tmp_path / "nul\0l")
    with pytest.raises(ModelFormatError, match="too long"):
        open_weights("x" * 5000)
    (tmp_path / "empty").touch()
    with pytest.raises(ModelFormatError, match="empty"):
        open_weights(tmp_path / "empty")


def test_dropped_pages_are_read_again(tmp_path: Path) -> None:
    """Guards against pages dropped with what is in them, and shards that are forgotten."""
    (tmp_path / "m.gguf").write_bytes(sample_gguf())
    index = make_shards(tmp_path)
    for path, files in ((tmp_path / "m.gguf", 1), (index, 2)):
        with open_weights(path) as model:
            assert len(model.mappings) == files
            before = {name: tensor.data.tobytes() for name, tensor in model.tensors.items()}
            model.drop_pages()
            assert {name: tensor.data.tobytes() for name, tensor in model.tensors.items()} == before


def test_split_gguf(tmp_path: Path) -> None:
    """One part alone lacks tensors: the error must say why."""
    (tmp_path / "m-00001-of-00003.gguf").write_bytes(gguf_file([("split.count", U16, 3)]))
    with pytest.raises(UnsupportedModelError, match="the model is in 3 GGUF files"):
        open_weights(tmp_path)
    (tmp_path / "m-00001-of-00003.gguf").write_bytes(gguf_file([("split.count", U16, 1)]))
    open_weights(tmp_path).close()


def test_link_out_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "m.gguf").write_bytes(sample_gguf())
    (tmp_path / "model" / "m.gguf").symlink_to("../m.gguf")
    with pytest.raises(ModelFormatError, match="leaves the folder"):
        open_weights(tmp_path / "model")
    open_weights(tmp_path / "model" / "m.gguf").close()
