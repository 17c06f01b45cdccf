"""Blocks in files: what was kept comes back, and nothing else does."""

from __future__ import annotations

import fcntl
import gc
import os
import stat
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from octavo.core.errors import ConfigError
from octavo.runner import block_folder
from octavo.runner.block_files import BlockFiles as Files
from octavo.runner.block_files import loading_is_slower
from tests.backends.cpu.test_processes import in_fork

TOKENS = tuple(range(16))


def read(files: Files, key: bytes, token_ids: tuple[int, ...], compute_seconds: float | None) -> bytes | None:
    found = files.load(key, token_ids, compute_seconds)
    return None if found is None else found.result(20)


def content(block: int) -> bytes:
    return bytes([block % 251]) * 1000


def key(block: int) -> bytes:
    return block.to_bytes(32, "little")


def BlockFiles(folder: Path, max_bytes: int, block_bytes: int, read: Callable[[int], bytes], **rest: Any) -> Files:
    return Files(folder, max_bytes, 16, block_bytes, read, **rest)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[BlockFiles]:
    made = BlockFiles(tmp_path, 1 << 20, 1000, content)
    yield made
    made.close()


def the_file(folder: Path) -> Path:
    (found,) = folder.glob("*.kv")
    return found


def test_what_was_kept_comes_back(files: BlockFiles, tmp_path: Path) -> None:
    assert read(files, key(1), TOKENS, None) is None
    files.save(key(1), TOKENS, 1)
    files.flush()
    assert read(files, key(1), TOKENS, None) == content(1)
    assert read(files, key(2), TOKENS, None) is None
    assert stat.S_IMODE(the_file(tmp_path).stat().st_mode) == 0o600


def test_blocks_of_another_size_are_no_hits(files: BlockFiles, tmp_path: Path) -> None:
    """Guards against a layout of KV that has changed since: such a block must not reach the kernels."""
    files.save(key(1), TOKENS, 1)
    files.close()
    for size in (999, 1001):
        again = BlockFiles(tmp_path, 1 << 20, size, content)
        assert read(again, key(1), TOKENS, None) is None
        again.close()


def test_after_a_restart(files: BlockFiles, tmp_path: Path) -> None:
    files.save(key(1), TOKENS, 1)
    files.close()
    again = BlockFiles(tmp_path, 1 << 20, 1000, content)
    assert read(again, key(1), TOKENS, None) == content(1) and again.num_bytes == the_file(tmp_path).stat().st_size
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
    assert read(files, key(1), asked, None) is None
    assert not path.exists() and len(files) == 0 and files.num_bytes == 0


def test_every_truncation_and_every_flipped_byte_of_the_header(files: BlockFiles, tmp_path: Path) -> None:
    files.save(key(1), TOKENS, 1)
    files.close()
    path = the_file(tmp_path)
    data = path.read_bytes()
    for cut in range(0, len(data), 37):
        path.write_bytes(data[:cut])
        again = BlockFiles(tmp_path, 1 << 20, 1000, content)
        assert read(again, key(1), TOKENS, None) is None
        again.close()
    for at in range(160):
        path.write_bytes(data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :])
        again = BlockFiles(tmp_path, 1 << 20, 1000, content)
        assert read(again, key(1), TOKENS, None) is None, at
        again.close()


def test_a_file_of_another_name(files: BlockFiles, tmp_path: Path) -> None:
    """Renamed by hand: its content says whose it is."""
    files.save(key(1), TOKENS, 1)
    files.close()
    the_file(tmp_path).rename(tmp_path / f"{key(2).hex()}.kv")
    again = BlockFiles(tmp_path, 1 << 20, 1000, content)
    assert read(again, key(2), TOKENS, None) is None
    again.close()


def blocks_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.kv"))


