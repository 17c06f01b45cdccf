"""Files as documents: text under its headings and on its pages, and what is said of files that cannot be read."""

from __future__ import annotations

import io
import sys
import zipfile
from pathlib import Path

import pytest

from octavo import DocumentError
from octavo.documents import readers
from octavo.documents.readers import Document, Section, read

from .files import a_docx, a_pdf, an_epub


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_text(tmp_path: Path) -> None:
    document = read(written(tmp_path / "a.txt", "\ufeffOne line.\r\nAnother.\n"))
    assert document == Document("a", (Section("One line.\nAnother."),))


def test_text_of_another_encoding_by_its_mark(tmp_path: Path) -> None:
    assert read(written(tmp_path / "a.txt", "Grün.".encode("utf-16"))).sections[0].text == "Grün."


def test_underlined_headings(tmp_path: Path) -> None:
    text = (
        "=====\nTitle\n=====\n\nIntro.\n\nPart\n====\n\nOne.\n\nSub\n---\n\nTwo.\n\nPart 2\n======\n\nThree.\nab\n--\n"
    )
    sections = read(written(tmp_path / "a.rst", text)).sections
    assert [(section.headings, section.text) for section in sections] == [
        (("Title",), "Intro."),
        (("Title", "Part"), "One."),
        (("Title", "Part", "Sub"), "Two."),
        (("Title", "Part 2"), "Three.\nab\n--"),  # too short to underline anything
    ]


def test_markdown(tmp_path: Path) -> None:
    text = "before\n\n# The *sea*\n\nOld.\n\n```\n# no heading\n```\n\n## Whales\nWhite.\n\n"
    text += "Ships\n=====\n\nFar.\n\n> # quoted\n"
    document = read(written(tmp_path / "a.md", text))
    assert [(section.headings, section.text) for section in document.sections] == [
        ((), "before"),
        (("The *sea*",), "Old.\n\n```\n# no heading\n```"),
        (("The *sea*", "Whales"), "White."),
        (("Ships",), "Far.\n\n> # quoted"),
    ]
    assert document.title == "a"


def test_html(tmp_path: Path) -> None:
    text = """<html><head><title> The
        sea </title><style>p {}</style></head><body><nav>menu</nav><div role="navigation">more</div>
        loose <b>bold</b> text<!-- not this --> and a tail
        <h1>Whales<a class="headerlink" href="#w">¶</a></h1><script>no()</script>
        <p>They  are<br>white.<ul><li>one</li><li>two <em>three</em></li></ul>
        <pre>a
  b</pre><table><tr><td>1</td><td>2</td></tr></table><h3>Deep</h3>Grün</body></html>"""
    document = read(written(tmp_path / "a.html", text))
    assert document.title == "The sea"
    assert [(section.headings, section.text) for section in document.sections] == [
        ((), "loose bold text and a tail"),
        (("Whales",), "They are\nwhite.\none\ntwo three\n\na\n  b\n1\t2"),
        (("Whales", "Deep"), "Grün"),
    ]


def test_html_says_its_encoding(tmp_path: Path) -> None:
    page = '<meta charset="iso-8859-1"><p>Grün</p>'.encode("latin-1")
    assert read(written(tmp_path / "a.htm", page)).sections[0].text == "Grün"


def test_pdf(tmp_path: Path) -> None:
    document = read(a_pdf(tmp_path / "a.pdf", ["The first page.", "", "The third."], "A paper"))
    assert document == Document("A paper", (Section("The first page.", page=1), Section("The third.", page=3)))


def test_docx(tmp_path: Path) -> None:
    document = read(a_docx(tmp_path / "a.docx"))
    assert [(section.headings, section.text) for section in document.sections] == [
        (("The Sea",), "It is old."),
        (("The Sea", "Whales"), "They are white.\nlength\t18 m"),
        (("The Sea", "Whales", "Ships"), "They sail."),
    ]


