"""Real wheels of a few bytes, an index that serves them, and a child process that knows their alias."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from octavo.hub.aliases import Alias, WheelPart

SOURCE = Path(__file__).parents[2] / "src"

# Registers the alias given as JSON, then is the octavo program.
_CHILD = """
import json, sys
from octavo.hub.aliases import ALIASES, Alias, WheelPart
fields = json.loads(sys.argv[1])
fields["parts"] = tuple(WheelPart(**part) for part in fields["parts"])
ALIASES[fields["name"]] = Alias(**fields)
from octavo.cli.main import main
sys.exit(main(sys.argv[2:]))
"""


def content(num_bytes: int, seed: int = 0) -> bytes:
    """Bytes that do not compress, beginning as a GGUF file does."""
    return b"GGUF" + random.Random(seed).randbytes(num_bytes - 4)


def make_wheel(folder: Path, name: str, members: Mapping[str, bytes], version: str = "1.0") -> Path:
    """Write a valid wheel with these members into `folder`."""
    stem = f"{name.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    files = {
        **members,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = [
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip('=')},{len(data)}"
        for path, data in files.items()
    ]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""]).encode()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, data in files.items():
            archive.writestr(member, data)
    return path


def make_alias(folder: Path, parts: list[bytes], name: str = "tiny-test") -> Alias:
    """Write one wheel for each of `parts` into `folder`; the alias that joins them."""
    made = []
    for number, data in enumerate(parts):
        member = f"data/model.gguf.part{number:02d}"
        wheel = make_wheel(folder, f"{name}-part{number}", {member: data})
        made.append(
            WheelPart(
                requirement=f"{name}-part{number}==1.0",
                member=member,
                num_bytes=len(data),
                sha256=hashlib.sha256(data).hexdigest(),
                wheel_bytes=wheel.stat().st_size,
            )
        )
    return Alias(
        name=name,
        file="tiny.gguf",
        sha256=hashlib.sha256(b"".join(parts)).hexdigest(),
        parts=tuple(made),
        description="a model for tests",
        licence="Test Terms",
    )


def start_octavo(alias: Alias, *arguments: str, python: str = sys.executable, **popen: object) -> subprocess.Popen[str]:
    """The octavo program as a child process, with `alias` registered. stdout and stderr are pipes unless given."""
    options: dict = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = {**os.environ, "PYTHONPATH": str(SOURCE)}
    told = json.dumps(alias._asdict() | {"parts": [part._asdict() for part in alias.parts]})
    return subprocess.Popen([python, "-c", _CHILD, told, *arguments], env=env, **(options | popen))


def run_octavo(alias: Alias, *arguments: str, **popen: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `start_octavo`."""
    process = start_octavo(alias, *arguments, **popen)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


class Index:
    """A package index over HTTP ("simple" API). `hold` delays one wheel until `release`; `served` counts downloads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.served: list[str] = []  # wheel names, in the order their downloads began
        self.held: str | None = None  # begin of the name of the wheel to delay
        self.reached = threading.Event()  # set when the held wheel is asked for
        self.release = threading.Event()
        self.url = ""

    def hold(self, name: str) -> None:
        """Delay the second half of the wheel whose file name begins with `name`."""
        self.held = name

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Serve one request."""
        parts = [part for part in request.path.split("/") if part]
        if parts[0] == "simple":
            project = parts[1].replace("-", "_")
            names = [path.name for path in self.folder.glob(f"{project}-*.whl")]
            links = "".join(f'<a href="/wheels/{name}">{name}</a>' for name in names)
            _send(request, 200 if names else 404, f"<html><body>{links}</body></html>".encode(), "text/html")
            return
        name = parts[1]
        data = (self.folder / name).read_bytes()
        self.served.append(name)
        request.send_response(200)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        held = self.held is not None and name.startswith(self.held)
        for start in range(0, len(data), 1 << 18):
            if held and start >= len(data) // 2:
                self.reached.set()
                self.release.wait(60)
                held = False
            request.wfile.write(data[start : start + (1 << 18)])
            request.wfile.flush()


def _send(request: BaseHTTPRequestHandler, status: int, body: bytes, kind: str) -> None:
    request.send_response(status)
    request.send_header("Content-Type", kind)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, index: Index, *args: object) -> None:
        self.index = index
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # A killed child is what some tests are about.
            self.index.answer(self)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serve(index: Index) -> Iterator[Index]:
    """Run `index` on a free port of this machine; sets its `url`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, index))  # type: ignore[arg-type]
    server.daemon_threads = True
    index.url = f"http://127.0.0.1:{server.server_port}/simple/"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield index
    finally:
        index.release.set()
        server.shutdown()
        server.server_close()
        thread.join()