def test_the_size_is_kept_and_what_was_used_longest_ago_goes(tmp_path: Path) -> None:
    files = BlockFiles(tmp_path, 3500, 1000, content)
    for block in range(3):
        files.save(key(block), TOKENS, block)
        files.flush()
    assert read(files, key(0), TOKENS, None) is not None
    files.save(key(3), TOKENS, 3)
    files.flush()
    assert [read(files, key(block), TOKENS, None) is not None for block in range(4)] == [True, False, True, True]
    assert files.num_bytes <= 3500 and files.num_bytes == sum(path.stat().st_size for path in blocks_in(tmp_path))
    files.close()
    smaller = BlockFiles(tmp_path, 1200, 1000, content)
    assert len(smaller) == 1 == len(blocks_in(tmp_path)) and smaller.has(key(3))
    smaller.close()


def test_a_limit_below_one_block_is_refused(tmp_path: Path) -> None:
    """Guards against a tier that is switched on and keeps nothing."""
    with pytest.raises(ConfigError, match="kv_offload_bytes: must be at least 1136, the size of one block, not 1135"):
        BlockFiles(tmp_path, 1135, 1000, content)
    BlockFiles(tmp_path, 1136, 1000, content).close()


def test_engines_share_one_limit(tmp_path: Path) -> None:
    """Of one process, of two, and of another model: nobody counts only what he wrote himself."""
    limit = 10 * 1136
    first, second = (BlockFiles(tmp_path, limit, 1000, content) for _ in range(2))
    third = BlockFiles(tmp_path, limit, 500, lambda block: content(block)[:500], identity="another model")
    for block in range(12):
        for number, files in enumerate((first, second, third)):
            files.save(key(100 * number + block), TOKENS, block)
            files.flush()
            assert sum(path.stat().st_size for path in tmp_path.iterdir() if path.suffix == ".kv") <= limit

    def work() -> None:
        other = BlockFiles(tmp_path, limit, 1000, content)
        for block in range(20):
            other.save(key(1000 + block), TOKENS, block)
            other.flush()
        other.close()

    in_fork(work)
    assert sum(path.stat().st_size for path in blocks_in(tmp_path)) <= limit
    for files in (first, second, third):
        files.close()
    assert read(second, key(111), TOKENS, None) is None, "closed"
    again = BlockFiles(tmp_path, limit, 1000, content)
    assert read(again, key(1019), TOKENS, None) == content(19) and len(again) >= 5
    again.close()


