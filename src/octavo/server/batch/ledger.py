"""Which requests of a batch are known by now: on disk, so that memory stays the same however long the input is."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager


class Ledger:
    """The custom_ids of a batch: those that were answered before, and those that the input has asked for since."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute(
            "CREATE TABLE ids (custom_id TEXT PRIMARY KEY, answer TEXT, asked INTEGER NOT NULL) WITHOUT ROWID"
        )

    def note_answered(self, custom_id: str, answer: str) -> bool:
        """`answer`: its id. False if there is one already."""
        return self._insert(custom_id, answer, asked=False)

    def note_asked(self, custom_id: str) -> bool:
        """False if the input has asked for it before."""
        if self._insert(custom_id, None, asked=True):
            return True
        found = self._database.execute("UPDATE ids SET asked = 1 WHERE custom_id = ? AND NOT asked", (custom_id,))
        return found.rowcount == 1

    def answer(self, custom_id: str) -> str | None:
        """The id of the answer that there was before the batch began."""
        row = self._database.execute("SELECT answer FROM ids WHERE custom_id = ?", (custom_id,)).fetchone()
        return None if row is None else row[0]

    @property
    def num_unasked(self) -> int:
        """Answers to what the input has not asked for."""
        return int(self._database.execute("SELECT count(*) FROM ids WHERE NOT asked").fetchone()[0])

    def _insert(self, custom_id: str, answer: str | None, *, asked: bool) -> bool:
        row = custom_id, answer, asked
        return self._database.execute("INSERT OR IGNORE INTO ids VALUES (?, ?, ?)", row).rowcount == 1


@contextmanager
def open_ledger() -> Iterator[Ledger]:
    """An empty one. It is used in several threads, one after the other."""
    # A file that has no name, in the folder for temporary ones, written only once it outgrows a cache of 2 MB.
    database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
    try:
        yield Ledger(database)
    finally:
        database.close()
