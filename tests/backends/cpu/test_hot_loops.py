"""What the compiler makes of the kernels' hot loops, whichever processor is here and however busy it is.

Kernels are compiled with the flags of CMakeLists.txt, and their loops are looked at: an instruction more among those
that multiply, or a register that has to be kept on the stack, costs time that no test could measure reliably.

The table holds what GCC 12 makes. Of another compiler only that is demanded which holds whichever registers it chooses:
nothing on the stack and nothing through general registers where GCC 12 needs neither, and nothing read back from the
stack anywhere with the 32 registers of AVX-512. How many instructions are good for another compiler, only its own table
could tell. If a change makes a loop better, its line is to be made stricter.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

from tests.backends.cpu.assembly import Function, Limits, disassembled
from tests.backends.cpu.other_build import ROOT, configuring

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

GCC = "12"  # whose figures are in the table

# Of `quantize` and `weights_of` what is read from the stack is mostly arrays that are meant: the maxima of four
# groups, which are found at once. Eight rows have 8 sums of AVX-512, but 16 of AVX2, which has 16 registers in all, so
# that sums of groups go to the stack and back.
TABLE = {
    ("avx512", "panel_rows<Q4_0, 8>"): Limits(139, 80, broadcasts=8),
    ("avx512", "panel_rows<Q4_1, 8>"): Limits(124, 80),
    ("avx512", "panel_rows<Q8_0, 8>"): Limits(133, 80, broadcasts=8),
    ("avx512", "panel_rows<Q4_K, 8>"): Limits(136, 81),
    ("avx512", "panel_rows<Q6_K, 8>"): Limits(187, 98, broadcasts=24),
    ("avx512", "panel_rows<Q4_0, 1>"): Limits(40, 10, broadcasts=1),
    ("avx512", "panel_rows<Q4_1, 1>"): Limits(39, 10),
    ("avx512", "panel_rows<Q8_0, 1>"): Limits(40, 10, broadcasts=1),
    ("avx512", "panel_rows<Q4_K, 1>"): Limits(41, 11),
    ("avx512", "panel_rows<Q6_K, 1>"): Limits(51, 14, broadcasts=3),
    ("avx512", "scores_of<8>"): Limits(13, 8),
    ("avx512", "scores_of<1>"): Limits(6, 1),
    ("avx512", "values_of<8, 2>"): Limits(43, 16, broadcasts=8),
    ("avx512", "values_of<1, 2>"): Limits(19, 2, broadcasts=1),
    ("avx512", "quantize"): Limits(400, 12, broadcasts=4, stack_reads=21, stack_writes=4, transfers=24),
    ("avx512", "weights_of"): Limits(489, 32, broadcasts=19, stack_reads=39, stack_writes=42, transfers=8),
    ("avx2", "panel_rows<Q4_0, 8>"): Limits(592, 176, broadcasts=80, stack_reads=50, stack_writes=45),
    ("avx2", "panel_rows<Q4_1, 8>"): Limits(532, 176, broadcasts=72, stack_reads=40, stack_writes=37),
    ("avx2", "panel_rows<Q8_0, 8>"): Limits(63, 16, broadcasts=8, stack_reads=4, stack_writes=3),
    ("avx2", "panel_rows<Q4_K, 8>"): Limits(539, 178, broadcasts=72, stack_reads=42, stack_writes=37),
    ("avx2", "panel_rows<Q6_K, 8>"): Limits(945, 260, broadcasts=88, stack_reads=118, stack_writes=113),
    ("avx2", "panel_rows<Q4_0, 1>"): Limits(103, 22, broadcasts=10),
    ("avx2", "panel_rows<Q4_1, 1>"): Limits(99, 22, broadcasts=9),
    ("avx2", "panel_rows<Q8_0, 1>"): Limits(141, 36, broadcasts=17),
    ("avx2", "panel_rows<Q4_K, 1>"): Limits(107, 24, broadcasts=9),
    ("avx2", "panel_rows<Q6_K, 1>"): Limits(132, 36, broadcasts=11, stack_reads=3, stack_writes=1),
    ("avx2", "scores_of<8>"): Limits(46, 16, broadcasts=8),
    ("avx2", "scores_of<1>"): Limits(13, 2, broadcasts=1),
    ("avx2", "values_of<8, 2>"): Limits(86, 16, broadcasts=16, stack_reads=2, stack_writes=2),
    ("avx2", "values_of<1, 2>"): Limits(27, 2, broadcasts=2),
    ("avx2", "quantize"): Limits(492, 20, broadcasts=4, stack_reads=63, stack_writes=34, transfers=20),
    ("avx2", "weights_of"): Limits(441, 48, broadcasts=13, stack_reads=11, stack_writes=54, transfers=12),
    ("avxvnni", "panel_rows<Q4_0, 8>"): Limits(401, 160, broadcasts=80, stack_reads=44, stack_writes=40),
    ("avxvnni", "panel_rows<Q4_1, 8>"): Limits(376, 160, broadcasts=72, stack_reads=36, stack_writes=35),
    ("avxvnni", "panel_rows<Q8_0, 8>"): Limits(360, 160, broadcasts=80, stack_reads=23, stack_writes=23),
    ("avxvnni", "panel_rows<Q4_K, 8>"): Limits(384, 162, broadcasts=72, stack_reads=39, stack_writes=36),
    ("avxvnni", "panel_rows<Q6_K, 8>"): Limits(538, 196, broadcasts=88, stack_reads=63, stack_writes=58),
    ("avxvnni", "panel_rows<Q4_0, 1>"): Limits(82, 20, broadcasts=10),
    ("avxvnni", "panel_rows<Q4_1, 1>"): Limits(81, 20, broadcasts=9),
    ("avxvnni", "panel_rows<Q8_0, 1>"): Limits(70, 20, broadcasts=10),
    ("avxvnni", "panel_rows<Q4_K, 1>"): Limits(87, 22, broadcasts=9),
    ("avxvnni", "panel_rows<Q6_K, 1>"): Limits(93, 28, broadcasts=11),
    ("avxvnni", "scores_of<8>"): Limits(18, 8, broadcasts=4),
    ("avxvnni", "scores_of<1>"): Limits(9, 2, broadcasts=1),
    ("avxvnni", "values_of<8, 2>"): Limits(32, 8, broadcasts=8),
    ("avxvnni", "values_of<1, 2>"): Limits(19, 1, broadcasts=1),
    ("avxvnni", "quantize"): Limits(492, 20, broadcasts=4, stack_reads=63, stack_writes=34, transfers=20),
    ("avxvnni", "weights_of"): Limits(441, 48, broadcasts=13, stack_reads=11, stack_writes=54, transfers=12),
}


@dataclass(frozen=True)
class Break:
    what: str
    file: str
    old: str
    new: str
    function: str
    kind: str  # of what there is too much then


BREAKS = [
    Break(
        "scales lie row by row, so that each row needs an address of its own",
        "linear.inl",
        "mul(scale, set1(scales[g * Rows + r])), acc[r]); });",
        "mul(scale, set1(scales[r * groups + g])), acc[r]); });",
        "panel_rows<Q4_0, 8>",
        "transfers",
    ),
    Break(
        "inputs are broadcast by an instruction of its own",
        "linear.inl",
        """\
  asm("vpdpbusd %[x]%{1to16%}, %[c], %[s]"
      : [s] "+v"(sum)
      : [c] "v"(code), [x] "m"(*reinterpret_cast<const int8_t (*)[4]>(x)));
  return sum;
