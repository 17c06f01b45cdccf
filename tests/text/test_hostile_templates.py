"""Templates written to harm: each must end, in an error or a short text, in any thread, and leave the next one its room."""
# ruff: noqa: E501  (templates read best on one line)

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from octavo.core.errors import InvalidRequestError, ModelFormatError
from octavo.text.chat_template import DEFAULT_TIME_LIMIT, MAX_ROLE, MAX_ROLES, MAX_SOURCE, ChatTemplate
from octavo.text.named_templates import NamedTemplates
from octavo.text.template_process import guests
from octavo.text.template_worker import get_environment

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
]


# What cannot be interrupted in Python, or grows before it can be weighed.
_LIST = "{% set ns = namespace(l=[1]) %}{% for i in range(%d) %}"
UNINTERRUPTIBLE = [
    "{% set x = messages | length %}{{ ('x' * (1000000 * x)) | sort(attribute='0' ~ '.0' * (20000 * x)) | length }}",
    "{% set x = messages | length %}{{ ('x' * (3000000 * x)) | select('in', 'y' * (3000000 * x)) | list | length }}",
    "{% set x = messages | length %}{% set a = ('f' * (4000000 * x)) | int(0, 16) %}"
    "{% set b = ('e' * (2000000 * x)) | int(0, 16) %}{{ (a // b) > 0 }}",
    "{% set x = messages | length %}{% set a = ('f' * (4000000 * x)) | int(0, 16) %}{{ a | string | length }}",
    "{% set x = messages | length %}{{ ('9' * (3000000 * x)) | int | string | length }}{{ 3 ** (10**7 * x) % 7 }}",
    "{{ dict.fromkeys(range(0, 40000 * (2**61 - 1), 2**61 - 1)) | length }}{{ range(0, 99999 * (2**61 - 1), 2**61 - 1) | list | unique | list | length }}",
    "{{ ('中' * 4000000) | batch(1) | list | length }}",
    "{{ ('ab' * 10**6) | groupby('0') | list | length }}{{ ('ab' * 10**7) | groupby('0') | list | length }}",
    "{{ (range(99999) | list * 100) | sort(reverse=true) | map('string') | join | length }}",
    "{{ ('x ' * 10**7) | wordwrap(1) | length }}",
    "{{ ('a' * 10**6 + '<') * 20 | int }}{{ (('<' * 10**6) | striptags) | length }}",
    "{{ ('a,' * 10**7).split(',') | length }}{{ (('a,' * 10**7).split(',') * 10) | length }}",
    "{{ (['a' * 1000] * 10**5) | join('b' * 1000) | length }}",
    "{{ ('a' * 10**8).encode('utf-16').decode('latin-1') | length }}",
    "{{ messages | map('string') | list * 10**8 }}",
    "{{ 'a'.maketrans(('abc' * 10**7), ('def' * 10**7)) | length }}",
    "{{ 'a'.translate({97: 'x' * 10**9}) }}",
    "{{ lipsum(n=10**6) }}",
    "{{ (1.5 * 10**300) | int | string }}{{ (10 ** 4000) ** 4000 > 1 }}",
    "{{ range(99999) | map('center', 10**6) | list | length }}",
    "{{ range(99999) | sum(start='x' * 10**7) }}{{ range(99999) | map('string') | map('replace', '', 'x' * 10**5) | join | length }}",
    # nested and cyclic values: printing, comparing, hashing and sorting them
    _LIST.replace("%d", "99999") + "{% set ns.l = [ns.l] %}{% endfor %}{{ ns.l }}",
    _LIST.replace("%d", "99999") + "{% set ns.l = [ns.l] %}{% endfor %}{{ ns.l == [ns.l] }}{{ ns.l | tojson }}",
    _LIST.replace("%d", "99999") + "{% set ns.l = (ns.l,) %}{% endfor %}{{ {ns.l: 1} | length }}",
    _LIST.replace("%d", "64") + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l == ns.l[0] }}{{ ns.l | string }}",
    _LIST.replace("%d", "64") + "{% set ns.l = (ns.l, ns.l) %}{% endfor %}{{ {ns.l: 1} | length }}",
    _LIST.replace("%d", "64") + "{% set ns.l = (ns.l, ns.l) %}{% endfor %}{{ [ns.l, ns.l] | unique | list | string }}",
    "{% set ns = namespace() %}{% set ns.x = [ns, ns] %}{{ ns.x | tojson }}",
    "{% set ns = namespace(m=messages) %}{% for i in range(99999) %}{% set ns.m = ns.m | map('upper') %}{% endfor %}{{ ns.m | list }}",
    "{% set c = cycler(*range(99999)) %}{% for i in range(99999) %}{% set x = (c.items * 99) | length %}{% endfor %}{{ x / 0 }}",
    "{% macro m(n) %}{{ caller(n) if caller }}{% endmacro %}{% for i in range(99999) %}{% for j in range(99999) %}{% call(x) m(j) %}{{ x }}{% endcall %}{% endfor %}{% endfor %}",
    "{{ '%s' * 10**6 % ((1,) * 10**6) * 100 }}",
    "{{ ('{0}' * 10**6).format('x' * 10**5) | length }}",
    "{{ ('{0' + '.a' * 10**6 + '}').format('x') }}",
    "{{ 'x' | attr('y' * 10**9) }}",
    "{% filter indent(10**9) %}a\nb{% endfilter %}",
]
PERHAPS_SHORT = [
    "{{ ('http://a.b/' * 10**6) | urlize | length }}",
    "{{ ('a' * 10**7) | title | capitalize | upper | reverse | list | length }}",
]
# Sources whose parts are many, or nested.
HARD_TO_PARSE = {
    "expressions": "{{ x }}" * 140_000,
    "additions": "{{ " + "a+" * 200_000 + "a }}",
    "concatenations": "{{ " + "a~" * 60_000 + "a }}",
    "parentheses": "{{ " + "(" * 10**6 + ")" * 10**6 + " }}",
    "brackets": "{{ " + "[" * 60_000 + "]" * 60_000 + " }}",
    "braces": "{{ " + "{1:" * 30_000 + "1" + "}" * 30_000 + " }}",
    "ifs": "{% if 1 %}" * 10**6,
    "ifs that fit": "{% if 1 %}" * 5_000 + "{% endif %}" * 5_000,
    "elifs": "{% if 1 %}" + "{% elif 1 %}" * 9_000 + "{% endif %}",
    "fors": "{% for a in a %}" * 3_000 + "{% endfor %}" * 3_000,
    "macros": "{% macro m() %}" * 3_000 + "{% endmacro %}" * 3_000,
    "minuses": "{{ " + "-" * 100_000 + "1 }}",
    "nots": "{{ " + "not " * 30_000 + "1 }}",
    "attributes": "{{ x" + ".a" * 60_000 + " }}",
    "filters": "{{ x" + "|list" * 20_000 + " }}",
    "calls": "{{ x" + "()" * 60_000 + " }}",
    "items": "{{ x" + "[0]" * 40_000 + " }}",
    "ternaries": "{{ " + "1 if x else " * 10_000 + "1 }}",
    "comparisons": "{{ " + "x == " * 20_000 + "1 }}",
    "ands": "{{ " + "x and " * 20_000 + "1 }}",
    "powers": "{{ x" + "**x" * 40_000 + " }}",
    "tests": "{{ x" + " is odd" * 15_000 + " }}",
    "unclosed": "{{ f(" * 20_000,
    "comments": "{#" * 60_000,
    "backslashes": "{{ '" + "\\" * 60_000,
    "digits": "{{ " + "9" * 120_000 + " }}",
    "underscores": "{{ 1" + "_1" * 60_000 + " }}",
    "names": "{{ " + " ~ ".join(f"v{n}" for n in range(14_000)) + " }}",
    "constants": "{{ 'x' * 10**10 }}",
    "constant powers": "{{ 9 ** 9 ** 9 ** 9 }}",
    "constant filters": "{{ 'x' | center(10**10) | list | sort }}",
    "spaces": "{%" + " " * 120_000 + "x",
    "dashes": "{{-" * 40_000,
}
# Harmless only as long as the text is short.
LIMIT = 5 << 20  # characters


