"""The process that chat templates run in: see `octavo.text.template_process`, which starts this file as a script.

Templates come with models and are not trusted. Jinja's immutable sandbox keeps them from Python's internals, and the
system holds this process to bounds that no template can talk its way out of: processor time by a timer whose signal
ends the process, memory by a limit after which allocations fail, no files to write and no processes to start.
Nothing of Octavo is imported here, so that it starts soon.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import time
from datetime import datetime
from functools import lru_cache
from typing import Any

KEPT_TEMPLATES = 8  # compiled
_PAGE = resource.getpagesize()


def main() -> None:
    """Answer requests from stdin until it ends: each a length in 8 bytes and an object in JSON, as are the replies."""
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    _give_up_rights()
    get_environment()
    least = _address_space()
    while len(header := requests.read(8)) == 8:
        size = int.from_bytes(header, "little")
        data = requests.read(size)
        if len(data) < size:
            return
        begin = time.process_time()
        request = json.loads(data.decode("utf-8", "surrogatepass"))
        del data  # it may be long
        reply = answer(request)
        del request
        reply["used"] = time.process_time() - begin
        # What compiled templates hold is not to be missing for others.
        reply["last"] = reply.get("error") == "limit" or _address_space() > least + (128 << 20)
        text = json.dumps(reply, ensure_ascii=False).encode("utf-8", "surrogatepass")
        replies.write(len(text).to_bytes(8, "little") + text)
        replies.flush()
        if reply["last"]:
            return


def _give_up_rights() -> None:
    for kind, limit in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 16),
    ):
        resource.setrlimit(kind, (limit, limit))
    # A parent may have had other uses for it, which come with the start.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])


def _address_space() -> int:
    """Bytes of memory that this process has asked for."""
    try:
        with open("/proc/self/statm", "rb") as file:  # noqa: PTH123 # pathlib takes its time to load
            return int(file.read().split()[0]) * _PAGE
    except OSError:  # not mounted: far more than there is
        return 256 << 20


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The reply to one request, within its limits. The timer's signal ends the process."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = _address_space() + request["memory"]
    resource.setrlimit(resource.RLIMIT_AS, (most if hard < 0 else min(most, hard), hard))
    signal.setitimer(signal.ITIMER_PROF, max(request["seconds"], 0.001))  # 0 would mean none
    try:
        return _answer(request)
    except MemoryError:
        return {"error": "limit", "message": "it used too much memory"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    from jinja2.exceptions import TemplateError, TemplateSyntaxError

    try:
        template, asks_for_null = compiled(request["source"])
    except TemplateSyntaxError as error:
        return {"error": "syntax", "message": f"line {error.lineno}: {_text(error.message, 2000)}"}
    except MemoryError:
        raise
    except Exception as error:  # constant parts are computed here, and may fail in any way
        return {"error": "syntax", "message": _named(error)}
    if request["variables"] is None:
        return {"asks_for_null": asks_for_null}
    now = datetime.fromisoformat(request["now"])
    pieces, length = [], 0
    try:
        for piece in template.generate(request["variables"], strftime_now=now.strftime):
            length += len(piece)
            if length > request["characters"]:
                return {"error": "limit", "message": f"it wrote more than {request['characters']} characters"}
            pieces.append(piece)
        return {"text": "".join(pieces)}
    except TemplateError as error:
        return {"error": "refused", "message": _text(error.message, 2000)}
    except MemoryError:
        raise
    except Exception as error:  # whatever a template does wrong concerns this request only
        return {"error": "failed", "message": _named(error)}


def _text(message: Any, most: int) -> str:
    """A template may give `raise_exception` anything, such as a list in ten thousand others, which has no text."""
    try:
        return str(message)[:most]
    except RecursionError:
        return type(message).__name__


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {_text(error, 500)}"


@lru_cache(maxsize=KEPT_TEMPLATES)
def compiled(source: str) -> tuple[Any, bool]:
    """The template, and whether it asks for null: see `_asks_for_null`. Raises whatever Jinja raises."""
    environment = get_environment()
    return environment.from_string(source), _asks_for_null(environment.parse(source))


@lru_cache(maxsize=1)
def get_environment() -> Any:
    """Jinja set up as transformers does for chat templates."""
    from jinja2 import ext, nodes
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """``{% generation %}…{% endgeneration %}`` marks the assistant's part for training: here its contents."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols], cache_size=0
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    return environment


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers writes it: no escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _asks_for_null(tree: Any) -> bool:
    """Whether a template tests that some ``content`` is none."""
    from jinja2 import nodes

    for test in tree.find_all(nodes.Test):
        asked = test.node
        named = isinstance(asked, nodes.Getattr) and asked.attr == "content"
        keyed = isinstance(asked, nodes.Getitem) and asked.arg == nodes.Const("content")
        if test.name == "none" and (named or keyed):
            return True
    return False


if __name__ == "__main__":
    sys.path[:] = sys.argv[1:]
    main()
