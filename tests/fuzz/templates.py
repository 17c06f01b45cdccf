"""Random chat templates, from a grammar: each is written or refused, within its limits, and leaves the next alone."""

from __future__ import annotations

import random

from octavo.core.errors import InvalidRequestError, ModelFormatError
from octavo.text.chat_template import ChatTemplate

_MESSAGES = [
    {"role": "system", "content": "Be <terse>."},
    {"role": "user", "content": "Wie spät? 😀"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": [1, None]}}}]},
]
_NAMES = [
    "messages",
    "m",
    "x",
    "ns.v",
    "loop.index",
    "loop.last",
    "tools",
    "bos_token",
    "missing",
    "messages[0].content",
]
_NUMBERS = ["0", "1", "-1", "2.5", "64", "99999", "10**6", "10**18", "2**63", "1e308"]
_TEXTS = ["''", "'a'", "'ab' * 1000", "'{0}'", "'%s'", "'\\n'", "'ä😀'", "'%1000000d'", "'{:>99999}'"]
_FILTERS = """length list join tojson trim upper string int float first last sort unique reverse sum abs items batch(2)
slice(3) groupby('role') map(attribute='role') selectattr('role') select('odd') replace('a','bb') indent(2) center(9)
default('x') dictsort round truncate(3) wordcount escape urlize striptags attr('x') max min tojson(indent=2)""".split()
_METHODS = """strip() split() split('a') upper() items() keys() get('role') replace('a','aaaa') join(messages) format(x)
startswith('a') zfill(99) encode() count('a') title() append(1) update({}) __class__ mro()""".split()
_TESTS = ["defined", "none", "string", "mapping", "iterable", "odd", "number", "divisibleby 3", "in messages", "true"]
_OPERATORS = ["+", "-", "*", "/", "//", "%", "**", "~", "==", "<", "in", "and", "or", "not in"]


def expression(rng: random.Random, depth: int) -> str:
    inner = lambda: expression(rng, depth - 1)  # noqa: E731
    if depth <= 0 or rng.random() < 0.2:
        return rng.choice(rng.choice([_NAMES, _NUMBERS, _TEXTS]))
    return rng.choice(
        [
            lambda: f"({inner()} {rng.choice(_OPERATORS)} {inner()})",
            lambda: f"({inner()}) | {rng.choice(_FILTERS)}",
            lambda: f"({inner()}).{rng.choice(_METHODS)}",
            lambda: f"({inner()}) is {rng.choice(_TESTS)}",
            lambda: f"({inner()} if {inner()} else {inner()})",
            lambda: f"[{inner()}, {inner()}]",
            lambda: "{" + f"'k': {inner()}, 'role': {inner()}" + "}",
            lambda: f"({inner()})[{inner()}:{inner()}]",
            lambda: f"range({inner()})",
            lambda: f"f({inner()})",
            lambda: f"-({inner()})",
        ]
    )()


def block(rng: random.Random, depth: int) -> str:
    value = lambda: expression(rng, 3)  # noqa: E731
    body = lambda: "".join(block(rng, depth - 1) for _ in range(rng.randint(1, 3))) if depth > 0 else "t"  # noqa: E731
    dash, end = rng.choice(["", "-"]), rng.choice(["", "-"])
    tag = lambda text: f"{{%{dash} {text} {end}%}}"  # noqa: E731
    return rng.choice(
        [
            lambda: f"{{{{{dash} {value()} {end}}}}}",
            lambda: " text\n",
            lambda: tag(f"for m in {value()}") + body() + "{% endfor %}",
            lambda: tag("for m in messages") + body() + tag("if loop.last") + "{% break %}{% endif %}{% endfor %}",
            lambda: tag("for i in range(99999)") + body() + "{% endfor %}",
            lambda: tag(f"if {value()}") + body() + "{% else %}" + body() + "{% endif %}",
            lambda: tag(f"set x = {value()}"),
            lambda: tag(f"set ns.v = {value()}"),
            lambda: tag("set x") + body() + "{% endset %}",
            lambda: tag("macro f(x)") + body() + "{% endmacro %}",
            lambda: tag("filter upper") + body() + "{% endfilter %}",
            lambda: tag("generation") + body() + "{% endgeneration %}",
            lambda: tag(f"with x = {value()}") + body() + "{% endwith %}",
            lambda: (
                rng.choice(["{% raw %}{{{% endraw %}", "{# c #}", "{%", "}}", "{{", "{% endif %}"]) if depth else ""
            ),
        ]
    )()


def make(rng: random.Random) -> bytes:
    source = "{% set ns = namespace(v=messages) %}" + "".join(block(rng, 3) for _ in range(rng.randint(1, 6)))
    return source.encode()


def check(data: bytes) -> None:
    source = data.decode("utf-8", "replace")
    try:
        text = ChatTemplate(source, time_limit=0.3, bos_token="<s>").render(_MESSAGES)
        assert len(text) <= 5 << 20
    except (InvalidRequestError, ModelFormatError) as error:
        assert error.field in ("messages", "chat_template"), error