def some(sources: list[str], keep: int = 0) -> list[Any]:
    """The first, and of the others every fourth; the rest is slow: each takes up its time in a process."""
    return [
        source if index < keep or index % 4 == 0 else pytest.param(source, marks=pytest.mark.slow)
        for index, source in enumerate(sources)
    ]


def _outcome(source: str, time_limit: float) -> str:
    """The error, or "": a short text is as good."""
    try:
        assert len(ChatTemplate(source, time_limit=time_limit).render(MESSAGES)) < LIMIT
    except (InvalidRequestError, ModelFormatError) as error:
        assert error.field in ("messages", "chat_template")
        return str(error)
    return ""


def _refused(source: str, time_limit: float) -> str:
    message = _outcome(source, time_limit)
    assert message
    return message


@pytest.mark.parametrize("source", [*some(ENDLESS), *some(UNINTERRUPTIBLE, keep=8)])
def test_endless(source: str) -> None:
    """In a thread that is not the main one: signals could not help there."""
    with ThreadPoolExecutor(1) as other:
        other.submit(_refused, source, 0.1).result()


@pytest.mark.parametrize("source", some([*TOO_LARGE, *PERHAPS_SHORT]))
def test_too_large_or_too_long(source: str) -> None:
    _outcome(source, time_limit=0.1)


