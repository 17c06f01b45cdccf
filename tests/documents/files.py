"""Small files of every kind that is read."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path


def a_pdf(path: Path, pages: Sequence[str], title: str = "") -> Path:
    """One line of text a page; an empty one is a page without text."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", ""]
    kids = []
    for text in pages:
        stream = f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET" if text else ""
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
        font = "<< /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >>"
        box = "/MediaBox [0 0 612 792]"
        objects.append(f"<< /Type /Page /Parent 2 0 R {box} /Contents {len(objects)} 0 R /Resources {font} >>")
        kids.append(f"{len(objects)} 0 R")
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>"
    objects.append(f"<< /Title ({title}) >>")
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n".encode("latin-1")
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    trailer = f"<< /Size {len(objects) + 1} /Root 1 0 R /Info {len(objects)} 0 R >>"
    end = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer\n{trailer}\nstartxref\n{len(out)}\n%%EOF\n"
    path.write_bytes(out + end.encode())
    return path


def a_docx(path: Path) -> Path:
    import docx

    document = docx.Document()
    document.add_heading("The Sea", 0)
    document.add_paragraph("It is old.")
    document.add_heading("Whales", 1)
    document.add_paragraph("They are white.")
    table = document.add_table(1, 2)
    table.cell(0, 0).text, table.cell(0, 1).text = "length", "18 m"
    document.add_heading("Ships", 2)
    document.add_paragraph("They sail.")
    document.save(str(path))
    return path


def an_epub(path: Path) -> Path:
    """Two pages, the second of them first in the archive; one has a name that is written with %20."""
    package = (
        '<?xml version="1.0"?><package xmlns="http://www.idpf.org/2007/opf" version="3.0">'
        '<metadata xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:title>Moby</dc:title></metadata><manifest>'
        '<item id="b" href="two.xhtml" media-type="application/xhtml+xml"/>'
        '<item id="a" href="one%20page.xhtml#top" media-type="application/xhtml+xml"/></manifest>'
        '<spine><itemref idref="a"/><itemref idref="b"/><itemref idref="none"/></spine></package>'
    )
    container = (
        '<?xml version="1.0"?><container xmlns="urn:oasis:names:tc:opendocument:xmlns:container" version="1.0">'
        '<rootfiles><rootfile full-path="OEBPS/book.opf" media-type="application/oebps-package+xml"/></rootfiles>'
        "</container>"
    )
    page = (
        '<?xml version="1.0" encoding="utf-8"?><html xmlns="http://www.w3.org/1999/xhtml">'
        "<head><title>t</title></head><body><h1>{0}</h1><p>{1}</p></body></html>"
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mimetype", "application/epub+zip")
        archive.writestr("OEBPS/two.xhtml", page.format("Chapter 2", "The whale."))
        archive.writestr("OEBPS/one page.xhtml", page.format("Chapter 1", "Call me Ishmaël."))
        archive.writestr("OEBPS/book.opf", package)
        archive.writestr("META-INF/container.xml", container)
    return path
