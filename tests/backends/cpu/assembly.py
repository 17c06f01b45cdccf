"""Loops in machine code of x86-64, as objdump shows it: what a compiler made of a kernel, and what it should have.

Control flow is followed, so that a block which the compiler put elsewhere counts where it runs. An indirect jump (a
table of a `switch`) ends its path: in functions that have one, loops behind it are not seen.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

_FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")
_INSTRUCTION = re.compile(r"^ *([0-9a-f]+):\t(.*)$")
_TARGET = re.compile(r"^j\w+ +([0-9a-f]+) ")
_PRODUCT = re.compile(r"(\{vex\} )?vpdp|vpmadd")
_MULTIPLY = re.compile(r"(\{vex\} )?vpdp|vpmadd|vfn?m(add|sub)|vmul[ps][sd]")
_BROADCAST = re.compile(r"vp?broadcast")
_GENERAL = re.compile(r"%[re]([abcd]x|[sd]i|[bs]p)\b|%r\d+[dwb]?\b")
_FRAME = re.compile(r"(mov +%rsp|lea +\S*\(%rsp\)),%rbp")


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str
    target: int | None  # where it jumps to, within its function

    @property
    def is_product(self) -> bool:
        """A multiplication of integers."""
        return _PRODUCT.match(self.text) is not None

    @property
    def is_multiply(self) -> bool:
        return _MULTIPLY.match(self.text) is not None

    @property
    def is_broadcast(self) -> bool:
        """One by itself: not an operand such as (%rax){1to16}."""
        return _BROADCAST.match(self.text) is not None

    @property
    def is_transfer(self) -> bool:
        """Between vector and general registers, not by way of memory."""
        registers = re.sub(r"\([^)]*\)", "", self.text)
        return re.search(r"%[xyz]mm", registers) is not None and _GENERAL.search(registers) is not None

    @property
    def goes_on(self) -> bool:
        return re.match(r"(notrack )?jmp|(bnd |repz )?ret|ud2", self.text) is None


@dataclass(frozen=True)
class Loop:
    """The instructions of a loop, but for those of loops inside it, in the order of their addresses."""

    body: list[Instruction]
    stack: str = field(repr=False)  # what an operand on the stack looks like

    @property
    def products(self) -> list[Instruction]:
        return [one for one in self.body if one.is_product]

    @property
    def multiplies(self) -> list[Instruction]:
        return [one for one in self.body if one.is_multiply]

    @property
    def broadcasts(self) -> list[Instruction]:
        return [one for one in self.body if one.is_broadcast]

    @property
    def transfers(self) -> list[Instruction]:
        return [one for one in self.body if one.is_transfer]

    @property
    def stack_writes(self) -> list[Instruction]:
        """Moves to the stack. What goes there by way of another register is not noticed."""
        return [one for one in self.body if re.match(rf"v?mov.*,\S*{self.stack}[^)]*\)$", one.text)]

    @property
    def stack_reads(self) -> list[Instruction]:
        """All else that has an operand on the stack."""
        written = self.stack_writes
        return [one for one in self.body if re.search(rf"^(?!lea).*{self.stack}", one.text) and one not in written]


@dataclass(frozen=True)
class Function:
    name: str
    body: list[Instruction]

    @cached_property
    def loops(self) -> list[Loop]:
        """All of them, each without the loops inside it."""
        whole = list(self._loops())
        own = [one.difference(*(other for other in whole if other < one)) for one in whole]
        stack = r"\(%r[sb]p" if any(_FRAME.match(one.text) for one in self.body) else r"\(%rsp"
        return [Loop([self.body[i] for i in sorted(one)], stack) for one in own]

    @property
    def hot_loops(self) -> list[Loop]:
        """Those with most products of integers, and of these those that multiply most; some functions have twins."""

        def heat(loop: Loop) -> tuple[int, int]:
            return len(loop.products), len(loop.multiplies)

        return [one for one in self.loops if heat(one) == max(map(heat, self.loops))]

    @cached_property
    def _next(self) -> list[list[int]]:
        """By the number of an instruction: those that may run after it."""
        numbers = {one.address: i for i, one in enumerate(self.body)}
        following: list[list[int]] = []
        for i, one in enumerate(self.body):
            after = [i + 1] if one.goes_on and i + 1 < len(self.body) else []
            following.append(after + ([numbers[one.target]] if one.target in numbers else []))
        return following

    def _loops(self) -> Iterator[frozenset[int]]:
        """Natural loops. The head of one is on every way from the function's entry to the jump that closes it."""
        before: list[list[int]] = [[] for _ in self.body]
        for i, after in enumerate(self._next):
            for j in after:
                before[j].append(i)
        addresses = {one.target for one in self.body}
        entered = _reached([0], self._next, without=-1)
        for head in (i for i in entered if self.body[i].address in addresses):
            otherwise = _reached([0], self._next, without=head)
            closing = [i for i in before[head] if i in entered and i not in otherwise]
            if closing:
                yield frozenset(_reached(closing, before, without=head) | {head})


