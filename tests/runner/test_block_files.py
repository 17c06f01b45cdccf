"""Blocks in files: what was kept comes back, and nothing else does."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from octavo.core.errors import ConfigError
from octavo.runner import block_files
from octavo.runner.block_files import BlockFiles, loading_is_slower
from tests.backends.cpu.test_processes import in_fork

TOKENS = tuple(range(16))


def content(block: int) -> bytes:
    return bytes([block % 251]) * 1000


def key(block: int) -> bytes:
    return block.to_bytes(32, "little")


@pytest.fixture
def files(tmp_path: Path) -> Iterator[BlockFiles]:
    made = BlockFiles(tmp_path, 1 << 20, 1000, content)
    yield made
    made.close()


def the_file(folder: Path) -> Path:
    (found,) = folder.glob("*.kv")
    return found


def test_what_was_kept_comes_back(files: BlockFiles, tmp_path: Path) -> None:
    assert files.load(key(1), TOKENS, None) is None
    files.save(key(1), TOKENS, 1)
    files.flush()
    assert files.load(key(1), TOKENS, None) == content(1)
    assert files.load(key(2), TOKENS, None) is None
    assert stat.S_IMODE(the_file(tmp_path).stat().st_mode) == 0o600


def test_blocks_of_another_size_are_no_hits(files: BlockFiles, tmp_path: Path) -> None:
    """Guards against a layout of KV that has changed since: such a block must not reach the kernels."""
    files.save(key(1), TOKENS, 1)
    files.close()
    for size in (999, 1001):
        again = BlockFiles(tmp_path, 1 << 20, size, content)
        assert again.load(key(1), TOKENS, None) is None
        again.close()


def test_after_a_restart(files: BlockFiles, tmp_path: Path) -> None:
    files.save(key(1), TOKENS, 1)
    files.close()
    again = BlockFiles(tmp_path, 1 << 20, 1000, content)
    assert again.load(key(1), TOKENS, None) == content(1) and again.num_bytes == the_file(tmp_path).stat().st_size
    again.close()


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "longer", "version", "magic", "gone", "tokens"])
def test_damaged_files_are_no_hits_and_go_away(files: BlockFiles, tmp_path: Path, damage: str) -> None:
    files.save(key(1), TOKENS, 1)
    files.flush()
    path = the_file(tmp_path)
    data = bytearray(path.read_bytes())
    asked = TOKENS
    if damage == "truncated":
        del data[-1]
    elif damage == "empty":
        data.clear()
    elif damage == "flipped":
        data[-500] ^= 1
    elif damage == "longer":
        data += b"x"
    elif damage == "version":
        data[8] += 1
    elif damage == "magic":
        data[0] ^= 1
    elif damage == "tokens":
        asked = (*TOKENS[:-1], 99)  # as if two prefixes had the same name
    path.write_bytes(data)
    if damage == "gone":
        path.unlink()
    assert files.load(key(1), asked, None) is None
    assert not path.exists() and len(files) == 0 and files.num_bytes == 0


def test_every_truncation_and_every_flipped_byte_of_the_header(files: BlockFiles, tmp_path: Path) -> None:
    files.save(key(1), TOKENS, 1)
    files.close()
    path = the_file(tmp_path)
    data = path.read_bytes()
    for cut in range(0, len(data), 37):
        path.write_bytes(data[:cut])
        again = BlockFiles(tmp_path, 1 << 20, 1000, content)
        assert again.load(key(1), TOKENS, None) is None
        again.close()
    for at in range(160):
        path.write_bytes(data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :])
        again = BlockFiles(tmp_path, 1 << 20, 1000, content)
        assert again.load(key(1), TOKENS, None) is None, at
        again.close()


def test_a_file_of_another_name(files: BlockFiles, tmp_path: Path) -> None:
    """Renamed by hand: its content says whose it is."""
    files.save(key(1), TOKENS, 1)
    files.close()
    the_file(tmp_path).rename(tmp_path / f"{key(2).hex()}.kv")
    again = BlockFiles(tmp_path, 1 << 20, 1000, content)
    assert again.load(key(2), TOKENS, None) is None
    again.close()


def test_the_size_is_kept_and_what_was_used_longest_ago_goes(tmp_path: Path) -> None:
    files = BlockFiles(tmp_path, 3500, 1000, content)
    for block in range(3):
        files.save(key(block), TOKENS, block)
        files.flush()
    assert files.load(key(0), TOKENS, None) is not None
    files.save(key(3), TOKENS, 3)
    files.flush()
    assert [files.load(key(block), TOKENS, None) is not None for block in range(4)] == [True, False, True, True]
    assert files.num_bytes <= 3500 and files.num_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    files.close()
    smaller = BlockFiles(tmp_path, 1200, 1000, content)
    assert len(smaller) == 1 == len(list(tmp_path.iterdir()))
    smaller.close()
    none = BlockFiles(tmp_path, 10, 1000, content)
    none.save(key(7), TOKENS, 7)
    none.flush()
    assert len(none) == 0
    none.close()


def test_slower_than_computing(files: BlockFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading that is predicted to take longer is left, but tried again now and then."""
    files.save(key(1), TOKENS, 1)
    files.flush()
    asked: list[tuple[float | None, float | None]] = []
    monkeypatch.setattr(block_files, "loading_is_slower", lambda *seconds: asked.append(seconds) or len(asked) > 1)
    assert files.load(key(1), TOKENS, 7.0) is not None
    answers = [files.load(key(1), TOKENS, 7.0) is not None for _ in range(100)]
    assert answers == ([False] * 32 + [True]) * 3 + [False]
    assert asked[0] == (None, 7.0) and asked[1][0] is not None and asked[1][0] > 0, "measured when it was loaded"


def test_what_is_slower() -> None:
    assert loading_is_slower(2.0, 1.0) and not loading_is_slower(1.0, 2.0) and not loading_is_slower(1.0, 1.0)
    assert not loading_is_slower(None, 1e-9) and not loading_is_slower(2.0, None), "nothing is known yet"


def test_leftovers_of_a_program_that_ended_while_it_wrote(tmp_path: Path) -> None:
    left = tmp_path / "abc.123.tmp"
    left.write_bytes(b"x")
    os.utime(left, (1, 1))
    BlockFiles(tmp_path, 1 << 20, 1000, content).close()
    assert not left.exists()


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/octavo")):
        with pytest.raises(ConfigError, match="kv_offload_dir"):
            BlockFiles(folder, 1 << 20, 1000, content)


def test_a_full_disk_loses_blocks_and_nothing_else(
    files: BlockFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        files.save(key(1), TOKENS, 1)
        files.flush()
    assert files.load(key(1), TOKENS, None) is None and not list(tmp_path.iterdir())
    files.save(key(1), TOKENS, 1)
    files.flush()
    assert files.load(key(1), TOKENS, None) == content(1)


def test_in_a_forked_child_it_holds_nothing(files: BlockFiles) -> None:
    """Guards a child that waits for the thread that writes, which the parent has alone."""
    files.save(key(1), TOKENS, 1)
    files.flush()

    def work() -> None:
        assert files.load(key(1), TOKENS, None) is None
        for block in range(200):
            files.save(key(block), TOKENS, block)
        files.close()

    in_fork(work)
    assert files.load(key(1), TOKENS, None) == content(1)
