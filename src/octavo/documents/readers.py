"""Files as documents: sections of text under their headings and on their pages.

Text and Markdown need nothing; HTML, EPUB, PDF and DOCX the packages of the extra ``documents``.
"""

from __future__ import annotations

import importlib
import posixpath
import re
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from octavo.core.errors import OctavoError

MAX_FILE_BYTES = 256 << 20
MAX_UNPACKED_BYTES = 512 << 20  # of a zip archive, which DOCX and EPUB are
MAX_TEXT = 1 << 26  # characters of one document
_MAX_HEADING = 200  # characters: each passage under it has it
_MAX_DEPTH = 8  # headings above each other


class DocumentError(OctavoError, ValueError):
    """A file cannot be read as a document. `path` is the file."""

    def __init__(self, path: object, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = str(path)
        self.problem = problem
        self.may_pass = False  # it lies not in the file: it is to be tried again


@dataclass(frozen=True, slots=True)
class Section:
    """Text that stands under one heading, and on one page."""

    text: str
    headings: tuple[str, ...] = ()  # from the document's down to its own
    page: int | None = None  # from 1; None where there are no pages


@dataclass(frozen=True, slots=True)
class Document:
    title: str
    sections: tuple[Section, ...]

    def written(self) -> tuple[str, list[tuple[int, Section]]]:
        """All of it as one text, with headings on lines of their own; and where in it each section begins."""
        parts: list[str] = []
        starts: list[tuple[int, Section]] = []
        length = 0
        above: tuple[str, ...] = ()
        for section in self.sections:
            starts.append((length, section))
            common = next(
                (i for i, (a, b) in enumerate(zip(above, section.headings, strict=False)) if a != b),
                min(len(above), len(section.headings)),
            )
            above = section.headings
            for text in (*section.headings[common:], section.text):
                parts.append(text + "\n\n")
                length += len(parts[-1])
        return "".join(parts).rstrip("\n") + "\n", starts


Reader = Callable[[Path], Document]


def suffixes() -> tuple[str, ...]:
    """Of the files that can be read."""
    return tuple(_READERS)


def read(path: Path) -> Document:
    """Raises DocumentError; of an encrypted file, one without text, one that is too large, or a package that is
    missing it says so."""
    reader = _READERS.get(path.suffix.lower())
    try:
        if not path.exists():
            raise DocumentError(path, "does not exist")
        if not path.is_file():
            raise DocumentError(path, "is no file")
    except OSError as error:
        raise DocumentError(path, f"cannot be looked at: {error.strerror or error}") from None
    if reader is None:
        raise DocumentError(path, f"files of this kind are not read; those of {', '.join(_READERS)} are")
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DocumentError(path, f"has more than {MAX_FILE_BYTES} bytes")
        document = reader(path)
    except DocumentError:
        raise
    except (OSError, MemoryError) as error:
        told = error.strerror if isinstance(error, OSError) else None
        raise _passing(path, f"cannot be read: {told or error or 'memory is short'}") from None
    except RecursionError:
        raise DocumentError(path, "is nested too deep") from None
    except Exception as error:  # of a library, on a file that may hold anything
        raise DocumentError(path, f"cannot be read: {type(error).__name__}: {error}") from None
    sections = tuple(_valid(section) for section in document.sections if section.text.strip())
    if not sections:
        raise DocumentError(path, "holds no text" + (" (scanned pages?)" if path.suffix.lower() == ".pdf" else ""))
    if sum(len(section.text) for section in sections) > MAX_TEXT:
        raise DocumentError(path, f"holds more than {MAX_TEXT} characters of text")
    return Document(_unicode(shortened_heading(document.title)), sections)


def _valid(section: Section) -> Section:
    return Section(_unicode(section.text), tuple(map(_unicode, section.headings)), section.page)


def _unicode(text: str) -> str:
    """What a library makes of a broken file, or the name of one, may hold halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _package(path: Path, name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise _passing(path, f"needs the package {package}: pip install octavo[documents]") from None


def _passing(path: Path, problem: str) -> DocumentError:
    """Of a problem that is not the file's."""
    error = DocumentError(path, problem)
    error.may_pass = True
    return error


def shortened_heading(text: str) -> str:
    """On one line."""
    text = " ".join(text.split())
    return text if len(text) <= _MAX_HEADING else text[: _MAX_HEADING - 1] + "\u2026"


def _text_of(path: Path) -> str:
    data = path.read_bytes()
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"  # by its byte order mark
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise DocumentError(path, f"is not text in UTF-8: see byte {error.start}") from None
    if "\0" in text:
        raise DocumentError(path, "is not text: it holds bytes that are 0")
    return text.replace("\r\n", "\n").replace("\r", "\n")


class _Outline:
    """Sections made from headings of levels 1 and up and the text between them."""

    def __init__(self) -> None:
        self.sections: list[Section] = []
        self._headings: list[tuple[int, str]] = []
        self._parts: list[str] = []

    def heading(self, level: int, text: str) -> None:
        self.end()
        self._headings = [one for one in self._headings if one[0] < level][: _MAX_DEPTH - 1]
        if text.strip():
            self._headings.append((level, shortened_heading(text)))

    def text(self, text: str, *, close: bool = False) -> None:
        """A block of text; `close`: on the line below the one before it, as items of lists are."""
        if text.strip():
            self._parts.append(("\n" if close else "\n\n") + text if self._parts else text)

    def end(self) -> None:
        if self._parts:
            self.sections.append(Section("".join(self._parts), tuple(text for _, text in self._headings)))
            self._parts = []

    def document(self, path: Path, title: str | None = None) -> Document:
        self.end()
        return Document(
            title or (self.sections[0].headings[:1] or (path.stem,))[0] if self.sections else path.stem,
            tuple(self.sections),
        )


# A line, and under it one of marks that is as long: a heading, as reStructuredText and plain text have them.
_UNDERLINED = re.compile(r"^(?:([^\w\s])\1{2,}\n)?[ ]?(\S.*)\n(([^\w\s])\4{2,})[ ]*$", re.MULTILINE)


def _plain(path: Path) -> Document:
    text = _text_of(path)
    outline, levels, done = _Outline(), dict[tuple[bool, str], int](), 0
    for match in _UNDERLINED.finditer(text):
        if len(match[3]) < len(match[2].rstrip()):
            continue
        outline.text(text[done : match.start()].strip("\n"))
        kind = match[1] is not None, match[4]
        outline.heading(levels.setdefault(kind, len(levels)), match[2])
        done = match.end()
    outline.text(text[done:].strip("\n"))
    return outline.document(path)


def _markdown(path: Path) -> Document:
    from markdown_it import MarkdownIt

    text = _text_of(path)
    lines = text.split("\n")
    outline = _Outline()
    tokens = MarkdownIt("commonmark").parse(text)
    done = 0  # lines that are in the outline
    for number, token in enumerate(tokens):
        if token.type == "heading_open" and token.level == 0 and token.map is not None:
            first, last = token.map
            outline.text("\n".join(lines[done:first]).strip("\n"))
            outline.heading(int(token.tag[1:]), tokens[number + 1].content)
            done = last
    outline.text("\n".join(lines[done:]).strip("\n"))
    return outline.document(path)


_INLINE = frozenset(
    "a abbr b bdi bdo big cite code data del dfn em font i ins kbd label mark q s samp small span strike strong sub "
    "sup time tt u var wbr".split()
)
_LINES = frozenset(["dd", "dt", "li", "tr"])  # blocks that stand close together
_UNREAD = frozenset("button head iframe nav noscript object script select style svg template".split())


def _html(path: Path) -> Document:
    root = _html_root(path, path.read_bytes())
    if root is None:
        raise DocumentError(path, "holds no text")
    title = root.find(".//title")
    outline = _Outline()
    _read_html(path, root, outline)
    return outline.document(path, None if title is None else " ".join("".join(title.itertext()).split()))


def _html_root(path: Path, data: bytes) -> Any:
    """None: there is nothing in it."""
    html = _package(path, "lxml.html", "lxml")
    encoding = None
    with suppress(UnicodeDecodeError):  # else what the file says it is
        data.decode()
        encoding = "utf-8"
    parser = html.HTMLParser(encoding=encoding, remove_comments=True, remove_pis=True)
    try:
        return html.document_fromstring(data, parser=parser)
    except _package(path, "lxml.etree", "lxml").ParserError:
        return None


def _read_html(path: Path, root: Any, outline: _Outline) -> None:
    """Text of blocks, with spaces as a browser shows them; links that only mark their heading are left out."""
    walk = _package(path, "lxml.etree", "lxml").iterwalk(root, events=("start", "end"))
    parts: list[str] = []
    depth = 0  # of <pre>

    def flush(tag: str) -> None:
        text, parts[:] = "".join(parts), []
        if tag[:1] == "h" and tag[1:] in ("1", "2", "3", "4", "5", "6"):
            outline.heading(int(tag[1]), text)
        else:
            outline.text(text.strip("\n") if depth else text.strip(), close=tag in _LINES)

    def add(text: str | None) -> None:
        if text:
            parts.append(text if depth else re.sub(r"\s+", " ", text))

    for event, element in walk:
        tag = element.tag
        unread = (
            tag in _UNREAD
            or element.get("role") in ("navigation", "search")
            or (tag == "a" and "headerlink" in element.get("class", "").split())
        )
        block = not (unread or tag in _INLINE or tag in ("br", "td", "th"))
        if event == "start":
            if unread:
                walk.skip_subtree()
                continue
            if block:
                flush("")
                depth += tag == "pre"
            add(element.text)
            continue
        if block:
            flush(tag)
            depth -= tag == "pre"
        elif tag in ("br", "td", "th"):
            parts.append("\n" if tag == "br" else "\t")
        add(element.tail)
    flush("")


def _pdf(path: Path) -> Document:
    pypdf = _package(path, "pypdf", "pypdf")
    with path.open("rb") as file:
        reader = pypdf.PdfReader(file)
        try:
            if reader.is_encrypted and not reader.decrypt(""):
                raise DocumentError(path, "is encrypted")
        except pypdf.errors.DependencyError:
            raise _passing(
                path, "is encrypted and needs the package cryptography: pip install octavo[documents]"
            ) from None
        sections = tuple(Section(page.extract_text() or "", page=number) for number, page in enumerate(reader.pages, 1))
        title = reader.metadata.title if reader.metadata is not None else None
    return Document(str(title).strip() if title else path.stem, sections)


def _check_archive(path: Path) -> None:
    """A small file may unpack to more than there is memory."""
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > MAX_UNPACKED_BYTES:
            raise DocumentError(path, f"unpacks to more than {MAX_UNPACKED_BYTES} bytes")


_WORD = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"


def _docx(path: Path) -> Document:
    """All text but what tracked changes have deleted: python-docx's own walk leaves out content controls and insertions
    (ECMA-376, part 1, sections 17.3 to 17.5 and 17.13.5)."""
    docx = _package(path, "docx", "python-docx")
    _check_archive(path)
    document = docx.Document(str(path))
    styles = {style.style_id: style.name for style in document.styles}
    outline = _Outline()
    _read_word(document.element.body, styles, outline)
    return outline.document(path, document.core_properties.title or None)


def _read_word(parent: Any, styles: dict[str, str], outline: _Outline) -> None:
    for element in parent:
        kind = element.tag.removeprefix(_WORD) if isinstance(element.tag, str) else ""
        if kind == "tr":
            cells = (element_ for element_ in element.iter(_WORD + "tc") if next(_above(element_, "tr")) is element)
            outline.text(
                "\t".join(" ".join(_word_text(p) for p in cell.iter(_WORD + "p")) for cell in cells), close=True
            )
        elif kind == "p":
            found = element.find(f"{_WORD}pPr/{_WORD}pStyle")
            style = styles.get("" if found is None else found.get(_WORD + "val"), "")
            level = style.removeprefix("Heading ")
            if style.startswith("Heading ") and level.isdigit():
                outline.heading(int(level), _word_text(element))
            elif style == "Title":
                outline.heading(0, _word_text(element))
            else:
                outline.text(_word_text(element))
        elif kind not in ("sectPr", "sdtPr", "sdtEndPr", "del", "moveFrom"):
            _read_word(element, styles, outline)


def _above(element: Any, kind: str) -> Any:
    return (one for one in element.iterancestors() if one.tag == _WORD + kind)


def _word_text(paragraph: Any) -> str:
    parts = {"t": None, "tab": "\t", "br": "\n", "cr": "\n", "noBreakHyphen": "-"}
    found = []
    for element in paragraph.iter(*(_WORD + name for name in parts)):
        if not any(next(_above(element, gone), None) is not None for gone in ("del", "moveFrom", "pPr")):
            found.append(parts[element.tag.removeprefix(_WORD)] or element.text or "")
    return "".join(found)


def _epub(path: Path) -> Document:
    """A zip archive of pages of XHTML, in the order that its package document tells (EPUB 3.3, sections 4.2 and 5)."""
    _check_archive(path)
    outline = _Outline()
    with zipfile.ZipFile(path) as archive:
        rootfile = _xml_root(path, archive.read("META-INF/container.xml")).find(".//{*}rootfile")
        if rootfile is None:
            raise DocumentError(path, "has no package document")
        name = rootfile.get("full-path", "")
        package = _xml_root(path, archive.read(name))
        pages = {item.get("id"): item.get("href", "") for item in package.iterfind(".//{*}manifest/{*}item")}
        for reference in package.iterfind(".//{*}spine/{*}itemref"):
            page = unquote(pages.get(reference.get("idref"), "").partition("#")[0])
            if page:
                inside = posixpath.normpath(posixpath.join(posixpath.dirname(name), page))
                root = _html_root(path, archive.read(inside))
                if root is not None:
                    _read_html(path, root, outline)
                    outline.end()
        title = package.find(".//{*}metadata/{*}title")
    return outline.document(path, None if title is None else " ".join("".join(title.itertext()).split()))


def _xml_root(path: Path, data: bytes) -> Any:
    etree = _package(path, "lxml.etree", "lxml")
    # Nothing outside the archive is looked at, and entities are not filled in.
    return etree.fromstring(data, parser=etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False))


_READERS: dict[str, Reader] = {
    ".txt": _plain,
    ".rst": _plain,
    ".md": _markdown,
    ".markdown": _markdown,
    ".html": _html,
    ".htm": _html,
    ".xhtml": _html,
    ".pdf": _pdf,
    ".docx": _docx,
    ".epub": _epub,
}