@pytest.mark.parametrize("source", HARD_TO_PARSE.values(), ids=HARD_TO_PARSE)
def test_hard_to_parse(source: str) -> None:
    """Constants are computed when a template is compiled, and nesting could overflow the stack."""
    _outcome(source, time_limit=0.1)


def test_the_longest_source() -> None:
    assert ChatTemplate("x" * MAX_SOURCE).render(MESSAGES) == "x" * MAX_SOURCE
    assert f"longer than {MAX_SOURCE} characters" in _refused("x" * (MAX_SOURCE + 1), 5)


def test_memory_is_that_of_the_other_process() -> None:
    """A list of 10**8 entries takes 800 MB; here nothing of it is seen."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "used too much memory" in _refused("{% set x = [1] * 10**8 %}", 5)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


@pytest.mark.parametrize("source", ESCAPES)
def test_escapes(source: str) -> None:
    _refused(source, time_limit=5)
    assert MESSAGES == [{"role": "user", "content": "hi"}]


def test_limits_are_reported() -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    assert "more than 0.2 s" in _refused(endless, time_limit=0.2)
    written = "{% for a in range(99999) %}" + "text " * 1000 + "{% endfor %}"
    assert "wrote more than" in _refused(written, time_limit=5)


def test_a_message_that_cannot_be_written() -> None:
    """It used to end the process, as if this did not run at all."""
    source = "{% set ns = namespace(l=[1]) %}{% for i in range(90000) %}{% set ns.l = [ns.l] %}{% endfor %}"
    assert "refused them: list" in _refused(source + "{{ raise_exception(ns.l) }}", 5)


# Each spends its time in one call of a function that lets no other thread of its process run.
_SUM = "{{ ([[1]] * (%d * messages | length)) | sum(start=[]) | length }}"
HOLDING = {
    "division": next(source for source in UNINTERRUPTIBLE if "(a // b)" in source),
    "sum": _SUM.replace("%d", "1000000"),
    "select": next(source for source in UNINTERRUPTIBLE if "select('in'" in source),
}


# The one that held the lock for longest is in every run.
holding = pytest.mark.parametrize(
    "source",
    [
        pytest.param(source, id=name, marks=pytest.mark.slow if n else ())
        for n, (name, source) in enumerate(HOLDING.items())
    ],
)


def _hold(source: str) -> None:
    assert "more than 1 s" in _refused(source, 1)


def _hold_here() -> None:
    """What would happen if a template were rendered in this process. It ends, since it is a short one."""
    assert get_environment().from_string(_SUM.replace("%d", "40000")).render(messages=MESSAGES) == "40000"


async def _gap_of_event_loop(work: Callable[[], None]) -> float:
    """For how long the event loop did not turn at a stretch while `work` went on in another thread, as a part of all
    the time that it took."""
    begin = last = time.monotonic()
    longest = 0.0
    task = asyncio.create_task(asyncio.to_thread(work))
    while not task.done():
        await asyncio.sleep(0.001)
        now = time.monotonic()
        longest, last = max(longest, now - last), now
    await task
    print(f"the longest gap of the event loop: {longest:.3f} s of {last - begin:.3f} s")
    return longest / (last - begin)


def _gap_of_main_thread(work: Callable[[], None]) -> float:
    """The same of this thread."""
    begin = last = time.monotonic()
    longest = 0.0
    with ThreadPoolExecutor(1) as other:
        done = other.submit(work)
        while not done.done():
            time.sleep(0.001)
            now = time.monotonic()
            longest, last = max(longest, now - last), now
        done.result()
    print(f"the longest gap of the main thread: {longest:.3f} s of {last - begin:.3f} s")
    return longest / (last - begin)


# A busy machine lengthens the gaps and the whole alike; where it stands still for once, a second or third try tells.
TRIES = 3


@holding
async def test_the_event_loop_goes_on(source: str) -> None:
    for _ in range(TRIES):
        if await _gap_of_event_loop(lambda: _hold(source)) < 0.5:
            return
    pytest.fail("the event loop stood still")


@holding
def test_other_threads_go_on(source: str) -> None:
    assert any(_gap_of_main_thread(lambda: _hold(source)) < 0.5 for _ in range(TRIES))


@pytest.mark.slow
async def test_gaps_are_seen() -> None:
    """The two tests above would fail if templates were rendered in this process."""
    assert await _gap_of_event_loop(_hold_here) > 0.5
    assert _gap_of_main_thread(_hold_here) > 0.5


# --- many renderings for one request ---

# Names the key of a part, and so is tried with each role. Takes some milliseconds, far less than the limit.
TRIED = (
    "{# text #}{% for i in range(1000) %}{% for j in range(1000) %}{% endfor %}{% endfor %}{{ messages[0].content }}"
)


def _roles(first: int, end: int) -> list[dict[str, Any]]:
    return [{"role": f"role {n}", "content": "hi"} for n in range(first, end)]


def test_all_renderings_of_a_request_share_its_time() -> None:
    template = ChatTemplate(TRIED, time_limit=0.3)
    assert template.render(_roles(0, 1)) == "hi"
    with pytest.raises(InvalidRequestError, match=r"^messages: .*more than 0\.3 s"):
        template.render(_roles(1, MAX_ROLES))
    assert template.render(_roles(0, 1)) == "hi"


def test_compiling_and_rendering_share_their_time() -> None:
    """What is constant is computed as the template is compiled, in each process anew."""
    template = ChatTemplate("{{ ([[1]] * 5000) | sum(start=[]) | length }}")
    assert template._begin().allowance.left < DEFAULT_TIME_LIMIT


def test_roles_are_bounded() -> None:
    template = ChatTemplate("{# text #}{{ messages[-1].content }}")
    for n in range(3):
        template.render(_roles(n * MAX_ROLES, (n + 1) * MAX_ROLES))
        assert len(template._forms) <= MAX_ROLES
    with pytest.raises(InvalidRequestError, match=f"^messages: .*{MAX_ROLES} different roles"):
        template.render(_roles(0, MAX_ROLES + 1))
    with pytest.raises(InvalidRequestError, match=r"^messages\[0\]\.role: longer than"):
        template.render([{"role": "x" * (MAX_ROLE + 1), "content": "hi"}])


# --- others that wait for their turns ---


def test_templates_of_requests_leave_those_of_models_their_room() -> None:
    templates = NamedTemplates({"default": "own", "other": "another"}, {})
    with ExitStack() as turns:
        for _ in range(guests._most):
            turns.enter_context(guests._turns)  # as if that many were at work without end
        with ThreadPoolExecutor(1) as other:
            waiting = other.submit(lambda: templates.choose("{{ 'given' }}", None).render(MESSAGES))
            assert [templates.choose(name, None).render(MESSAGES) for name in (None, "other")] == ["own", "another"]
            assert not waiting.done()
            turns.close()
            assert waiting.result() == "given"


# --- memory ---


def test_memory_is_for_what_is_given() -> None:
    """Small values allow for little: half a million of them used to allow for half a gigabyte."""
    source = "{% set x = ['x' * (2**20 * n)] %}{{ x | length }}"
    template = ChatTemplate(source)
    messages = [{"role": "user", "content": "hi", "a": [0] * 500_000}]
    assert template.render(messages, n=100) == "1"
    with pytest.raises(InvalidRequestError, match="used too much memory"):
        template.render(messages, n=320)


def test_there_is_memory_for_long_texts_of_any_script() -> None:
    """A text that an emoji makes four times as large as it would be, gathered in a namespace."""
    source = "{% set ns = namespace(text='') %}{% for m in messages %}{% set ns.text = ns.text ~ m.content %}{% endfor %}{{ ns.text }}"
    text = "😀" + "x" * (1 << 24)
    assert ChatTemplate(source, time_limit=60).render([{"role": "user", "content": text}]) == text


SHARED = "x" * 1_000_000
TOO_MUCH: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "a string many times": ("messages[0]", lambda: {"messages": [MESSAGES[0] | {"a": [SHARED] * 1000}]}),
    "a key many times": ("messages[0]", lambda: {"messages": [MESSAGES[0] | {"a": [{SHARED: 1}] * 1000}]}),
    "a message many times": ("messages[33]", lambda: {"messages": [{"role": "user", "content": SHARED}] * 1000}),
    "an integer many times": ("messages[0]", lambda: {"messages": [MESSAGES[0] | {"a": [10**3800] * 10_000}]}),
    "a tool many times": ("tools", lambda: {"messages": MESSAGES, "tools": [{"a": SHARED}] * 1000}),
    "a document many times": ("documents", lambda: {"messages": MESSAGES, "documents": [{"a": SHARED}] * 1000}),
    "variables": (
        "chat_template_kwargs.v33",
        lambda: {"messages": MESSAGES, "chat_template_kwargs": {f"v{n}": SHARED for n in range(50)}},
    ),
    "names of variables": (
        "chat_template_kwargs",
        lambda: {"messages": MESSAGES, "chat_template_kwargs": {SHARED + str(n): 1 for n in range(50)}},
    ),
    "values": ("messages[1]", lambda: {"messages": [MESSAGES[0] | {"a": [0] * 900_000}] * 1000}),
}


@pytest.mark.parametrize("case", TOO_MUCH)
def test_what_is_given_is_bounded(case: str) -> None:
    """All together, and each time it stands there: a small request could become any number of gigabytes."""
    field, make = TOO_MUCH[case]
    given = make()
    with pytest.raises(InvalidRequestError, match="up to here there are more than") as caught:
        ChatTemplate("{{ messages[0].content }}").render(given.pop("messages"), **given)
    assert caught.value.field == field


def test_a_template_works_again_after_it_was_stopped() -> None:
    template = ChatTemplate("{% for a in range(n) %}{% for b in range(n) %}{% endfor %}{% endfor %}ok", time_limit=0.3)
    with pytest.raises(InvalidRequestError):
        template.render(MESSAGES, n=99_999)
    assert template.render(MESSAGES, n=3) == "ok"
