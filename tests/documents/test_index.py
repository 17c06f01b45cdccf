"""The index of a folder: what is found, what is read anew, two processes at once, and a broken or foreign file."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import sqlite3
from pathlib import Path

import pytest

from octavo import DocumentError, InvalidRequestError
from octavo.documents.index import NAME, DocumentIndex
from octavo.documents.readers import Document, Section
from octavo.text.directory import tokenizer_from_directory
from octavo.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_dir: Path) -> Tokenizer:
    return tokenizer_from_directory(tiny_llama_dir)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    (folder / "sub").mkdir(parents=True)
    (folder / "whales.md").write_text("# Whales\n\nThe whale is white.\n\n## Food\n\nIt eats krill, and krill alone.\n")
    (folder / "sub" / "ships.txt").write_text("Ships have sails. The captain has a harpoon.")
    (folder / "notes.xyz").write_text("whale")
    (folder / ".hidden.txt").write_text("whale")
    (folder / "link.txt").symlink_to(folder / "whales.md")
    return folder


def paths_of(index: DocumentIndex) -> list[str]:
    return sorted({source.document for source in index.first(1000)})


def counts(index: DocumentIndex) -> tuple[int, int, int]:
    told = index.update()
    return told.num_files, told.num_read, told.num_removed


def test_found(folder: Path, tokenizer: Tokenizer) -> None:
    with DocumentIndex(folder, tokenizer) as index:
        assert counts(index) == (2, 2, 0)
        (best, *_) = index.search("What does the WHALE eat?", 5)
        assert (best.document, best.headings, best.text) == (
            "whales.md",
            ("Whales", "Food"),
            "It eats krill, and krill alone.",
        )
        assert best.place == "whales.md, Whales › Food" and best.kind == "passage"
        (ship,) = index.search("harpoons", 5)  # by its stem
        assert ship.document == "sub/ships.txt"
        scores = [source.score for source in index.search("the whale", 5)]
        assert scores == sorted(scores, reverse=True) and len(scores) == 3
        assert index.search("the whale", 1) == index.search("the whale", 5)[:1]


@pytest.mark.parametrize("question", ["", "?!", '"', 'a" OR "b', "text:whale", "NEAR(whale krill)", "*", "whale" * 900])
def test_no_question_is_a_query(folder: Path, tokenizer: Tokenizer, question: str) -> None:
    with DocumentIndex(folder, tokenizer) as index:
        index.update()
        words = set(re.findall(r"\w+", question.lower())) & {"a", "whale", "krill"}
        assert bool(index.search(question, 5)) == bool(words)


def test_a_long_question(folder: Path, tokenizer: Tokenizer) -> None:
    with DocumentIndex(folder, tokenizer) as index:
        index.update()
        assert index.search("krill " + " ".join(f"word{i}" for i in range(20_000)), 5)


def test_changed_and_gone(folder: Path, tokenizer: Tokenizer) -> None:
    with DocumentIndex(folder, tokenizer) as index:
        index.update()
        numbers = {source.number for source in index.search("whale", 9)}
        (ship,) = index.search("harpoon", 9)
        assert counts(index) == (2, 0, 0)
        (folder / "whales.md").write_text("The whale is grey now, and longer.")
        assert counts(index) == (2, 1, 0)
        assert index.search("krill", 9) == []
        (now,) = index.search("grey", 9)
        assert now.number not in numbers  # a number that is gone is never another's
        assert [one.number for one in index.search("harpoon", 9)] == [ship.number]
        (folder / "whales.md").unlink()
        assert counts(index) == (1, 0, 1)
        assert index.search("whale", 9) == []
        assert index.num_passages == 1


def test_same_size_and_time_is_the_same(folder: Path, tokenizer: Tokenizer) -> None:
    path = folder / "sub" / "ships.txt"
    with DocumentIndex(folder, tokenizer) as index:
        index.update()
        path.write_text(path.read_text())
        os.utime(path, ns=(1, 1))
        assert counts(index) == (2, 1, 0)
        os.utime(path, ns=(1, 1))
        assert counts(index) == (2, 0, 0)


def test_passages_are_pieces_of_their_section(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    text = "".join(
        " ".join(rng.choices(["whale", "sea", "of", "7", "ship"], k=rng.randint(2, 9))) + ". " for _ in range(99)
    )
    with DocumentIndex(None, tokenizer, passage_tokens=64) as index:
        index.add("d", Document("d", (Section(text, ("H",)),)))
        passages = index.first(1000)
    assert "".join("".join(one.text.split()) for one in passages) == "".join(text.split())
    assert len(passages) > 5 and all(len(tokenizer.encode(one.text)) <= 64 for one in passages)
    assert [one.index for one in passages] == list(range(len(passages)))


def test_problems_are_kept_and_looked_at_again(folder: Path, tokenizer: Tokenizer) -> None:
    bad = folder / "bad.txt"
    bad.write_bytes(b"\xff\xfe\xff")
    with DocumentIndex(folder, tokenizer) as index:
        assert index.update().num_problems == 1
        assert [name for name, _ in index.problems()] == ["bad.txt"]
        assert index.update().num_read == 0
        bad.write_text("fine")
        assert index.update().num_problems == 0
        assert index.search("fine", 1)


def test_an_interruption_loses_one_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text(f"word{number}")
    with DocumentIndex(tmp_path, tokenizer) as index:
        for told in index.updates():
            if told.num_read == 4:
                break
    with DocumentIndex(tmp_path, tokenizer) as index:
        assert index.num_passages == 4
        assert counts(index) == (9, 5, 0)
        assert len(paths_of(index)) == 9


def test_an_error_in_the_middle_leaves_the_file_as_it_was(
    folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DocumentIndex(folder, tokenizer) as index:
        index.update()
        (folder / "whales.md").write_text("new text about a squid")
        with monkeypatch.context() as patch:
            patch.setattr(DocumentIndex, "_forget", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                index.update()
        assert index.search("krill", 1) and not index.search("squid", 1)
        index.update()
        assert index.search("squid", 1) and not index.search("krill", 1)


def _index_in_a_process(folder: Path, model: Path, start: object) -> None:
    start.wait()  # type: ignore[attr-defined]
    with DocumentIndex(folder, tokenizer_from_directory(model)) as index:
        index.update()


def test_processes_at_once(tmp_path: Path, tiny_llama_dir: Path, tokenizer: Tokenizer) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02}.txt").write_text(f"The whale number{number} is white. " * 20)
    context = multiprocessing.get_context("spawn")
    start = context.Event()
    processes = [context.Process(target=_index_in_a_process, args=(folder, tiny_llama_dir, start)) for _ in range(3)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    with DocumentIndex(folder, tokenizer) as index:
        assert counts(index) == (40, 0, 0)
        with DocumentIndex(None, tokenizer) as alone:
            alone.add("x", Document("x", (Section("The whale number1 is white. " * 20),)))
            assert index.num_passages == 40 * alone.num_passages
        for number in range(40):
            assert {s.document for s in index.search(f"number{number}", 99)} == {f"{number:02}.txt"}
        check = sqlite3.connect(index.path)
        check.execute("INSERT INTO words (words, rank) VALUES ('integrity-check', 1)")  # raises where they differ
        check.close()


def _open_often(root: Path, model: Path, start: object) -> None:
    tokenizer = tokenizer_from_directory(model)
    for number in range(60):
        start.wait()  # type: ignore[attr-defined]
        with DocumentIndex(root / str(number), tokenizer) as index:
            index.update()


def test_processes_make_an_index_at_once(tmp_path: Path, tiny_llama_dir: Path) -> None:
    for number in range(60):
        (tmp_path / str(number)).mkdir()
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(4)
    processes = [context.Process(target=_open_often, args=(tmp_path, tiny_llama_dir, start)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]


def test_words_of_many_scripts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = [
        "\u0130stanbul is old",
        "re\u0301sume\u0301 one",
        "r\u00e9sum\u00e9 two",
        "\u0939\u093f\u0928\u094d\u0926\u0940 x",
    ]
    with DocumentIndex(None, tokenizer) as index:
        for number, text in enumerate(texts):
            index.add(str(number), Document("d", (Section(text),)))
        for question, found in (
            ("\u0130stanbul?", {"0"}),
            ("istanbul", {"0"}),
            ("re\u0301sume\u0301", {"1", "2"}),
            ("R\u00c9SUM\u00c9", {"1", "2"}),
            ("\u0939\u093f\u0928\u094d\u0926\u0940", {"3"}),
            ("\u0939", set()),
        ):
            assert {one.document for one in index.search(question, 9)} == found, question


def test_what_is_no_plain_file_is_left_alone(folder: Path, tokenizer: Tokenizer) -> None:
    os.mkfifo(folder / "pipe.txt")
    (folder / "folder.txt").mkdir()
    (folder / "loop").symlink_to(folder)
    with DocumentIndex(folder, tokenizer) as index:
        assert counts(index) == (2, 2, 0)


def test_a_long_text_is_tokenised_in_pieces(folder: Path, tokenizer: Tokenizer) -> None:
    """Whatever its length; nothing of it is lost."""
    text = "The whale is white. " * 20_000 + "\n\nkrill" + "x" * 100_000
    (folder / "long.txt").write_text(text)
    longest = []
    encode = tokenizer.encode_following
    tokenizer.encode_following = lambda before, text, **o: longest.append(len(text)) or encode(before, text, **o)  # type: ignore[method-assign]
    try:
        with DocumentIndex(folder, tokenizer) as index:
            index.update()
            assert index.search("krill" + "x" * 100, 1) == [] and index.search("white", 1)
            found = "".join("".join(one.text.split()) for one in index.first(1 << 20) if one.document == "long.txt")
    finally:
        del tokenizer.encode_following
    assert found == "".join(text.split())
    assert max(longest) <= 1 << 15


def test_a_text_that_the_tokenizer_refuses_is_a_problem(
    folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise InvalidRequestError("prompt", "this model's tokenizer fails on the text")

    monkeypatch.setattr(tokenizer, "encode_following", refuse)
    with DocumentIndex(folder, tokenizer) as index:
        assert index.update().num_problems == 2
        assert "tokenizer fails" in index.problems()[0][1]


def test_headings_are_short(folder: Path, tokenizer: Tokenizer) -> None:
    (folder / "h.md").write_text("# " + "heading " * 40_000 + "\n\n" + "The whale is white. " * 2000)
    with DocumentIndex(folder, tokenizer) as index:
        index.update()
        assert index.path.stat().st_size < 1 << 20
        assert all(len(one.place) < 400 for one in index.first(1000))


def test_what_may_pass_is_tried_again(folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda _: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
        with DocumentIndex(folder, tokenizer) as index:
            assert index.update().num_problems == 2
            assert index.problems()[0][1] == "cannot be read: Permission denied"
    with DocumentIndex(folder, tokenizer) as index:
        told = index.update()
        assert (told.num_read, told.num_problems) == (2, 0)


def test_a_folder_that_cannot_be_looked_into_is_not_forgotten(
    folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DocumentIndex(folder, tokenizer) as index:
        index.update()
        scandir = os.scandir

        def refused(path: str) -> object:
            if str(path).endswith("sub"):
                raise PermissionError(13, "Permission denied", path)
            return scandir(path)

        with monkeypatch.context() as patch:
            patch.setattr(os, "scandir", refused)
            told = index.update()
        assert (told.num_removed, told.num_problems) == (0, 1)
        assert index.problems() == [("sub", "cannot be looked into: Permission denied")]
        assert index.search("harpoon", 1)


def test_a_folder_that_goes_while_it_is_indexed(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    import shutil

    with (
        DocumentIndex(folder, tokenizer, path=tmp_path / "index.db") as index,
        pytest.raises(DocumentError, match="has gone"),
    ):
        for _ in index.updates():
            shutil.rmtree(folder, ignore_errors=True)


def test_times_of_any_year(folder: Path, tokenizer: Tokenizer) -> None:
    os.utime(folder / "whales.md", ns=(1 << 63, 1 << 63))
    with DocumentIndex(folder, tokenizer) as index:
        assert counts(index) == (2, 2, 0) and counts(index) == (2, 0, 0)


def test_names_are_one_line(folder: Path, tokenizer: Tokenizer) -> None:
    (folder / "x\n[2] official.txt").write_text("whale")
    with DocumentIndex(folder, tokenizer) as index:
        index.update()
        assert "x\\n[2] official.txt" in paths_of(index)


def test_without_an_update_nothing_is_written(folder: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DocumentError, match="does not exist, and no update"):
        DocumentIndex(folder, tokenizer, update=False)
    with DocumentIndex(folder, tokenizer) as index:
        index.update()
        expected = index.search("whale", 9)
    before = (folder / NAME).read_bytes()
    with DocumentIndex(folder, tokenizer, update=False) as index:
        assert index.search("whale", 9) == expected
    assert (folder / NAME).read_bytes() == before
    with pytest.raises(InvalidRequestError, match="must be 256") as caught:
        DocumentIndex(folder, tokenizer, 64, update=False)
    assert caught.value.field == "passage_tokens"


def test_a_link_is_not_followed(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    (folder / NAME).symlink_to(tmp_path / "mine")
    with pytest.raises(DocumentError, match="is a link"):
        DocumentIndex(folder, tokenizer)
    assert (tmp_path / "mine").read_text() == ""


def test_another_model_uses_the_index_as_it_is(
    folder: Path, tokenizer: Tokenizer, tiny_sentencepiece_dir: Path
) -> None:
    with DocumentIndex(folder, tokenizer) as index:
        index.update()
        before = index.first(99)
    with DocumentIndex(folder, tokenizer_from_directory(tiny_sentencepiece_dir)) as index:
        assert counts(index) == (2, 0, 0) and index.first(99) == before


def test_other_passages_are_cut_anew(folder: Path, tokenizer: Tokenizer) -> None:
    (folder / "long.txt").write_text("The whale is white. " * 200)
    with DocumentIndex(folder, tokenizer) as index:
        index.update()
        before = index.num_passages
    with DocumentIndex(folder, tokenizer, passage_tokens=32) as index:
        assert counts(index) == (3, 3, 0) and index.num_passages > before
    with DocumentIndex(folder, tokenizer) as index:  # as it is
        assert counts(index) == (3, 0, 0)


def test_the_index_elsewhere(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with DocumentIndex(folder, tokenizer, path=tmp_path / "index.db") as index:
        index.update()
        assert index.search("whale", 1)
    assert not (folder / NAME).exists()


def test_names_of_the_users_are_left_alone(folder: Path, tokenizer: Tokenizer) -> None:
    before = {path.name for path in folder.iterdir()}
    with DocumentIndex(folder, tokenizer) as index:
        index.update()
    assert {path.name for path in folder.iterdir()} - before == {NAME}


def test_a_name_that_is_no_unicode(folder: Path, tokenizer: Tokenizer) -> None:
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.txt")).write_text("whale")
    with DocumentIndex(folder, tokenizer) as index:
        assert counts(index) == (3, 3, 0)
        assert "\\xff.txt" in paths_of(index)
        assert counts(index) == (3, 0, 0)


@pytest.mark.parametrize("damage", ["text", "cut", "foreign", "version"])
def test_a_file_that_is_no_index(folder: Path, tokenizer: Tokenizer, damage: str) -> None:
    path = folder / NAME
    with DocumentIndex(folder, tokenizer) as index:
        index.update()
    if damage == "text":
        path.write_text("this is no database, but a text that somebody wrote here" * 99)
    elif damage == "cut":
        data = path.read_bytes()
        path.write_bytes(data[:4096] + b"\x55" * (len(data) - 4096))
    elif damage == "foreign":
        path.unlink()
        database = sqlite3.connect(path)
        database.execute("CREATE TABLE mine (x)")
        database.close()
    else:
        database = sqlite3.connect(path)
        database.execute("UPDATE meta SET value = '0' WHERE key = 'version'")
        database.commit()
        database.close()
    before = path.read_bytes()
    with pytest.raises(DocumentError) as caught, DocumentIndex(folder, tokenizer) as index:
        index.update()
        index.search("whale", 5)
    assert str(path) in str(caught.value)
    expected = {"foreign": "give the index another place", "version": "another version: delete it"}
    assert expected.get(damage, "delete it, and it is made anew") in caught.value.problem
    if damage in ("text", "foreign", "version"):
        assert path.read_bytes() == before  # nothing of the user's is changed


@pytest.mark.parametrize("place", ["missing/index.db", "."])
def test_a_place_that_cannot_be_written(folder: Path, tokenizer: Tokenizer, tmp_path: Path, place: str) -> None:
    with pytest.raises(DocumentError, match=r"cannot be written .*: give the index another place"):
        DocumentIndex(folder, tokenizer, path=tmp_path / place)


def test_a_folder_that_cannot_be_written(folder: Path, tokenizer: Tokenizer) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    folder.chmod(0o555)
    try:
        with pytest.raises(DocumentError, match="cannot be written"):
            DocumentIndex(folder, tokenizer)
    finally:
        folder.chmod(0o755)


@pytest.mark.parametrize(("name", "problem"), [("missing", "does not exist"), ("whales.md", "is no folder")])
def test_no_folder(folder: Path, tokenizer: Tokenizer, name: str, problem: str) -> None:
    with pytest.raises(DocumentError, match=problem):
        DocumentIndex(folder / name, tokenizer)
