"""An index of a folder's documents: SQLite with full-text search (FTS5, ranked by BM25), in a file of its own.

What changed or vanished since the last time is found by size and time of change. Each file is a transaction: an
interruption loses the file it came at, and of two processes that index one folder at once each finds what the other has
done.
"""

from __future__ import annotations

import os
import re
import sqlite3
import stat
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from octavo.core.ask import IndexProgress, Source
from octavo.core.ask_params import DEFAULT_PASSAGE_TOKENS
from octavo.core.errors import InvalidRequestError
from octavo.documents.readers import Document, DocumentError, read, suffixes
from octavo.text.segments import split
from octavo.text.tokenizer import Tokenizer

NAME = ".octavo-index.sqlite3"
_VERSION = "1"
_BUSY_SECONDS = 60.0  # that another process may hold the index for
_MAX_WORDS = 256  # of a question, the first of them: more say no more
_PIECE = 1 << 15  # characters that are tokenised at once: other threads wait meanwhile
_FIRST_NUMBER = 101  # of a passage: documents have numbers in brackets of their own, and they are mostly smaller
_TABLES = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    # `size` is -1 where the file is to be read anew whatever it is like.
    "CREATE TABLE files (id INTEGER PRIMARY KEY, path TEXT NOT NULL UNIQUE, size INTEGER NOT NULL, "
    "changed INTEGER NOT NULL, title TEXT NOT NULL, problem TEXT)",
    # AUTOINCREMENT: the number of a passage that is gone is never another's.
    "CREATE TABLE passages (id INTEGER PRIMARY KEY AUTOINCREMENT, file INTEGER NOT NULL REFERENCES files (id), "
    "number INTEGER NOT NULL, headings TEXT NOT NULL, page INTEGER, text TEXT NOT NULL)",
    "CREATE INDEX passages_of_file ON passages (file, number)",
    # Marks, such as the vowels of Indian scripts, are part of words.
    "CREATE VIRTUAL TABLE words USING fts5 (text, headings, content = 'passages', content_rowid = 'id', "
    "tokenize = \"porter unicode61 remove_diacritics 2 categories 'L* N* Co Mn Mc'\")",
)
_SCHEMA = "SELECT type, name, sql FROM sqlite_master ORDER BY name"
_SELECT = "SELECT p.id, f.path, f.title, p.number, p.headings, p.page, p.text"


