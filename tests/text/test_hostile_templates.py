"""Templates written to harm: each must end in an error, soon, in little memory, in any thread, with the process intact."""
# ruff: noqa: E501  (templates read best on one line)

from __future__ import annotations

import resource
import threading
import time

import pytest

from octavo.core.errors import InvalidRequestError, ModelFormatError
from octavo.text.chat_template import ChatTemplate

MESSAGES = [{"role": "user", "content": "hi"}]

ENDLESS = [
    "{% for i in range(10**12) %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% if a == b == 5 %}{% endif %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% continue %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f(n) %}{% if n %}{% set x = f(n - 1) %}{% set x = f(n - 1) %}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ caller() }}{% endmacro %}{% call f() %}{% call f() %}{{ f() }}{% endcall %}{% endcall %}",
    "{{ range(0, 99999 * (2**61 - 1), 2**61 - 1) | unique | list | length }}",
    "{% set ns = namespace() %}{% set ns.x = ns %}{% for i in range(99999) %}{% for j in range(99999) %}{{ ns }}{% endfor %}{% endfor %}",
]
TOO_LARGE = [
    "{{ 'x' * 10**10 }}",
    "{{ 10**10 * 'x' }}",
    "{{ (1,) * 10**9 }}",
    "{{ [[1] * 10**4] * 10**5 }}",
    "{% set x = 'x' * 10**6 %}{{ [x] * 10**6 | int }}",
    "{{ 10 ** (10**8) }}",
    "{{ 2 ** (10**9) % 7 }}",
    "{% set ns = namespace(n=3) %}{% for i in range(64) %}{% set ns.n = ns.n * ns.n %}{% endfor %}{{ ns.n > 0 }}",
    "{% set ns = namespace(s='x') %}{% for i in range(64) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(s='x') %}{% for i in range(64) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% set ns = namespace(s='x') %}{% for i in range(64) %}{% set ns.s = [ns.s, ns.s] | join %}{% endfor %}",
    "{% set ns = namespace(s='x') %}{% for i in range(64) %}{% set ns.s = '%s%s' % (ns.s, ns.s) %}{% endfor %}",
    "{% set ns = namespace(s='x') %}{% for i in range(64) %}{% set ns.s = '{0}{0}'.format(ns.s) %}{% endfor %}",
    "{% set ns = namespace(s='x') %}{% for i in range(64) %}{% set ns.s = '%s%s' | format(ns.s, ns.s) %}{% endfor %}",
    "{% set ns = namespace(s='x') %}{% for i in range(64) %}{% set ns.s = ns.s.replace('x', 'xx') %}{% endfor %}",
    "{% set ns = namespace(s='x') %}{% for i in range(64) %}{% set ns.s = ns.s | replace('x', 'xx') %}{% endfor %}",
    "{% set ns = namespace(s='x') %}{% for i in range(64) %}{% set b %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = b %}{% endfor %}",
    "{% macro d(x) %}{{ x }}{{ x }}{% endmacro %}{% set ns = namespace(s='x') %}"
    "{% for i in range(64) %}{% set ns.s = d(ns.s) %}{% endfor %}",
    # lists that share their parts: small, but their text is not
    "{% set ns = namespace(l=[1]) %}{% for i in range(64) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
    "{% set ns = namespace(l=[1]) %}{% for i in range(64) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l | tojson }}",
    "{% set ns = namespace(l=[1]) %}{% for i in range(64) %}{% set ns.l = (ns.l, ns.l) %}{% endfor %}{{ ns.l == 1 }}",
    "{% set ns = namespace(l=1) %}{% for i in range(64) %}{% set ns.l = {'a': ns.l, 'b': ns.l} %}{% endfor %}{{ ns.l | string }}",
    "{% set ns = namespace(l=1) %}{% for i in range(64) %}{% set ns.l = dict(a=ns.l, b=ns.l) %}{% endfor %}{{ ns.l }}",
    "{% set ns = namespace(l=[1]) %}{% for i in range(64) %}{% set ns.l = ns.l + ns.l %}{% endfor %}",
    "{% set ns = namespace(l=[1]) %}{% for i in range(64) %}{% set ns.l = [ns.l] | map('list') | list * 2 %}{% endfor %}",
    # padding and formatting
    "{{ 'x'.center(10**10) }}",
    "{{ 'x'.ljust(10**9) }}",
    "{{ 'x'.zfill(10**9) }}",
    "{{ ('\\t' * 10**5).expandtabs(10**6) }}",
    "{{ 'x' | center(10**10) }}",
    "{{ 'x' | center(width=10**10) }}",
    "{{ 'x' | indent(10**10, true) }}",
    "{{ ('x\\n' * 10**5) | indent(10**5) }}",
    "{{ ('x\\n' * 10**5) | indent('y' * 10**5) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ '%.1000000000f' % 1 }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{w}}'.format(1, w=10**9) }}",
    "{{ '{0:>9999}' * 10**5 | int }}{{ ('{0:>9999}' * 10**5).format(1) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ (1).to_bytes(10**10, 'big') }}",
    "{{ [1] | batch(10**10, 'x') | list }}",
    "{{ [1] | slice(10**10) | list }}",
    "{{ 1 | round(10**9, 'floor') }}",
    "{{ {'a': 1} | tojson(indent=10**9) }}",
    "{{ ('x' * 10**6) | map('center', 10**6) | list | length }}",
    "{{ ('x' * 10**6).join(('y' * 10**6) | list) }}",
    "{{ ('a' * 10**6).replace('a', 'b' * 10**6) }}",
    "{{ ('a' * 10**6).replace('', 'b' * 10**6) }}",
    "{{ ('a' * 3 * 10**6).rfind('b' + 'a' * 10**6) }}",
    "{{ ('a' * 3 * 10**6).strip('b' * 10**6 + 'a') }}",
    "{{ ('a' * 3 * 10**6) | trim('b' * 10**6 + 'a') }}",
    "{{ strftime_now('%c' * 10**6) }}",
    "{% for i in range(99999) %}" + "text " * 10_000 + "{% endfor %}",
    "{% set x %}{% for i in range(99999) %}" + "text " * 10_000 + "{% endfor %}{% endset %}",
    "{% set x = 'x' * 10**6 %}{% for i in range(99999) %}{{ x }}{% endfor %}",
    "{% set x = 'x' * 10**6 %}{% set y %}{% for i in range(99999) %}{{ x }}{% endfor %}{% endset %}",
    "{% set x = 'x' * 4000000 %}{% macro m() %}" + "{{ x }}" * 10_000 + "{% endmacro %}{{ m() | length }}",
]
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}{{ messages.__class__.__base__.__subclasses__()[0] }}",
    "{{ raise_exception.__globals__['os'].system('true') }}",
    "{{ namespace.__init__.__globals__['__builtins__'] }}",
    "{{ (messages | attr('__class__')).__mro__ }}",
    "{{ '{0.__class__.__mro__}'.format(messages).x() }}",
    "{{ '{0.__class__}'.format_map({'0': messages}).x() }}",
    "{{ self.__init__.__globals__.x }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ strftime_now.__closure__[0] }}",
    "{{ environment.filters }}{{ context.environment.x() }}",
    "{% set _ = messages.append(1) %}",
    "{% set _ = messages[0].update({'x': 1}) %}",
    "{% set _ = messages[0].pop('role') %}",
    "{% set messages.x = 1 %}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns.__class__.x() }}",
    "{% import 'os' as os %}{{ os.system('id') }}",
    "{% extends '/etc/passwd' %}",
    "{{ lipsum(n=10**6) }}",
    "{{ 'abc'.translate({97: 'x' * 10**6}) }}",
]


