"""A Jinja environment for chat templates that cannot run away.

Templates come with models and are not trusted. Jinja's immutable sandbox keeps them from reaching Python's internals;
here they are also held to a deadline and to bounded memory, in the calling thread, so that it works anywhere and
nothing has to be killed:

- Every loop iteration, call, filter, arithmetic operation and output looks at the clock.
- What makes large values out of small ones (``*``, ``**``, ``%``, padding, ``replace``, ``join``, formatting) is
  checked before it runs, because one such operation may not return for hours.
- Every value made is weighed. A value inside another counts each time it occurs, so lists that share their parts,
  whose text would be exponential, are caught when they are built.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from functools import wraps
from typing import Any

from jinja2 import ext, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Namespace

_ITEM = 16  # weight of a list entry or an object; a character weighs 1
_MAX_BITS = 1 << 16  # of an integer
_MAX_PADDING = 1 << 20  # characters
# Not needed by chat templates; slow on long text, or producers of text out of nothing.
_DROPPED_FILTERS = ("filesizeformat", "pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")


class LimitExceededError(Exception):
    """A template used more time or memory than it may. Not a Jinja error, so nothing in Jinja handles it."""


class Budget:
    """Time and memory of one rendering."""

    def __init__(self, seconds: float, value_limit: int, total_limit: int) -> None:
        """`value_limit` is the weight of one value, `total_limit` that of all together; characters, 16 a list entry."""
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self.value_limit = value_limit
        self._left = total_limit

    def tick(self) -> None:
        if time.monotonic() > self._deadline:
            raise LimitExceededError(f"it took more than {self._seconds:g} s")

    def charge(self, weight: int) -> None:
        """Account for memory about to be used, or just used."""
        self._left -= weight
        if weight > self.value_limit or self._left < 0:
            raise LimitExceededError("it made too much text")

    def foresee(self, weight: int) -> None:
        """Refuse an operation whose result would be too large."""
        if weight > self.value_limit:
            raise LimitExceededError("it made too much text")

    def weigh(self, value: Any) -> int:
        """The weight of `value`, every occurrence of a part counted. Stops early at the limit."""
        if isinstance(value, str):
            return _ITEM + len(value)
        total = 0
        waiting = [value]
        while waiting:
            part = waiting.pop()
            total += _ITEM
            if isinstance(part, (str, bytes)):
                total += len(part)
            elif isinstance(part, int):
                total += part.bit_length() >> 3
            elif isinstance(part, (list, tuple, set, frozenset)):
                if total + _ITEM * len(part) > self.value_limit:
                    self.foresee(self.value_limit + 1)
                waiting.extend(part)
            elif isinstance(part, Mapping):
                waiting.extend(part.keys())
                waiting.extend(part.values())
            if total > self.value_limit:
                self.foresee(total)
        return total

    def guard(self, value: Any) -> Any:
        """Check the clock, weigh `value`, and hand it on."""
        self.tick()
        self.charge(self.weigh(value))
        return value


class _Generator(CodeGenerator):
    """Puts checks into the code of a template where no method of the environment is called."""

    def _guarded(self, method: Callable, node: nodes.Node, frame: Frame) -> None:
        self.write("environment.guard(")
        method(node, frame)
        self.write(")")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:  # noqa: N802
        self._guarded(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802
        self._guarded(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:  # noqa: N802
        if node.ctx == "load":
            self._guarded(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.write("environment.concat_values((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_For(self, node: nodes.For, frame: Frame) -> None:  # noqa: N802
        text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        steps = nodes.EnvironmentAttribute("each")
        node.iter = nodes.Call(steps, [node.iter, nodes.Const(text)], [], None, None).set_lineno(node.lineno)
        super().visit_For(node, frame)


class _Generation(ext.Extension):
    """``{% generation %}…{% endgeneration %}``, which marks the assistant's part for training: here its contents."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _TemplateNamespace(Namespace):
    """`namespace()`, whose text does not show its contents: those may hold the namespace itself."""

    def __repr__(self) -> str:
        return "<Namespace>"


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """The environment of one chat template, set up as that of transformers, with limits. One may render in several
    threads.
    """

    code_generator_class = _Generator
    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self, now: Callable[[], datetime]) -> None:
        self._local = threading.local()
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, ext.loopcontrols],
            finalize=self.guard_output,
            cache_size=0,
        )
        self.filters["tojson"] = self._to_json
        for name in _DROPPED_FILTERS:
            self.filters.pop(name, None)
        for name, function in self.filters.items():
            self.filters[name] = self._checked_filter(name, function)
        self.globals.pop("lipsum", None)
        self.globals["namespace"] = _TemplateNamespace
        self.globals["range"] = _range
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda format: now().strftime(_short(format))  # noqa: A006

    # -- the budget ---------------------------------------------------------------------------------------------------

    @property
    def budget(self) -> Budget:
        return self._local.budget

    @budget.setter
    def budget(self, budget: Budget) -> None:
        self._local.budget = budget

    def guard(self, value: Any) -> Any:
        return self.budget.guard(value)

    def guard_output(self, value: Any) -> Any:
        return self.budget.guard(value)

    def each(self, values: Any, text: int) -> Iterator[Any]:
        """`values`, checking before each that there is time and room for the `text` characters of the loop's body."""
        budget = self.budget
        for value in values:
            budget.tick()
            budget.charge(text + 1)
            yield value

    def concat_values(self, parts: tuple) -> str:
        """The ``~`` operator."""
        self.budget.foresee(sum(map(self.budget.weigh, parts)))
        return self.guard("".join(map(str, parts)))

    # -- operations ---------------------------------------------------------------------------------------------------

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.budget.tick()
        args = self._check_method(function, args, kwargs)
        return self.guard(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        budget = self.budget
        budget.tick()
        if operator == "*":
            _check_product(budget, left, right)
        elif operator == "**":
            _check_power(left, right)
        elif operator == "%" and isinstance(left, (str, bytes)):
            _check_format(budget, left, "%", right)
        return self.guard(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` in the sandbox; the checks come on top of Jinja's."""
        inner = super().wrap_str_format(value)
        if inner is None:
            return None
        template = value.__self__

        def formatted(*args: Any, **kwargs: Any) -> str:
            _check_format(self.budget, template, "{", [args, kwargs])
            return inner(*args, **kwargs)

        return formatted

    def _check_method(self, function: Any, args: tuple, kwargs: dict) -> tuple:
        """Check a call of a method of a built-in type; arguments that can be read once only are made into lists."""
        owner = getattr(function, "__self__", None)
        name = getattr(function, "__name__", "")
        given = [*args, *kwargs.values()]
        if isinstance(owner, (str, bytes)):
            if name in ("translate", "maketrans"):
                raise SecurityError(f"{name} is not available in chat templates")
            if name == "join" and args:
                args = (list(args[0]), *args[1:])
                self.budget.foresee(len(args[0]) * len(owner) + self.budget.weigh(args[0]))
            elif name == "replace" and len(given) >= 2:
                self.budget.foresee(_replaced_length(owner, given[0], given[1]))
            elif name in ("center", "ljust", "rjust", "zfill"):
                _check_padding(given)
            elif name == "expandtabs":
                _check_padding(given)
                self.budget.foresee(len(owner) * max((n for n in given if isinstance(n, int)), default=8))
            elif name in ("rfind", "rindex", "rsplit", "rpartition", "strip", "lstrip", "rstrip"):
                _check_search(owner, given)
        elif isinstance(owner, int) and name == "to_bytes":
            _check_padding(given)
        return args

    def _checked_filter(self, name: str, function: Callable) -> Callable:
        """`function` with the clock looked at, arguments checked and the result weighed."""
        skipped = 1 if hasattr(function, "jinja_pass_arg") else 0  # a context or environment comes before the value

        @wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            budget = self.budget
            budget.tick()
            value: Any = args[skipped] if len(args) > skipped else None
            given = [*args[skipped + 1 :], *kwargs.values()]
            if name == "join":
                value = list(value)
                budget.foresee(budget.weigh(value) + len(value) * sum(len(d) for d in given[:1] if isinstance(d, str)))
                args = (*args[:skipped], value, *args[skipped + 1 :])
            elif name == "replace" and len(given) >= 2:
                budget.foresee(_replaced_length(str(value), str(given[0]), str(given[1])))
            elif name == "format":
                _check_format(budget, str(value), "%", given)
            elif name == "indent":
                width = given[0] if given else 4
                size = len(width) if isinstance(width, str) else int(width)
                budget.foresee(size * (str(value).count("\n") + 1))
            elif name == "trim":
                _check_search(str(value), given)
            elif name in ("center", "batch", "slice", "truncate", "tojson", "round"):
                _check_padding(given, limit=100 if name in ("tojson", "round") else _MAX_PADDING)
            return self.guard(function(*args, **kwargs))

        return checked

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON as transformers writes it: no escapes for HTML."""
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        pieces = []
        for piece in encoder.iterencode(value):
            self.budget.tick()
            self.budget.charge(len(piece))
            pieces.append(piece)
        return "".join(pieces)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _range(*args: int) -> range:
    """As the sandbox has it, at most 100,000 long. Integers of any size might be chosen to have the same hash."""
    if any(isinstance(number, int) and abs(number) > 1 << 53 for number in args):
        raise LimitExceededError("it used a range of too large numbers")
    return safe_range(*args)


def _short(text: str) -> str:
    if not isinstance(text, str) or len(text) > 1000:
        raise TemplateError("strftime_now needs a format of at most 1,000 characters")
    return text


def _check_padding(given: list, limit: int = _MAX_PADDING) -> None:
    if any(isinstance(number, int) and abs(number) > limit for number in given):
        raise LimitExceededError(f"it asked for a width above {limit}")


def _check_product(budget: Budget, left: Any, right: Any) -> None:
    for value, times in ((left, right), (right, left)):
        if isinstance(value, (str, bytes, list, tuple)) and isinstance(times, int):
            budget.foresee((budget.weigh(value) - _ITEM) * max(times, 0))
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > _MAX_BITS:
        raise LimitExceededError("it made too large a number")


def _check_power(base: Any, exponent: Any) -> None:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * abs(exponent) > _MAX_BITS:
        raise LimitExceededError("it made too large a number")


def _check_search(text: Any, given: list) -> None:
    """Searching from the right, and stripping, may take time in the product of the two lengths."""
    if any(isinstance(part, (str, bytes)) and len(part) * len(text) > 1 << 28 for part in given):
        raise LimitExceededError("it searched too long a text")


def _replaced_length(text: Any, old: Any, new: Any) -> int:
    if not isinstance(old, type(text)) or not isinstance(new, type(text)):
        return 0  # refused by `replace` itself
    return len(text) + text.count(old) * len(new)


def _check_format(budget: Budget, template: Any, mark: str, arguments: Any) -> None:
    """Formatting repeats an argument for every mark, and pads to widths given in the template or by an argument."""
    text = template.decode("latin-1") if isinstance(template, bytes) else str(template)
    nested = r"%[^a-zA-Z%]*\*" if mark == "%" else r"\{[^{}]*\{"
    if re.search(r"[0-9]{5}", text) or re.search(nested, text):
        raise LimitExceededError("it used a format with a width that is too large or not constant")
    budget.foresee(
        len(text) + text.count(mark) * (budget.weigh(arguments) + 10_000 * bool(re.search("[0-9]{4}", text)))
    )
