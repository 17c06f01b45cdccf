"""An index of a folder's documents: SQLite with full-text search (FTS5, ranked by BM25), in a file of its own.

What changed or vanished since the last time is found by size and time of change. Each file is a transaction: an
interruption loses the file it came at, and of two processes that index one folder at once each finds what the other has
done.
"""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from octavo.core.ask import IndexProgress, Source
from octavo.core.ask_params import DEFAULT_PASSAGE_TOKENS
from octavo.documents.readers import Document, DocumentError, read, suffixes
from octavo.text.segments import split
from octavo.text.tokenizer import Tokenizer

NAME = ".octavo-index.sqlite3"
_VERSION = "1"
_BUSY_SECONDS = 60.0  # that another process may hold the index for
_MAX_WORDS = 256  # of a question, the first of them: more say no more
_TABLES = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    # `size` is -1 where the file is to be read anew whatever it is like.
    "CREATE TABLE files (id INTEGER PRIMARY KEY, path TEXT NOT NULL UNIQUE, size INTEGER NOT NULL, "
    "changed INTEGER NOT NULL, title TEXT NOT NULL, problem TEXT)",
    # AUTOINCREMENT: the number of a passage that is gone is never another's.
    "CREATE TABLE passages (id INTEGER PRIMARY KEY AUTOINCREMENT, file INTEGER NOT NULL REFERENCES files (id), "
    "number INTEGER NOT NULL, headings TEXT NOT NULL, page INTEGER, text TEXT NOT NULL)",
    "CREATE INDEX passages_of_file ON passages (file, number)",
    "CREATE VIRTUAL TABLE words USING fts5 (text, headings, content = 'passages', content_rowid = 'id', "
    "tokenize = 'porter unicode61 remove_diacritics 2')",
)
_SELECT = "SELECT p.id, f.path, f.title, p.number, p.headings, p.page, p.text"