def _reached(start: Iterable[int], edges: list[list[int]], without: int) -> set[int]:
    """All that a way leads to from `start` which does not touch `without`."""
    seen: set[int] = set()
    waiting = list(start)
    while waiting:
        here = waiting.pop()
        if here not in seen and here != without:
            seen.add(here)
            waiting += edges[here]
    return seen


def functions_in(disassembly: str) -> dict[str, Function]:
    """By name, what `objdump -d -r -w -C --no-show-raw-insn` shows."""
    found: dict[str, Function] = {}
    body: list[Instruction] = []
    for line in disassembly.splitlines():
        if named := _FUNCTION.match(line):
            body = []
            found[named[1]] = Function(named[1], body)
        elif shown := _INSTRUCTION.match(line):
            text, _, elsewhere = shown[2].partition("\t")  # what the linker is to put in
            jump = _TARGET.match(text) if not elsewhere else None
            body.append(Instruction(int(shown[1], 16), text.strip(), int(jump[1], 16) if jump else None))
    return found


def disassembled(code: Path) -> dict[str, Function]:
    command: list[str | Path] = ["objdump", "-d", "-r", "-w", "-C", "--no-show-raw-insn", code]
    return functions_in(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@dataclass(frozen=True)
class Limits:
    """What the hot loops of a function may be made of."""

    instructions: int  # may be 5 % more, as long as all else holds
    multiplies: int  # so many and no others: else it is another loop
    broadcasts: int = 0
    stack_reads: int = 0
    stack_writes: int = 0
    transfers: int = 0

    def complaints(self, function: Function) -> list[str]:
        """With the instructions that are too many."""
        found = [] if function.hot_loops else [f"{function.name} has no loop"]
        for loop in function.hot_loops:
            count = len(loop.body)
            if len(loop.multiplies) != self.multiplies:
                found.append(self._complaint(function, loop, "multiplies", self.multiplies))
            elif count > self.instructions * 1.05:
                found.append(f"{_named(function, loop)}: {count} instructions instead of {self.instructions}")
            found += self._too_many(function, loop, "broadcasts stack_reads stack_writes transfers")
        return found

    def complaints_of_zeros(self, function: Function) -> list[str]:
        """Only of what should not be there at all, whichever the compiler."""
        kinds = [kind for kind in ("stack_reads", "stack_writes", "transfers") if getattr(self, kind) == 0]
        if not function.hot_loops:
            return [f"{function.name} has no loop"]
        return [one for loop in function.hot_loops for one in self._too_many(function, loop, " ".join(kinds))]

    def _too_many(self, function: Function, loop: Loop, kinds: str) -> list[str]:
        return [
            self._complaint(function, loop, kind, getattr(self, kind))
            for kind in kinds.split()
            if len(getattr(loop, kind)) > getattr(self, kind)
        ]

    def _complaint(self, function: Function, loop: Loop, kind: str, wanted: int) -> str:
        shown: list[Instruction] = getattr(loop, kind)
        lines = "".join(f"\n    {one.address:x}: {one.text}" for one in shown)
        return f"{_named(function, loop)}: {len(shown)} {kind.replace('_', ' ')} instead of {wanted}{lines}"


def _named(function: Function, loop: Loop) -> str:
    return f"{function.name}, loop from {loop.body[0].address:x} to {loop.body[-1].address:x}"
