"""Questions over documents as values: what an answer rests on, and what is told while it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from octavo.core.margins import MarginsEvent


@dataclass(frozen=True, slots=True)
class Source:
    """What an answer may cite: a passage that was found, or a note from a document's margin."""

    number: int  # what stands in brackets where it is cited; of a passage its number in the index
    kind: Literal["passage", "note"]
    document: str  # the file in its folder, with / between its parts, or the id that was given
    title: str
    headings: tuple[str, ...]  # the passage stands under, or what the note is about begins with; from the top down
    page: int | None  # from 1; None where there are no pages
    index: int  # of the passage, or of the segment that the note was written at, in its document, from 0
    text: str
    score: float | None  # how well it fits the question by BM25, or log p(YES) - log p(NO) of a note; more is better

    @property
    def place(self) -> str:
        """Where it stands, for people: ``library/os.rst, p. 3, Files › Reading``."""
        page = () if self.page is None else (f"p. {self.page}",)
        headings = (" › ".join(self.headings),) if self.headings else ()
        return ", ".join((self.document, *page, *headings))


@dataclass(frozen=True, slots=True)
class Citation:
    """A number in brackets in an answer."""

    start: int  # characters of the answer's text that name it
    stop: int
    number: int
    source: Source | None  # None: there is none of this number among those that the answer may rest on


# --- what is told ---


@dataclass(frozen=True, slots=True)
class IndexProgress:
    """How far the index of a folder is brought up to date."""

    num_files: int = 0  # that are in the folder
    num_seen: int = 0
    num_read: int = 0  # that were new, or had changed
    num_removed: int = 0
    num_problems: int = 0  # files that cannot be read


@dataclass(frozen=True, slots=True)
class Retrieved:
    """Passages that were found, best first."""

    passages: tuple[Source, ...]
    problems: tuple[tuple[str, str], ...] = ()  # files that cannot be read, and why


@dataclass(frozen=True, slots=True)
class DocumentEvent:
    """What happens while a document is read in the margins way."""

    document: str
    event: MarginsEvent