class DocumentIndex:
    """Passages of documents, found by words. Use it in a ``with`` statement, in one thread at a time.

    Args:
        folder: whose documents are indexed; None: none but those given to `add`, in memory.
        tokenizer: passages are cut by its tokens. An index that is there stays as it was cut, whatever the tokenizer.
        passage_tokens: most of one passage; None: as the index that is there has it, 256 for a new one. Where that
            changes, the next update reads all files anew.
        path: of the index; by default NAME in the folder.

    Raises DocumentError: the folder is none, the index cannot be written or is damaged.
    """

    def __init__(
        self,
        folder: Path | None,
        tokenizer: Tokenizer,
        passage_tokens: int | None = None,
        path: Path | None = None,
    ) -> None:
        if folder is not None and not folder.is_dir():
            raise DocumentError(folder, "is no folder" if folder.exists() else "does not exist")
        self.folder = folder
        self.path = path if path is not None else Path(":memory:") if folder is None else folder / NAME
        self._tokenizer = tokenizer
        with self._explaining():
            # A thread at a time may use it, not only the one that made it.
            self._db = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            try:
                self._most = self._begin(passage_tokens)
            except BaseException:
                self._db.close()
                raise

    def _begin(self, passage_tokens: int | None) -> int:
        """Most tokens of a passage."""
        self._is_new()  # nothing is changed in a file that is somebody else's
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        most = passage_tokens or DEFAULT_PASSAGE_TOKENS
        with self._transaction():
            if self._is_new():
                for statement in _TABLES:
                    self._db.execute(statement)
                made_for = {"version": _VERSION, "passage_tokens": str(most)}
                self._db.executemany("INSERT INTO meta VALUES (?, ?)", made_for.items())
                return most
            found = dict(self._db.execute("SELECT key, value FROM meta"))
            if passage_tokens is None:
                return int(found["passage_tokens"])
            if int(found["passage_tokens"]) != most:
                self._db.execute("UPDATE files SET size = -1")
                self._db.execute("UPDATE meta SET value = ? WHERE key = 'passage_tokens'", (str(most),))
            return most

    def _is_new(self) -> bool:
        """Raises DocumentError for a database that is no index, or one of another version."""
        tables = {name for (name,) in self._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not tables:
            return True
        if not {"meta", "files", "passages", "words"} <= tables:
            raise DocumentError(self.path, "is a database, but none of Octavo's: give the index another place")
        found = self._db.execute("SELECT value FROM meta WHERE key = 'version'").fetchone()
        if found != (_VERSION,):
            raise DocumentError(self.path, "was made by another version: delete it, and it is made anew")
        return False

    # --- keeping it true ---

    def update(self) -> IndexProgress:
        """Read what is new or has changed in the folder, and forget what is gone."""
        progress = IndexProgress()
        for progress in self.updates():  # noqa: B007 # the last one
            pass
        return progress

    def updates(self) -> Iterator[IndexProgress]:
        """The same, telling before and behind each file how far it is. What was done stays done wherever it ends."""
        if self.folder is None:
            return
        # Before the folder: what another process adds meanwhile is not mistaken for what is gone.
        with self._explaining():
            known = {path: state for path, *state in self._db.execute("SELECT path, size, changed FROM files")}
        paths = list(self._files(self.folder))
        progress = IndexProgress(num_files=len(paths))
        yield progress
        names = set()
        for path in paths:
            # One that is not UTF-8 is written out: SQLite holds no other.
            name = os.fsencode(path.relative_to(self.folder).as_posix()).decode(errors="backslashreplace")
            names.add(name)
            with self._explaining():
                read_it = self._update_file(path, name, known.get(name))
            progress = replace(progress, num_seen=progress.num_seen + 1, num_read=progress.num_read + read_it)
            if read_it or not progress.num_seen % 100:
                yield progress
        with self._explaining():
            gone = [name for name in known if name not in names]
            for name in gone:
                with self._transaction():
                    self._forget(name)
            (problems,) = self._db.execute("SELECT count(*) FROM files WHERE problem IS NOT NULL").fetchone()
        yield replace(progress, num_removed=len(gone), num_problems=problems)

    def _files(self, folder: Path) -> Iterator[Path]:
        """Those that can be read, in order; what begins with a dot is left out, and links are not followed."""
        for parent, folders, names in os.walk(folder):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                path = Path(parent, name)
                if path.suffix.lower() in suffixes() and not name.startswith(".") and not path.is_symlink():
                    yield path

    def _update_file(self, path: Path, name: str, known: Sequence[int] | None) -> bool:
        try:
            found = path.stat()
        except OSError:
            return False  # gone meanwhile
        state = [found.st_size, found.st_mtime_ns]
        if known == state:
            return False
        problem, document, passages = None, Document(path.stem, ()), []
        try:
            document = read(path)
            passages = list(self._passages(document))
        except DocumentError as error:
            problem = error.problem
            if error.may_pass:
                state = [-1, 0]
        with self._transaction():
            now = self._db.execute("SELECT size, changed FROM files WHERE path = ?", (name,)).fetchone()
            if now is not None and list(now) == state != [-1, 0]:  # another process was faster
                return False
            self._put(name, document.title, passages, state, problem)
        return True

    def add(self, name: str, document: Document) -> None:
        """Put a document into the index, in the place of the one of this name."""
        passages = list(self._passages(document))
        with self._explaining(), self._transaction():
            self._put(name, document.title, passages, [-1, 0], None)

    def _put(
        self,
        name: str,
        title: str,
        passages: Iterable[tuple[str, int | None, str]],
        state: Sequence[int],
        problem: str | None,
    ) -> None:
        self._forget(name)
        file = self._db.execute(
            "INSERT INTO files (path, size, changed, title, problem) VALUES (?, ?, ?, ?, ?)",
            (name, *state, title, problem),
        ).lastrowid
        for number, (headings, page, text) in enumerate(passages):
            passage = self._db.execute(
                "INSERT INTO passages (file, number, headings, page, text) VALUES (?, ?, ?, ?, ?)",
                (file, number, headings, page, text),
            ).lastrowid
            self._db.execute("INSERT INTO words (rowid, text, headings) VALUES (?, ?, ?)", (passage, text, headings))

    def _passages(self, document: Document) -> Iterator[tuple[str, int | None, str]]:
        for section in document.sections:
            for part in split(self._tokenizer, (), section.text, self._most):
                text = section.text[part.start : part.stop].strip()
                if text:
                    yield "\n".join(section.headings), section.page, text

    def _forget(self, name: str) -> None:
        of_file = "(SELECT id FROM files WHERE path = ?)"
        self._db.execute(
            "INSERT INTO words (words, rowid, text, headings) "
            f"SELECT 'delete', id, text, headings FROM passages WHERE file = {of_file}",
            (name,),
        )
        self._db.execute(f"DELETE FROM passages WHERE file = {of_file}", (name,))
        self._db.execute("DELETE FROM files WHERE path = ?", (name,))

    # --- asking it ---

    def search(self, question: str, limit: int) -> list[Source]:
        """The passages that fit best by BM25 (Robertson and Zaragoza, 2009), any of whose words are the question's.
        Words of headings count twice. Of equals the first in the folder comes first."""
        words = list(dict.fromkeys(re.findall(r"\w+", question.lower())))[:_MAX_WORDS]
        if not words:
            return []
        query = " OR ".join(f'"{word}"' for word in words)
        with self._explaining():
            rows = self._db.execute(
                f"{_SELECT}, -bm25(words, 1.0, 2.0) AS score "
                "FROM words JOIN passages p ON p.id = words.rowid JOIN files f ON f.id = p.file "
                "WHERE words MATCH ? ORDER BY score DESC, f.path, p.number LIMIT ?",
                (query, limit),
            ).fetchall()
        return [_source(*row) for row in rows]

    def first(self, limit: int) -> list[Source]:
        """The first passages, in the order in which they were put in."""
        with self._explaining():
            rows = self._db.execute(
                f"{_SELECT}, NULL FROM passages p JOIN files f ON f.id = p.file ORDER BY p.id LIMIT ?", (limit,)
            ).fetchall()
        return [_source(*row) for row in rows]

    def problems(self) -> list[tuple[str, str]]:
        """Files that cannot be read, and why."""
        with self._explaining():
            return self._db.execute(
                "SELECT path, problem FROM files WHERE problem IS NOT NULL ORDER BY path"
            ).fetchall()

    @property
    def num_passages(self) -> int:
        with self._explaining():
            (count,) = self._db.execute("SELECT count(*) FROM passages").fetchone()
        return int(count)

    # --- SQLite ---

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            with suppress(sqlite3.Error):  # what went wrong may have ended it already
                self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            told = str(error)
            if "not a database" in told or "malformed" in told:
                problem = f"is damaged or no index ({told}): delete it, and it is made anew"
            elif "unable to open" in told or "readonly" in told or "disk I/O" in told or "full" in told:
                problem = f"cannot be written ({told}): give the index another place"
            elif "locked" in told:
                problem = f"is held by another process for more than {_BUSY_SECONDS:.0f} s"
            else:
                problem = f"cannot be used: {told}"
            raise DocumentError(self.path, problem) from None

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> DocumentIndex:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()


def _source(
    id_: int, path: str, title: str, number: int, headings: str, page: int | None, text: str, score: float | None
) -> Source:
    return Source(
        id_, "passage", path, title, tuple(headings.split("\n")) if headings else (), page, number, text, score
    )
