"""The reader of machine code that test_hot_loops.py relies on, on code written by hand."""

from __future__ import annotations

import re

import pytest

from tests.backends.cpu.assembly import Function, Limits, functions_in

# A loop over groups, which asks for memory in a block behind the function's end, and a loop of scales behind it.
GOOD = """
kernels.o:     file format elf64-x86-64

Disassembly of section .text:

0000000000000000 <void panel<(Format)4, 2ul>(float const*)>:
   0:	push   %rbx
   1:	mov    0x8(%rsp),%rax
   5:	nopl   0x0(%rax)
  10:	cmp    %rcx,%r15
  13:	je     60 <void panel<(Format)4, 2ul>(float const*)+0x60>
  15:	vpandd 0x40(%rdx),%zmm8,%zmm21
  1c:	vpdpbusd (%rax){1to16},%zmm21,%zmm20
  22:	vpdpbusd 0x20(%rax){1to16},%zmm21,%zmm6
  29:	vcvtdq2ps %zmm20,%zmm20
  2f:	vfmadd231ps %zmm21,%zmm20,%zmm17
  35:	cmp    %rcx,%r14
  38:	jne    10 <void panel<(Format)4, 2ul>(float const*)+0x10>
  3a:	vmovaps %zmm17,0x8(%rsp)
  40:	vfmadd231ps -0x20(%rsi){1to16},%zmm0,%zmm17
  47:	vfmadd231ps -0x1c(%rsi){1to16},%zmm0,%zmm16
  4e:	vfmadd231ps -0x18(%rsi){1to16},%zmm0,%zmm15
  52:	vfmadd231ps -0x14(%rsi){1to16},%zmm0,%zmm14
  55:	cmp    %rsi,%rax
  58:	jne    40 <void panel<(Format)4, 2ul>(float const*)+0x40>
  5a:	jmp    5f <void panel<(Format)4, 2ul>(float const*)+0x5f>	5b: R_X86_64_PC32	.text.unlikely-0x4
  5f:	ret
  60:	prefetcht1 (%rbx)
  65:	jmp    15 <void panel<(Format)4, 2ul>(float const*)+0x15>

0000000000000070 <other()>:
  70:	ret
"""
LIMITS = Limits(12, 3)


def function(code: str) -> Function:
    return functions_in(code)["void panel<(Format)4, 2ul>(float const*)"]


def with_line(text: str) -> str:
    """The same with one instruction more in the hot loop."""
    return GOOD.replace("  35:\tcmp ", f"  34:\t{text}\n  35:\tcmp ")


def test_loops() -> None:
    """The block elsewhere belongs to its loop; what is before and between loops belongs to none."""
    assert list(functions_in(GOOD)) == ["void panel<(Format)4, 2ul>(float const*)", "other()"]
    loops = {tuple(one.address for one in loop.body) for loop in function(GOOD).loops}
    hot = (0x10, 0x13, 0x15, 0x1C, 0x22, 0x29, 0x2F, 0x35, 0x38, 0x60, 0x65)
    assert loops == {hot, (0x40, 0x47, 0x4E, 0x52, 0x55, 0x58)}
    (loop,) = function(GOOD).hot_loops  # by products of integers, though the other multiplies more
    assert tuple(one.address for one in loop.body) == hot
    assert functions_in(GOOD)["other()"].hot_loops == []


def test_a_loop_inside_counts_for_itself() -> None:
    around = GOOD.replace("  5f:\tret", "  5e:\tjmp    5 <...>\n  5f:\tret").replace("5a:\tjmp    5f", "5a:\tje     5f")
    loops = sorted(len(loop.body) for loop in function(around).loops)
    assert loops == [4, 6, 11]  # nopl, the move to the stack and both jumps
    assert len(function(around).hot_loops[0].body) == 11


def test_nothing_to_complain_of() -> None:
    assert LIMITS.complaints(function(GOOD)) == LIMITS.complaints_of_zeros(function(GOOD)) == []


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("vmovaps %zmm17,0x48(%rsp)", "stack writes"),
        ("mov    %rax,-0x48(%rsp)", "stack writes"),
        ("vmovaps 0x48(%rsp),%zmm17", "stack reads"),
        ("vpaddd 0x2e8(%rsp),%ymm11,%ymm11", "stack reads"),
        ("vpdpbusd 0x8(%rsp,%rax,4){1to16},%zmm21,%zmm6", "stack reads"),
        ("vmovq  %xmm3,%r10", "transfers"),
        ("vmovd  %eax,%xmm3", "transfers"),
        ("vpinsrq $0x1,%rbx,%xmm3,%xmm3", "transfers"),
        ("vpbroadcastd %edi,%zmm8", "transfers"),
        ("vpbroadcastd (%rax),%zmm8", "broadcasts"),
        ("vbroadcastss 0x4(%rax,%rcx,4),%zmm8", "broadcasts"),
    ],
)
def test_what_should_not_be_there(line: str, kind: str) -> None:
    """The complaint names the function, its loop and the instruction."""
    made = function(with_line(line))
    (complaint,) = (one for one in LIMITS.complaints(made) if kind in one)
    assert complaint.startswith("void panel<(Format)4, 2ul>(float const*), loop from 10 to 65: 1 " + kind)
    assert complaint.endswith(f"\n    34: {line}")
    assert bool(LIMITS.complaints_of_zeros(made)) == (kind != "broadcasts")
    allowed = Limits(12, 4 if "vpdp" in line else 3, **{kind.replace(" ", "_"): 1, "broadcasts": 1})
    assert not any(kind in one for one in allowed.complaints(made))


@pytest.mark.parametrize(
    "line", ["lea    0x8(%rsp),%rax", "add    $0x20,%rax", "vmovaps %zmm1,0x8(%rbp)", "kmovd %eax,%k1"]
)
def test_harmless(line: str) -> None:
    assert LIMITS.complaints(function(with_line(line))) == []


def test_the_frame_pointer_is_the_stack_where_it_is_one() -> None:
    code = with_line("vmovaps %zmm1,0x8(%rbp)").replace("   0:\tpush   %rbx", "   0:\tmov    %rsp,%rbp")
    (complaint,) = LIMITS.complaints(function(code))
    assert "1 stack writes" in complaint


def test_too_many_instructions() -> None:
    (complaint,) = Limits(10, 3).complaints(function(GOOD))
    assert re.search(r"11 instructions instead of 10$", complaint)
    assert Limits(1000, 3).complaints(function(with_line("nop"))) == []


def test_another_loop() -> None:
    (complaint,) = Limits(12, 4).complaints(function(GOOD))
    assert "3 multiplies instead of 4" in complaint
    without = functions_in(GOOD.replace("38:\tjne    10", "38:\tjne    3a").replace("58:\tjne    40", "58:\tjne    5a"))
    assert LIMITS.complaints(without["void panel<(Format)4, 2ul>(float const*)"])[0].endswith("has no loop")