""",
        "  return _mm512_dpbusd_epi32(sum, code, _mm512_set1_epi32(four_of(x)));\n",
        "scores_of<8>",
        "broadcasts",
    ),
    Break(
        "GCC may choose where sums are",
        "attention_codes.inl",
        """\
  asm("vpdpbusd %[c], %[w], %[s]" : [s] "+v"(sum.v) : [w] "v"(weights), [c] "v"(code));
  return sum;
""",
        "  return {_mm512_dpbusd_epi32(sum.v, weights, code)};\n",
        "values_of<8, 2>",
        "stack writes",
    ),
]


class Compiled:
    """Kernels of some instruction sets, compiled as CMake would."""

    def __init__(self, folder: Path, csrc: Path = ROOT / "csrc") -> None:
        if shutil.which("objdump") is None:
            pytest.skip("no objdump")
        self._folder = folder
        self._csrc = csrc
        self._sets: dict[str, dict[str, Function]] = {}
        subprocess.run(configuring(ROOT, folder, "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"), check=True, capture_output=True)
        of_files = json.loads((folder / "compile_commands.json").read_text())
        self._commands = {Path(one["file"]).name: shlex.split(one["command"]) for one in of_files}
        if "kernels_avx2.cpp" not in self._commands:
            pytest.skip("not built for x86-64")

    @cached_property
    def is_of_the_table(self) -> bool:
        cached = re.search(
            r"^CMAKE_CXX_COMPILER:.*?=(.*)$", (self._folder / "CMakeCache.txt").read_text(), re.MULTILINE
        )
        assert cached is not None
        compiler = cached[1]
        command = [compiler, "-dM", "-E", "-x", "c++", "/dev/null"]
        macros = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return f"#define __GNUC__ {GCC}\n" in macros and "__clang__" not in macros

    def functions(self, isa: str) -> dict[str, Function]:
        """By their names in the table; each set is compiled when it is first asked for."""
        if isa not in self._sets:
            functions: dict[str, Function] = {}
            code = self._folder / f"{isa}.o"
            command = [one.replace(str(ROOT / "csrc"), str(self._csrc)) for one in self._commands[f"kernels_{isa}.cpp"]]
            command[command.index("-o") + 1] = str(code)
            subprocess.run([*command, "-w"], check=True, cwd=self._folder)
            for symbol, function in disassembled(code).items():
                _, here, what = symbol.partition(f"octavo::{isa}::")
                if here and not symbol.endswith(".cold]"):
                    functions[named(what)] = Function(f"{isa} {named(what)}", function.body)
            self._sets[isa] = functions
        return self._sets[isa]


def named(symbol: str) -> str:
    """Of "panel_rows<(octavo::Format)4, 8ul>(...)": panel_rows<Q4_1, 8>."""
    declared = re.search(r"enum class Format : int \{(.*?)\}", (ROOT / "csrc" / "cpu" / "formats.h").read_text())
    assert declared is not None
    formats = declared[1].split(",")
    with_formats = re.sub(r"\(octavo::Format\)(\d+)", lambda number: formats[int(number[1])].strip(), symbol)
    return re.sub(r"(\d)ul\b", r"\1", with_formats).partition("(")[0]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """Some twenty seconds for each instruction set."""
    return Compiled(tmp_path_factory.mktemp("compiled"))


@pytest.mark.parametrize(("isa", "name"), TABLE, ids=lambda one: one.replace(" ", ""))
def test_hot_loop(compiled: Compiled, isa: str, name: str) -> None:
    limits, function = TABLE[isa, name], compiled.functions(isa)[name]
    complaints = limits.complaints(function) if compiled.is_of_the_table else limits.complaints_of_zeros(function)
    assert not complaints, "\n".join(complaints)


def test_avx512_reads_nothing_back(compiled: Compiled) -> None:
    """For any format and number of rows 32 registers are enough."""
    functions = compiled.functions("avx512").items()
    kernels = {name: one for name, one in functions if re.match("panel_rows|scores_of|values_of", name)}
    assert len(kernels) == 13 * 8 + 8 + 2 * 8
    loops = [(name, loop) for name, kernel in kernels.items() for loop in kernel.hot_loops]
    assert not [(name, one.text) for name, loop in loops for one in loop.stack_reads]


def test_breaks_can_be_made() -> None:
    for one in BREAKS:
        assert (ROOT / "csrc" / "cpu" / one.file).read_text().count(one.old) == 1, f"{one.file}: {one.what}"


@pytest.fixture(scope="module")
def broken(compiled: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """With all that is in BREAKS."""
    if not compiled.is_of_the_table:
        pytest.skip(f"what becomes of breaks is known of GCC {GCC}")
    csrc = tmp_path_factory.mktemp("broken") / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    for one in BREAKS:
        path = csrc / "cpu" / one.file
        path.write_text(path.read_text().replace(one.old, one.new))
    return Compiled(tmp_path_factory.mktemp("compiled"), csrc)


@pytest.mark.parametrize("one", BREAKS, ids=lambda one: one.what)
def test_noticed(broken: Compiled, one: Break) -> None:
    """Guards against a test that would pass whatever the loops are."""
    complaints = TABLE["avx512", one.function].complaints(broken.functions("avx512")[one.function])
    assert any(one.kind in complaint for complaint in complaints), complaints
