"""Every error Octavo raises on purpose.

An error names the field, file or option at fault and says what is allowed, so that a front door can print it as it is:
the command line exits with code 2, the server answers 4xx. Anything else that escapes is a bug.
"""

from __future__ import annotations

import reprlib


class OctavoError(Exception):
    """Base of all deliberate errors."""


class ConfigError(OctavoError, ValueError):
    """An engine setting is unknown, has a wrong type, or is outside its range."""

    def __init__(self, message: str) -> None:
        super().__init__(shortened(message))


class InvalidRequestError(OctavoError, ValueError):
    """A request is malformed. `field` names the parameter at fault (for example ``"temperature"``)."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(shortened(f"{field}: {message}"))
        self.field = field
        self.problem = message


class ModelNotFoundError(OctavoError, FileNotFoundError):
    """A model name, alias or path leads to nothing that can be loaded."""

    def __init__(self, message: str) -> None:
        super().__init__(shortened(message))

    def __str__(self) -> str:  # FileNotFoundError would print errno fields.
        return str(self.args[0]) if self.args else ""


class ModelFormatError(OctavoError, ValueError):
    """A model file is malformed, truncated, hostile or of an unsupported kind.

    `path` is the file, `field` the part of it at fault (a header field, metadata key or tensor name).
    """

    def __init__(self, path: object, field: str, message: str) -> None:
        super().__init__(shortened(f"{path}: {field}: {message}"))
        self.path = str(path)
        self.field = field
        self.problem = message


class UnsupportedModelError(OctavoError, ValueError):
    """The architecture, or a feature of it, is not implemented. The message lists what is."""

    def __init__(self, message: str) -> None:
        super().__init__(shortened(message))


class DownloadError(OctavoError, RuntimeError):
    """A model could not be fetched: no network, no such package, or a checksum that does not match."""


class OutOfMemoryError(OctavoError, MemoryError):
    """What was asked for can never fit. The message holds the arithmetic."""


class RequestFailedError(OctavoError, RuntimeError):
    """A request failed inside the engine; the others of its batch did not."""


class EngineClosedError(OctavoError, RuntimeError):
    """The engine was shut down, or died, before the request ended."""


def shortened(message: str) -> str:
    """What files and requests hold may be of any length, and errors go to logs and terminals. Who is at fault stands at
    the beginning, what is allowed at the end."""
    return message if len(message) <= 1000 else f"{message[:600]} ... {message[-395:]}"


_short = reprlib.Repr()  # a value whose parts are shared may be small, and its text endless
_short.maxlevel = 3
_short.maxstring = _short.maxother = _short.maxlong = 80
_short.maxlist = _short.maxtuple = _short.maxdict = _short.maxset = 20


def shown(value: object) -> str:
    """A value for an error message: its repr, cut to a length that does not flood a log."""
    try:
        text = _short.repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = "an integer of very many digits" if isinstance(value, int) else type(value).__name__
    except Exception:  # of a class of the caller's
        text = type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."