def _refused(source: str, time_limit: float) -> str:
    with pytest.raises((InvalidRequestError, ModelFormatError)) as caught:
        ChatTemplate(source, time_limit=time_limit).render(MESSAGES)
    assert caught.value.field in ("messages", "chat_template")
    return str(caught.value)


@pytest.mark.parametrize("source", ENDLESS)
def test_endless(source: str) -> None:
    """In a thread that is not the main one: signals could not help there."""
    outcome: list[str] = []
    thread = threading.Thread(target=lambda: outcome.append(_refused(source, time_limit=0.1)))
    thread.start()
    thread.join(60)
    assert not thread.is_alive() and outcome


@pytest.mark.parametrize("source", TOO_LARGE)
def test_too_large(source: str) -> None:
    """Memory is watched: the limit of time alone would let gigabytes through."""
    before = _peak_bytes()
    _refused(source, time_limit=5)
    assert _peak_bytes() - before < 400 << 20


def _peak_bytes() -> int:
    """The most memory this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("source", ESCAPES)
def test_escapes(source: str) -> None:
    _refused(source, time_limit=5)
    assert MESSAGES == [{"role": "user", "content": "hi"}]


def test_time_limit_is_reported() -> None:
    source = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    assert "more than 0.2 s" in _refused(source, time_limit=0.2)


@pytest.mark.slow
def test_time_limit_is_five_seconds() -> None:
    started = time.perf_counter()
    with pytest.raises(InvalidRequestError, match="more than 5 s"):
        ChatTemplate("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}").render(MESSAGES)
    assert time.perf_counter() - started >= 5


def test_a_template_works_again_after_it_was_stopped() -> None:
    template = ChatTemplate("{% for a in range(n) %}{% for b in range(n) %}{% endfor %}{% endfor %}ok", time_limit=0.3)
    with pytest.raises(InvalidRequestError):
        template.render(MESSAGES, n=99_999)
    template._time_limit = 60.0
    assert template.render(MESSAGES, n=3) == "ok"


@pytest.mark.parametrize(
    "source",
    [
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
        "{% for a in [1] %}" * 60 + "{% endfor %}" * 60,
        "{{ " + "-" * 20000 + "1 }}",
        "{{ 1" + " + 1" * 20000 + " }}",
        "{{ x" + ".y" * 20000 + " }}",
        "x" * (2 << 20),
        "{{ 'x' | center(1000000000) }}",
        "{{ 'aaaaaaaa' | replace('a', 'bbbbbbbbbb')" + " | replace('b', 'bbbbbbbbbb')" * 30 + " }}",
    ],
)
def test_sources_that_harm_the_compiler(source: str) -> None:
    """Constants are computed when a template is compiled, and nesting could overflow the stack."""
    _refused(source, time_limit=1)
