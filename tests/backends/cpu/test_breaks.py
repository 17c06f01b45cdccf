"""Each of the twelve rules of exactness is broken once, on purpose: the tests must notice.

The rules, in short: (1) integer sums are exact; (2) one row and many rows are one computation; (3) activations are
quantised by their own group alone; (4) keys are visited in order, by position; (5) tiles are folded left to right;
(6) keys that a row may not see weigh nothing; (7) K and V are read as stored, also by rows of the same step; (8) rope
angles depend on the position alone; (9) sums over a row have a fixed order; (10) the compiler fuses nothing, and
threads keep their floating-point mode; (11) ties go to the lower id, draws depend on the request alone; (12) who wants
every row reads no cached block.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from octavo import _C
from tests.backends.cpu.other_build import ROOT, OtherBuild

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

CPU = "tests/backends/cpu"


@dataclass(frozen=True)
class Break:
    rule: int
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]  # one of which must fail
    needs: str = "portable"  # an instruction set


BREAKS = [
    Break(
        1,
        "sixteen products are added in int16",
        "csrc/cpu/linear.inl",
        "constexpr std::size_t kSteps = 32767 / (2 * 127 * MaxCode);",
        "constexpr std::size_t kSteps = 16;",
        (f"{CPU}/test_linear.py",),
        "avx2",
    ),
    Break(
        1,
        "products of K's codes are added in int16, which saturates",
        "csrc/cpu/linear.inl",
        '"vpaddd %[p], %[s], %[s]"',
        '"vpaddsw %[p], %[s], %[s]"',
        (f"{CPU}/test_attention.py", f"{CPU}/test_attention_bits.py"),
        "avx2",
    ),
    Break(
        1,
        "weights of P above 127 saturate",
        "csrc/cpu/attention_codes.inl",
        "_mm256_packus_epi16(words, words)",
        "_mm256_packs_epi16(words, words)",
        (f"{CPU}/test_attention.py", f"{CPU}/test_attention_bits.py"),
        "avxvnni",
    ),
    Break(
        2,
        "a single row is multiplied and added in two roundings",
        "csrc/cpu/linear.inl",
        "acc[r] = fma(to_float(isum[r]), mul(scale, set1(scales[g * Rows + r])), acc[r]);",
        "const F by = mul(scale, set1(scales[g * Rows + r]));\n"
        "acc[r] = Rows == 1 ? add(mul(to_float(isum[r]), by), acc[r]) : fma(to_float(isum[r]), by, acc[r]);",
        (f"{CPU}/test_linear.py",),
    ),
    Break(
        2,
        "the bias of a single row is added by halves",
        "csrc/cpu/linear.inl",
        "if (piece.bias != nullptr) acc = add(acc, load(piece.bias + panel * kPanel));",
        "if (piece.bias != nullptr) {\n"
        "const bool single = piece.last_row - piece.first_row == 1;\n"
        "const F bias = mul(load(piece.bias + panel * kPanel), set1(single ? 0.5f : 1.0f));\n"
        "acc = add(acc, bias);\n"
        "if (single) acc = add(acc, bias);\n"
        "}",
        (f"{CPU}/test_linear.py",),
    ),
    Break(
        3,
        "a group's scale looks at the group before it",
        "csrc/cpu/linear.inl",
        "hi[i] = load(values + kLanes);\n",
        "hi[i] = max(load(values + kLanes), mul(load(group[i] == first ? values : values - kLanes), set1(1e-3f)));\n",
        (f"{CPU}/test_linear.py",),
    ),
    Break(
        3,
        "the steps of a row's weights are those of the row before it",
        "csrc/cpu/attention_codes.inl",
        "const float top = float_of_bits(bits[j]);",
        "const float top = float_of_bits(bits[j == 0 ? 0 : j - 1]);",
        (f"{CPU}/test_attention_bits.py",),
    ),
    Break(
        3,
        "a row is folded where its block's first one is",
        "csrc/cpu/attention_codes.inl",
        "seeing[i].folds = !split && query.begun;",
        "seeing[i].folds = !split && queries[0].begun;",
        (f"{CPU}/test_attention.py", f"{CPU}/test_attention_bits.py"),
    ),
    Break(
        3,
        "the scales of V are those of the tile's first rows for all",
        "csrc/cpu/attention_codes.inl",
        "if (number == 0 || one.first != (&one)[-1].first || one.last != (&one)[-1].last) {",
        "if (number == 0) {",
        (f"{CPU}/test_attention_bits.py",),
    ),
    Break(
        4,
        "V of a block is added from its middle on",
        "csrc/cpu/attention.inl",
        "product_all(a + from, queries_here, HalfValues{v, next_v, dim}, begin, end, go_on, c + from, 0, dim);",
        "const std::size_t half = (begin + end) / 2;\n"
        "product_all(a + from, queries_here, HalfValues{v, next_v, dim}, half, end, go_on, c + from, 0, dim);\n"
        "product_all(a + from, queries_here, HalfValues{v, next_v, dim}, begin, half, true, c + from, 0, dim);",
        (f"{CPU}/test_attention_bits.py",),
    ),
    Break(
        5,
        "states of tiles are folded right to left",
        "csrc/cpu/attention_state.inl",
        "tile[i] = states + (t * group + first + i) * size;",
        "tile[i] = states + ((tiles - t) * group + first + i) * size;",
        (f"{CPU}/test_attention_bits.py",),
    ),
    Break(
        5,
        "rows whose windows begin in different tiles fold what they share as one",
        "csrc/cpu/attention_plan.cpp",
        "if (lowest_tile(row) != lowest_tile(seqs_[range.members[0]].first)) return false;",
        "",
        (f"{CPU}/test_attention_shared.py",),
    ),
    Break(
        6,
        "keys of the future are seen, and zeros behind the last one weigh something",
        "csrc/cpu/attention_state.inl",
        "if (first > 0 || last < kTile) {",
        "if (first > 0) {",
        (f"{CPU}/test_attention.py",),
    ),
    Break(
        7,
        "attention reads K and V before the step's own are stored",
        "src/octavo/models/llama.py",
        "        ops.store_kv(ops.rope(k, batch, rope), v, batch, kv)\n"
        "        mixed = ops.attention(ops.rope(q, batch, rope), batch, kv, config.score_scale)  # [T, H * D]\n",
        "        mixed = ops.attention(ops.rope(q, batch, rope), batch, kv, config.score_scale)  # [T, H * D]\n"
        "        ops.store_kv(ops.rope(k, batch, rope), v, batch, kv)\n",
        (f"{CPU}/test_engine.py::test_pairwise",),
    ),
    Break(
        8,
        "angles are made from the step's first position",
        "csrc/cpu/graph.cpp",
        "const float angle = static_cast<float>(positions[t]) * table[i];",
        "const float first = static_cast<float>(positions[0]) * table[i];\n"
        "const float angle = first + static_cast<float>(positions[t] - positions[0]) * table[i];",
        (f"{CPU}/test_engine.py::test_pairwise",),
    ),
    Break(
        9,
        "the vector instructions add lanes in another order",
        "csrc/cpu/simd.h",
        "  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));\n"
        "  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));",
        "  const __m128 two = _mm_add_ps(four, _mm_movehdup_ps(four));\n"
        "  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehl_ps(two, two)));",
        (f"{CPU}/test_rows.py", f"{CPU}/test_attention_bits.py"),
        "avx2",
    ),
    Break(
        10,
        "the compiler may fuse a multiply with an add",
        "CMakeLists.txt",
        "-ffp-contract=off",
        "-ffp-contract=fast",
        (f"{CPU}/test_rows.py", f"{CPU}/test_linear.py", f"{CPU}/test_attention_bits.py"),
        "avx2",
    ),
    Break(
        10,
        "threads take the floating-point mode of the host program",
        "csrc/cpu/pool.cpp",
        "  _mm_setcsr(0x1f80);\n",
        "",
        (f"{CPU}/test_processes.py", f"{CPU}/test_rows.py"),
        "avx2",
    ),
    Break(
        11,
        "of equal logits the higher id stands first",
        "csrc/cpu/sampling.cpp",
        "a.value != b.value ? a.value > b.value : a.id < b.id",
        "a.value != b.value ? a.value > b.value : a.id > b.id",
        (f"{CPU}/test_sampling.py",),
    ),
    Break(
        11,
        "noise depends on which sequence of the engine draws",
        "src/octavo/coordinators/completion.py",
        "self.stream = self.stream or (self.index,)",
        "self.stream = self.stream or (id(self) // 64 % 1000,)",
        ("tests/invariance/test_tiny.py",),
    ),
    Break(
        12,
        "a request for every row's log-probabilities skips what is cached",
        "src/octavo/engine/scheduler.py",
        "limit = min(sequence.first_wanted_row, sequence.target)\n",
        "limit = sequence.target - 1\n",
        ("tests/invariance/test_prompt_logprobs.py", "tests/invariance/test_prefix_cache.py"),
    ),
]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> OtherBuild:
    """A copy of the sources to break, built."""
    source = tmp_path_factory.mktemp("broken")
    for name in ("src", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "_C*.so"))
    for name in ("CMakeLists.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    return OtherBuild(tmp_path_factory.mktemp("build"), source)


@pytest.fixture
def broken(copy: OtherBuild, request: pytest.FixtureRequest) -> Iterator[OtherBuild]:
    one: Break = request.param
    if one.needs not in _C.instruction_sets():
        pytest.skip(f"this processor has no {one.needs}")
    path = copy.source / one.file
    text, times = path.read_text(), path.stat()
    path.write_text(text.replace(one.old, one.new))
    try:
        copy.build()
        yield copy
    finally:
        path.write_text(text)
        os.utime(path, (times.st_atime, times.st_mtime + 3600))  # newer than what was built from the broken one


def test_every_rule_is_broken() -> None:
    assert {one.rule for one in BREAKS} == set(range(1, 13))
    for one in BREAKS:
        assert (ROOT / one.file).read_text().count(one.old) == 1, f"{one.file} has changed: break rule {one.rule} anew"


def test_whole(copy: OtherBuild) -> None:
    """Guards against breaks that are noticed because the copy does not work at all."""
    files = sorted({test for one in BREAKS for test in one.tests})
    run = copy.test("-x", *files)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-3000:]


@pytest.mark.parametrize("broken", BREAKS, indirect=True, ids=lambda one: f"{one.rule}: {one.what}")
def test_noticed(broken: OtherBuild, request: pytest.FixtureRequest) -> None:
    one: Break = request.node.callspec.params["broken"]
    run = broken.test("-x", *one.tests)
    assert run.returncode == 1, f"rule {one.rule} may be broken unnoticed\n" + run.stdout[-3000:] + run.stderr[-3000:]
    assert " failed" in run.stdout and " error" not in run.stdout.splitlines()[-1]