class DocumentIndex:
    """Passages of documents, found by words. Use it in a ``with`` statement, in one thread at a time.

    Args:
        folder: whose documents are indexed; None: none but those given to `add`, in memory.
        tokenizer: passages are cut by its tokens. An index that is there stays as it was cut, whatever the tokenizer.
        passage_tokens: most of one passage; None: as the index that is there has it, 256 for a new one. Where that
            changes, the next update reads all files anew.
        path: of the index; by default NAME in the folder.
        update: whether it will be updated. If not, it must be there, and nothing is written.

    Raises DocumentError: the folder is none, the index cannot be written or is damaged.
    """

    def __init__(
        self,
        folder: Path | None,
        tokenizer: Tokenizer,
        passage_tokens: int | None = None,
        path: Path | None = None,
        *,
        update: bool = True,
    ) -> None:
        if folder is not None and not folder.is_dir():
            raise DocumentError(folder, "is no folder" if folder.exists() else "does not exist")
        self.folder = folder
        self.path = path if path is not None else Path(":memory:") if folder is None else folder / NAME
        self._tokenizer = tokenizer
        self._unseen: list[tuple[str, str]] = []  # folders that could not be looked into, and why
        if self.path.is_symlink():
            raise DocumentError(self.path, "is a link: give the index another place")
        with self._explaining():
            self._db = self._connect(update or folder is None)
            try:
                self._db.execute("PRAGMA trusted_schema = OFF")
                self._most = self._begin(passage_tokens) if update or folder is None else self._take(passage_tokens)
            except BaseException:
                self._db.close()
                raise

    def _connect(self, writes: bool) -> sqlite3.Connection:
        """A thread at a time may use it, not only the one that made it."""
        place, uri = str(self.path), not writes
        if not writes:
            if not self.path.is_file():
                raise DocumentError(self.path, "does not exist, and no update was asked for")
            # In a folder that cannot be written nobody writes, and the files that readers share cannot be made.
            alone = not os.access(self.path.parent, os.W_OK)
            place = f"{self.path.absolute().as_uri()}?mode=ro{'&immutable=1' if alone else ''}"
        return sqlite3.connect(place, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False, uri=uri)

    def _take(self, passage_tokens: int | None) -> int:
        if self._is_new():
            raise DocumentError(self.path, "is empty, and no update was asked for")
        (most,) = self._db.execute("SELECT value FROM meta WHERE key = 'passage_tokens'").fetchone()
        if passage_tokens is not None and passage_tokens != int(most):
            problem = f"must be {most}, as the index has it, or be left out, where no update is asked for"
            raise InvalidRequestError("passage_tokens", problem)
        return int(most)

    def _begin(self, passage_tokens: int | None) -> int:
        """Most tokens of a passage."""
        self._is_new()  # nothing is changed in a file that is somebody else's
        self._begin_log()
        self._db.execute("PRAGMA synchronous = NORMAL")
        most = passage_tokens or DEFAULT_PASSAGE_TOKENS
        with self._transaction():
            if self._is_new():
                for statement in _TABLES:
                    self._db.execute(statement)
                self._db.execute("INSERT INTO sqlite_sequence VALUES ('passages', ?)", (_FIRST_NUMBER - 1,))
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

    def _begin_log(self) -> None:
        """Readers do not wait for writers (WAL). Of several that begin so at once SQLite refuses some at once."""
        deadline = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def _is_new(self) -> bool:
        """Raises DocumentError for a database that is no index, or one of another version. What else it may hold, such
        as triggers, would act for whoever wrote it."""
        found = self._db.execute(_SCHEMA).fetchall()
        if not found:
            return True
        tables = {name for kind, name, _ in found if kind == "table"}
        if not {"meta", "files", "passages", "words"} <= tables:
            raise DocumentError(self.path, "is a database, but none of Octavo's: give the index another place")
        version = self._db.execute("SELECT value FROM meta WHERE key = 'version'").fetchone()
        if version != (_VERSION,) or found != _own_schema():
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
            name = name_of(path.relative_to(self.folder))
            names.add(name)
            with self._explaining():
                read_it = self._update_file(path, name, known.get(name))
            progress = replace(progress, num_seen=progress.num_seen + 1, num_read=progress.num_read + read_it)
            if read_it or not progress.num_seen % 100:
                yield progress
        if not self.folder.is_dir():
            raise DocumentError(self.folder, "has gone while it was indexed")
        unseen = tuple(f"{name}/" for name, _ in self._unseen)
        with self._explaining():
            gone = [name for name in known if name not in names and not name.startswith(unseen)]
            for name in gone:
                with self._transaction():
                    self._forget(name)
            (problems,) = self._db.execute("SELECT count(*) FROM files WHERE problem IS NOT NULL").fetchone()
        yield replace(progress, num_removed=len(gone), num_problems=problems + len(self._unseen))

    def _files(self, folder: Path) -> Iterator[Path]:
        """Those that can be read, in order; what begins with a dot is left out, and links are not followed."""
        self._unseen = []

        def note(error: OSError) -> None:
            name = name_of(Path(error.filename).relative_to(folder))
            self._unseen.append((name, f"cannot be looked into: {error.strerror}"))

        for parent, folders, names in os.walk(folder, onerror=note):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                path = Path(parent, name)
                if path.suffix.lower() in suffixes() and not name.startswith(".") and _is_plain(path):
                    yield path

    def _update_file(self, path: Path, name: str, known: Sequence[int] | None) -> bool:
        try:
            found = path.stat()
        except OSError:
            return False  # gone meanwhile
        state = [found.st_size, found.st_mtime_ns % (1 << 62)]  # as SQLite holds it, whatever the year
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
        except InvalidRequestError as error:  # of the tokenizer
            problem = error.problem
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
            for piece in _pieces(section.text):
                for part in split(self._tokenizer, (), piece, self._most):
                    text = piece[part.start : part.stop].strip()
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
        words = list(dict.fromkeys(_words(question)))[:_MAX_WORDS]
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
            of_files = self._db.execute("SELECT path, problem FROM files WHERE problem IS NOT NULL ORDER BY path")
            return [*self._unseen, *of_files.fetchall()]

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
        except (sqlite3.Error, UnicodeDecodeError) as error:
            told = str(error)
            if "not a database" in told or "malformed" in told:
                problem = f"is damaged or no index ({told}): delete it, and it is made anew"
            elif "unable to open" in told or "readonly" in told or "disk I/O" in told or "full" in told:
                problem = f"cannot be written ({told}): give the index another place"
            elif "locked" in told:
                problem = f"is held by another process for more than {_BUSY_SECONDS:.0f} s"
            else:
                problem = f"cannot be used ({told}): delete it, and it is made anew"
            raise DocumentError(self.path, problem) from None

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> DocumentIndex:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()


def _own_schema() -> list[tuple[str, str, str]]:
    """What an index of this version holds."""
    database = sqlite3.connect(":memory:")
    try:
        for statement in _TABLES:
            database.execute(statement)
        return database.execute(_SCHEMA).fetchall()
    finally:
        database.close()


def name_of(path: Path) -> str:
    """With / between its parts. Bytes that are not UTF-8, and what is not printed, such as ends of lines, are written
    out: SQLite, a prompt, and whoever reads an answer's sources are to see one line of text."""
    name = os.fsencode(path.as_posix()).decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in name)


def path_of(name: str) -> Path:
    """Whose name this is, or the nearest that can be told."""
    if Path(name).exists():
        return Path(name)
    data = re.sub(rb"\\x([0-9a-f]{2})", lambda match: bytes([int(match[1], 16)]), os.fsencode(name))
    return Path(os.fsdecode(data))


def _is_plain(path: Path) -> bool:
    """A file, and no link to one, nor a pipe that would be waited for."""
    with suppress(OSError):
        return stat.S_ISREG(path.lstat().st_mode)
    return False


def _pieces(text: str) -> Iterator[str]:
    """Of a long text, cut at ends of paragraphs, or else of lines or words."""
    start = 0
    while len(text) - start > _PIECE:
        ends = (text.rfind(end, start + _PIECE // 2, start + _PIECE) + len(end) for end in ("\n\n", "\n", " "))
        stop = next((end for end in ends if end > start + _PIECE // 2), start + _PIECE)
        yield text[start:stop]
        start = stop
    yield text[start:]


def _words(text: str) -> list[str]:
    """As the index cuts them: letters, digits and marks."""
    kept = [c if unicodedata.category(c)[0] in "LNM" else " " for c in unicodedata.normalize("NFC", text)]
    return "".join(kept).split()


def _source(
    id_: int, path: str, title: str, number: int, headings: str, page: int | None, text: str, score: float | None
) -> Source:
    return Source(
        id_, "passage", path, title, tuple(headings.split("\n")) if headings else (), page, number, text, score
    )