def test_epub(tmp_path: Path) -> None:
    document = read(an_epub(tmp_path / "a.epub"))
    assert document.title == "Moby"
    assert [(section.headings, section.text) for section in document.sections] == [
        (("Chapter 1",), "Call me Ishmaël."),
        (("Chapter 2",), "The whale."),
    ]


def test_written_as_one_text() -> None:
    document = Document(
        "t", (Section("a", ("H",)), Section("b", ("H", "I")), Section("c", ("J",)), Section("d", page=2))
    )
    text, starts = document.written()
    assert text == "H\n\na\n\nI\n\nb\n\nJ\n\nc\n\nd\n"
    assert [text[start:].partition("\n")[0] for start, _ in starts] == ["H", "I", "J", "d"]
    assert tuple(section for _, section in starts) == document.sections


def test_halves_of_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries make them of broken files."""
    made = Document("t\udc00", (Section("a\ud83d\ude00b\udcff", ("h\ud800",)),))
    monkeypatch.setitem(readers._READERS, ".txt", lambda _: made)
    found = read(written(tmp_path / "a.txt", ""))
    assert found == Document("t\ufffd", (Section("a\U0001f600b\ufffd", ("h\ufffd",)),))


def test_external_entities_are_not_read(tmp_path: Path) -> None:
    secret = written(tmp_path / "secret.txt", "the secret")
    path = an_epub(tmp_path / "a.epub")
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name).decode() for name in archive.namelist()}
    entity = f'<!DOCTYPE package [<!ENTITY s SYSTEM "{secret.as_uri()}">]><package'
    files["OEBPS/book.opf"] = files["OEBPS/book.opf"].replace("<package", entity).replace("Moby", "&s;")
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    assert "secret" not in repr(read(path))


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b"\xff\xfa", "is not text in UTF-8: see byte 0"),
        ("a.txt", b"a\0b", "is not text: it holds bytes that are 0"),
        ("a.md", b" \n\n", "holds no text"),
        ("a.html", b"", "holds no text"),
        ("a.html", b"<script>x</script>", "holds no text"),
        ("a.pdf", b"not a PDF", "cannot be read"),
        ("a.docx", b"PK\x03\x04 broken", "cannot be read"),
        ("a.epub", b"", "cannot be read"),
        ("a.xyz", b"", "files of this kind are not read; those of .txt"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, name: str, data: bytes, problem: str) -> None:
    path = written(tmp_path / name, data)
    with pytest.raises(DocumentError) as caught:
        read(path)
    assert problem in caught.value.problem and str(caught.value).startswith(str(path))
    assert not caught.value.may_pass


def test_a_pdf_without_text(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=r"holds no text \(scanned pages\?\)"):
        read(a_pdf(tmp_path / "a.pdf", ["", ""]))


def test_an_encrypted_pdf(tmp_path: Path) -> None:
    import pypdf

    writer = pypdf.PdfWriter(clone_from=a_pdf(tmp_path / "plain.pdf", ["text"]))
    writer.encrypt("secret", algorithm="RC4-128")
    with (tmp_path / "a.pdf").open("wb") as file:
        writer.write(file)
    with pytest.raises(DocumentError, match="is encrypted"):
        read(tmp_path / "a.pdf")


def test_a_pdf_that_anybody_may_open(tmp_path: Path) -> None:
    """Encrypted with an empty password: that is how printing and copying are forbidden."""
    import pypdf

    for algorithm in ("RC4-128", "AES-128", "AES-256"):
        writer = pypdf.PdfWriter(clone_from=a_pdf(tmp_path / "plain.pdf", ["text"]))
        writer.encrypt("", "owner", algorithm=algorithm)
        with (tmp_path / "a.pdf").open("wb") as file:
            writer.write(file)
        assert read(tmp_path / "a.pdf").sections[0].text == "text"


def test_an_epub_with_an_empty_page(tmp_path: Path) -> None:
    path = an_epub(tmp_path / "a.epub")
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    for empty in (b"", b'<?xml version="1.0"?>'):
        files["OEBPS/two.xhtml"] = empty
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        assert [section.text for section in read(path).sections] == ["Call me Ishmaël."]


def test_all_text_of_a_docx(tmp_path: Path) -> None:
    """Content controls, insertions, nested tables and merged cells; not what was deleted."""
    import docx
    from docx.oxml import parse_xml
    from docx.oxml.ns import nsdecls

    document = docx.Document()
    spaces = nsdecls("w")

    def put(xml: str) -> None:
        document.element.body.insert(len(document.element.body) - 1, parse_xml(xml))

    run = "<w:r><w:t>{0}</w:t></w:r>"
    put(f"<w:sdt {spaces}><w:sdtContent><w:p>{run.format('control')}</w:p></w:sdtContent></w:sdt>")
    inserted, deleted = run.format("inserted"), "<w:r><w:delText>gone</w:delText></w:r>"
    put(f"<w:p {spaces}><w:ins>{inserted}</w:ins><w:del>{deleted}</w:del><w:r><w:tab/><w:t>kept</w:t></w:r></w:p>")
    table = document.add_table(2, 2)
    table.cell(0, 0).merge(table.cell(0, 1)).text = "merged"
    table.cell(1, 0).text = "left"
    table.cell(1, 1).add_table(1, 1).cell(0, 0).text = "nested"
    document.save(str(tmp_path / "a.docx"))
    words = read(tmp_path / "a.docx").sections[0].text.split()
    assert words == ["control", "inserted", "kept", "merged", "left", "nested"]


def test_an_epub_whose_page_is_missing(tmp_path: Path) -> None:
    path = an_epub(tmp_path / "a.epub")
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist() if "two" not in name}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    with pytest.raises(DocumentError, match=r"cannot be read: .*two\.xhtml"):
        read(path)


def test_sizes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, epub = written(tmp_path / "a.txt", "x" * 50), an_epub(tmp_path / "a.epub")
    with monkeypatch.context() as patch:
        patch.setattr(readers, "MAX_FILE_BYTES", 49)
        with pytest.raises(DocumentError, match="has more than 49 bytes"):
            read(text)
    with monkeypatch.context() as patch:
        patch.setattr(readers, "MAX_TEXT", 49)
        with pytest.raises(DocumentError, match="holds more than 49 characters"):
            read(text)
    monkeypatch.setattr(readers, "MAX_UNPACKED_BYTES", 100)
    with pytest.raises(DocumentError, match="unpacks to more than 100 bytes"):
        read(epub)


def test_an_archive_that_lies_about_its_size(tmp_path: Path) -> None:
    """What the directory says is what is unpacked at most."""
    path = tmp_path / "a.epub"
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("META-INF/container.xml", b" " * (1 << 20))
    raw = data.getvalue()
    path.write_bytes(raw.replace((1 << 20).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    with pytest.raises(DocumentError):
        read(path)


@pytest.mark.parametrize(
    ("name", "package"), [("a.pdf", "pypdf"), ("a.docx", "docx"), ("a.html", "lxml.html"), ("a.epub", "lxml.etree")]
)
def test_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    make = {"a.pdf": lambda p: a_pdf(p, ["text"]), "a.docx": a_docx, "a.epub": an_epub}
    path = make.get(name, lambda p: written(p, "<p>text"))(tmp_path / name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DocumentError, match=r"pip install octavo\[documents\]") as caught:
        read(path)
    assert caught.value.may_pass


def test_deep_html(tmp_path: Path) -> None:
    """It is read as far as the parser goes, or refused; nothing crashes."""
    path = written(tmp_path / "a.html", "<div>" * 200_000 + "text")
    try:
        assert read(path).sections
    except DocumentError as error:
        assert error.problem