def test_a_forked_child_does_not_keep_the_lock(files: BlockFiles, tmp_path: Path) -> None:
    """Guards a parent that waits for a lock which its child has a copy of, as long as that lives."""
    read_end, write_end = os.pipe()
    with files._folder._locked():
        child = os.fork()
        if not child:
            os.close(write_end)
            os.read(read_end, 1)  # until the parent closes its end
            os._exit(0)
    try:
        with (tmp_path / "octavo-kv.usage").open("rb") as usage:
            fcntl.flock(usage, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(write_end)
        os.waitpid(child, 0)
        os.close(read_end)


def test_the_limit_holds_after_a_file_was_grown(tmp_path: Path) -> None:
    """Guards against counting what it claimed to be when it is removed."""
    files = BlockFiles(tmp_path, 10 * 1136, 1000, content)
    for block in range(9):
        files.save(key(block), TOKENS, block)
    files.flush()
    os.truncate(blocks_in(tmp_path)[0], 200 << 30)
    assert sorted(read(files, key(block), TOKENS, None) is None for block in range(9)) == [False] * 8 + [True]
    for block in range(20, 40):
        files.save(key(block), TOKENS, block)
        files.flush()
        assert len(blocks_in(tmp_path)) <= 10
    os.truncate(blocks_in(tmp_path)[0], 200 << 30)
    files.save(key(50), TOKENS, 50)
    files.flush()
    assert len(blocks_in(tmp_path)) >= 6, "it counts for the disk that it takes"
    files.close()


def test_what_another_engine_removed_is_kept_at_the_end(files: BlockFiles, tmp_path: Path) -> None:
    for block in range(4):
        files.save(key(block), TOKENS, block)
    files.flush()
    for path in blocks_in(tmp_path)[:2]:
        path.unlink()
    files.keep([(key(block), TOKENS, block) for block in range(4)])
    assert len(blocks_in(tmp_path)) == 4


def test_a_file_that_cannot_be_read_now_is_not_damaged(
    files: BlockFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.save(key(1), TOKENS, 1)
    files.flush()
    with monkeypatch.context() as patch:
        patch.setattr(files._folder, "read", lambda *_: (_ for _ in ()).throw(OSError(24, "Too many open files")))
        assert read(files, key(1), TOKENS, None) is None
    assert read(files, key(1), TOKENS, None) == content(1)


def test_removed_by_another_engine(files: BlockFiles, tmp_path: Path) -> None:
    """A block that is known here and gone there is a miss; a usage file that was damaged or removed is made anew."""
    for block in range(3):
        files.save(key(block), TOKENS, block)
    files.flush()
    for path in blocks_in(tmp_path)[:2]:
        path.unlink()
    (tmp_path / "octavo-kv.usage").write_bytes(b"nonsense")
    assert sorted(read(files, key(block), TOKENS, None) is None for block in range(3)) == [False, True, True]
    files.save(key(7), TOKENS, 7)
    files.flush()
    assert read(files, key(7), TOKENS, None) == content(7)
    assert int((tmp_path / "octavo-kv.usage").read_bytes()) == files.num_bytes == 2 * 1136


def test_slower_than_computing(tmp_path: Path) -> None:
    """Loading that is predicted to take longer is left, but tried again now and then."""
    now = [0.0]

    def timer() -> float:
        now[0] += 1.0
        return now[0]

    files = BlockFiles(tmp_path, 1 << 20, 1000, content, timer=timer)
    files.save(key(1), TOKENS, 1)
    files.flush()
    assert read(files, key(1), TOKENS, 0.5) is not None, "nothing is known of loading yet"
    answers = [read(files, key(1), TOKENS, 0.5) is not None for _ in range(66)]
    assert [at for at, answer in enumerate(answers) if answer] == [32, 65]
    assert read(files, key(1), TOKENS, 2.0) is not None
    files.close()


def test_what_is_slower() -> None:
    assert loading_is_slower(2.0, 1.0) and not loading_is_slower(1.0, 2.0) and not loading_is_slower(1.0, 1.0)
    assert not loading_is_slower(None, 1e-9) and not loading_is_slower(2.0, None), "nothing is known yet"


def test_what_is_forgotten_is_gone(files: BlockFiles, tmp_path: Path) -> None:
    """At once, for blocks that wait to be written as well, after a restart too; others' blocks stay."""
    other = BlockFiles(tmp_path, 1 << 20, 1000, content, identity="another model")
    other.save(key(1), TOKENS, 1)
    other.flush()
    for block in range(20):
        files.save(key(block), TOKENS, block)
    files.clear()
    assert not any(files.has(key(block)) for block in range(20)) and files.load(key(1), TOKENS, None) is None
    files.save(key(30), TOKENS, 30)
    files.flush()
    assert read(files, key(30), TOKENS, None) == content(30)
    assert read(other, key(1), TOKENS, None) == content(1)
    assert len(blocks_in(tmp_path)) == 2
    other.close()


def test_kept_at_the_end(tmp_path: Path) -> None:
    """As many as fit, those used last above all."""
    files = BlockFiles(tmp_path, 5 * 1136, 1000, content)
    files.save(key(0), TOKENS, 0)
    files.save(key(6), TOKENS, 6)
    files.keep([(key(block), TOKENS, block) for block in range(8)])
    files.close()
    again = BlockFiles(tmp_path, 5 * 1136, 1000, content)
    assert [again.has(key(block)) for block in range(8)] == [False] * 3 + [True] * 5
    again.save(key(9), TOKENS, 9)
    again.flush()
    assert [again.has(key(block)) for block in range(8)] == [False] * 4 + [True] * 4, "and in this order"
    again.close()


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    """Whatever they are called: only names of our own form are ours, and only regular files are counted."""
    key_like, prefix = "0" * 64, "0" * 16
    mine = ["thesis.tmp", "1234.tmp", "notes.kv", f"{key_like}.kv", f"{key_like}.12.tmp", f"{prefix}-{key_like}.kv.tmp"]
    for name in mine:
        (tmp_path / name).write_bytes(b"x")
        os.utime(tmp_path / name, (1, 1))
    (tmp_path / f"{prefix}-{key_like}.kv").mkdir()
    left = tmp_path / f"{prefix}-{key_like}.123.tmp"
    left.write_bytes(b"x")
    os.utime(left, (1, 1))
    files = BlockFiles(tmp_path, 1136, 1000, content)
    for block in range(3):
        files.save(key(block), TOKENS, block)
    files.flush()
    files.clear()
    files.close()
    assert not left.exists(), "of a program that ended while it wrote"
    assert all((tmp_path / name).read_bytes() == b"x" for name in mine)
    assert (tmp_path / f"{prefix}-{key_like}.kv").is_dir()


def test_links_are_not_followed(files: BlockFiles, tmp_path: Path) -> None:
    """Planted under the names that are read, written and removed."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    files.save(key(1), TOKENS, 1)
    files.flush()
    path = the_file(tmp_path)
    for name in (f"{os.getpid()}.tmp", path.with_suffix(f".{os.getpid()}.tmp").name):
        (tmp_path / name).symlink_to(victim)
    path.unlink()
    for target in (victim, Path("/dev/zero"), tmp_path / "nothing"):
        path.symlink_to(target)
        assert read(files, key(1), TOKENS, None) is None and not path.is_symlink()
        files.save(key(1), TOKENS, 1)
        files.flush()
        assert read(files, key(1), TOKENS, None) == content(1) and not path.is_symlink()
        path.unlink()
    os.mkfifo(path)
    assert read(files, key(1), TOKENS, None) is None, "a pipe that nobody writes to is not waited for"
    usage = tmp_path / "octavo-kv.usage"
    usage.unlink()
    usage.symlink_to(victim)
    files.save(key(2), TOKENS, 2)
    files.flush()
    assert victim.read_bytes() == b"precious"
    with pytest.raises(ConfigError, match="kv_offload_dir"):
        BlockFiles(tmp_path, 1 << 20, 1000, content)


@pytest.mark.parametrize("planted", ["hard link", "pipe", "device"])
def test_the_usage_file_is_a_file_of_its_own(tmp_path: Path, planted: str) -> None:
    """What is written into it must not be written elsewhere, and nothing may be waited for."""
    victim, usage, folder = tmp_path / "victim", tmp_path / "kv" / "octavo-kv.usage", tmp_path / "kv"
    victim.write_bytes(b"precious")
    folder.mkdir(mode=0o700)
    if planted == "hard link":
        usage.hardlink_to(victim)
    elif planted == "pipe":
        os.mkfifo(usage)
    else:
        try:
            os.mknod(usage, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
        except OSError:
            pytest.skip("only root may make devices")
    with pytest.raises(ConfigError, match=r"kv_offload_dir: .*octavo-kv\.usage in it is a link or no regular file"):
        BlockFiles(folder, 1 << 20, 1000, content)
    assert victim.read_bytes() == b"precious"


def test_a_lock_that_nobody_lets_go_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped process may keep it for ever: that is told, and a block is lost and no more."""
    monkeypatch.setattr(block_folder, "_LOCK_SECONDS", 0.01)
    files = BlockFiles(tmp_path, 1 << 20, 1000, content)
    with (tmp_path / "octavo-kv.usage").open("rb") as usage:
        fcntl.flock(usage, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=r"another program keeps octavo-kv\.usage in it locked"):
            BlockFiles(tmp_path, 1 << 20, 1000, content)
        files.save(key(1), TOKENS, 1)
        files.flush()
        assert not blocks_in(tmp_path) and files._folder._patience == 0.0, "many blocks do not wait one by one"
    files.save(key(2), TOKENS, 2)
    files.flush()
    assert read(files, key(2), TOKENS, None) == content(2) and files._folder._patience == 0.01
    files.close()


def test_a_file_of_absurd_size_is_not_read(files: BlockFiles, tmp_path: Path) -> None:
    """It grew while the engine ran."""
    files.save(key(1), TOKENS, 1)
    files.flush()
    os.truncate(the_file(tmp_path), 200 << 30)
    assert read(files, key(1), TOKENS, None) is None and not blocks_in(tmp_path)


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/octavo"), tmp_path / "a\0b"):
        with pytest.raises(ConfigError, match="kv_offload_dir"):
            BlockFiles(folder, 1 << 20, 1000, content)
    for mode in (0o777, 0o770, 0o722):
        (tmp_path / "open").mkdir(exist_ok=True)
        (tmp_path / "open").chmod(mode)
        with pytest.raises(ConfigError, match=r"kv_offload_dir: .* can be written by others"):
            BlockFiles(tmp_path / "open", 1 << 20, 1000, content)
    if os.geteuid() == 0:
        (tmp_path / "other").mkdir(mode=0o700)
        os.chown(tmp_path / "other", 12345, 12345)
        with pytest.raises(ConfigError, match=r"kv_offload_dir: .* belongs to another user"):
            BlockFiles(tmp_path / "other", 1 << 20, 1000, content)


def test_a_full_disk_loses_blocks_and_nothing_else(
    files: BlockFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told once, not for every block."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        for block in range(10):
            files.save(key(block), TOKENS, block)
        files.flush()
        files.keep([(key(block), TOKENS, block) for block in range(10)])
    assert read(files, key(1), TOKENS, None) is None
    assert [path.name for path in tmp_path.iterdir()] == ["octavo-kv.usage"]
    assert len(caplog.records) == 1 and "No space left" in caplog.text
    files.save(key(1), TOKENS, 1)
    files.flush()
    assert read(files, key(1), TOKENS, None) == content(1) and "kept again" in caplog.text


def test_a_block_that_cannot_be_read_is_not_kept(tmp_path: Path) -> None:
    """Guards the engine's thread, which asks."""
    files = BlockFiles(tmp_path, 1 << 20, 1000, lambda block: 1 // 0)  # type: ignore[arg-type, return-value]
    files.save(key(1), TOKENS, 1)
    files.keep([(key(1), TOKENS, 1)])
    files.close()
    assert not blocks_in(tmp_path)


def test_closing_lets_go_of_the_engine(tmp_path: Path) -> None:
    """Guards memory that is freed only with the process."""

    class Runner:
        def read_block(self, block: int) -> bytes:
            return content(block)

    runner = Runner()
    gone = weakref.ref(runner)
    files = BlockFiles(tmp_path, 1 << 20, 1000, runner.read_block)
    files.save(key(1), TOKENS, 1)
    files.close()
    files.close()
    del runner
    gc.collect()
    assert gone() is None


def test_in_a_forked_child_it_holds_nothing(files: BlockFiles) -> None:
    """Guards a child that waits for the threads that write and read, which the parent has alone, or for a lock that one
    of them held when the process forked."""
    files.save(key(1), TOKENS, 1)
    files.flush()

    def work() -> None:
        assert files.load(key(1), TOKENS, None) is None and not files.has(key(1))
        for block in range(200):
            files.save(key(block), TOKENS, block)
        files.keep([(key(1), TOKENS, 1)])
        files.clear()
        files.flush()
        files.close()

    with files._lock, files._folder._lock:
        in_fork(work)
    assert read(files, key(1), TOKENS, None) == content(1)
