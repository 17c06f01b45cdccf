"""Hostile files in bulk: only ModelFormatError escapes, memory stays in proportion, accepted files are consistent."""

from __future__ import annotations

import itertools
import json
import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.core.errors import ModelFormatError
from octavo.formats import GGUFFile, SafetensorsFile, open_safetensors, open_weights

from .builder import (
    ARRAY,
    F32,
    STRING,
    U32,
    Raw,
    Tensor,
    array,
    entry,
    gguf_file,
    safetensors_file,
    sample_gguf,
    sample_safetensors,
    string,
)
from .invariants import EDGES, mutate, opens

# Small files may cost little: far less than what one unchecked 32-bit count would ask for.
MEMORY = 2 << 20

common = settings(
    max_examples=250, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def measured(action: Callable[[], Any]) -> tuple[Any, int]:
    """The action's result and its peak allocation in bytes."""
    tracemalloc.start()
    try:
        return action(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# Random changes to sound files

CORPUS = {
    "gguf": (GGUFFile, sample_gguf()),
    "gguf with strings": (
        GGUFFile,
        gguf_file([("general.alignment", U32, 64), ("t", ARRAY, array(STRING, ["a", "bc"] * 20)), ("s", STRING, "x")]),
    ),
    "gguf with tensors": (
        GGUFFile,
        gguf_file([], [Tensor(f"blk.{i}.w", [32, 2], 8, bytes(68)) for i in range(6)]),
    ),
    "safetensors": (SafetensorsFile, sample_safetensors()),
}


@pytest.mark.parametrize("name", CORPUS)
def test_mutated_files(tmp_path: Path, name: str) -> None:
    """Guards against crashes, wrong errors, huge allocations, and loops so long that the suite's limit for a test ends
    them, on damaged or crafted files."""
    reader, content = CORPUS[name]
    path = tmp_path / "file"
    path.write_bytes(content)
    assert opens(reader, path)
    rng = random.Random(20)
    accepted = 0
    for _ in range(800):
        path.write_bytes(mutate(content, rng))
        good, peak = measured(lambda: opens(reader, path))
        accepted += good
        assert peak < MEMORY
    assert 0 < accepted < 800  # both outcomes were met


@pytest.mark.parametrize("name", CORPUS)
@pytest.mark.parametrize("edges", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_every_integer_at_every_offset(tmp_path: Path, name: str, edges: int) -> None:
    """Each field of the file takes so many of the edge values in turn, whatever field it is."""
    reader, content = CORPUS[name]
    path = tmp_path / "file"
    turns = itertools.cycle((0, 1 << 31, 1 << 62, (1 << 64) - 1, 1 << 63))
    for at in range(min(len(content), 1200)):
        for edge in itertools.islice(turns, edges):
            path.write_bytes(content[:at] + struct.pack("<Q", edge) + content[at + 8 :])
            opens(reader, path)


@pytest.mark.slow
@pytest.mark.parametrize("name", CORPUS)
def test_many_mutated_files(tmp_path: Path, name: str) -> None:
    reader, content = CORPUS[name]
    path = tmp_path / "file"
    rng = random.Random(21)
    for _ in range(100_000):
        path.write_bytes(mutate(content, rng))
        opens(reader, path)


# Headers made from nothing

numbers = st.one_of(st.sampled_from(EDGES), st.integers(0, 300), st.integers(0, (1 << 64) - 1))
small = st.integers(0, 40)
names = st.one_of(st.binary(min_size=1, max_size=12), st.sampled_from([b"general.alignment", b"a", b"b", "é".encode()]))


def raw_arrays() -> st.SearchStrategy[bytes]:
    """Array values, mostly sound in form, with counts that need not be true."""
    leaf = st.one_of(
        st.builds(lambda k, b: struct.pack("<IQ", k, len(b)) + b, st.integers(0, 14), st.binary(max_size=40)),
        st.builds(lambda k, n, b: struct.pack("<IQ", k, n) + b, st.integers(0, 14), numbers, st.binary(max_size=40)),
        st.builds(lambda items: bytes(array(STRING, items)), st.lists(st.binary(max_size=10), max_size=5)),
    )
    return st.recursive(
        leaf,
        lambda inner: st.builds(
            lambda items: bytes(array(ARRAY, [Raw(i) for i in items])), st.lists(inner, max_size=3)
        ),
        max_leaves=8,
    )


pairs = st.tuples(
    names,
    st.one_of(st.integers(0, 14), st.just(ARRAY)),
    st.one_of(
        st.binary(max_size=16).map(Raw),
        raw_arrays().map(Raw),
        st.builds(lambda text, n: Raw(string(text, n)), st.binary(max_size=9), st.one_of(st.none(), numbers)),
    ),
)
tensors = st.builds(
    Tensor,
    name=names,
    dims=st.lists(st.one_of(st.sampled_from([1, 2, 32, 64, 256]), numbers), max_size=5),
    type_id=st.one_of(st.integers(0, 40), st.sampled_from([0, 2, 8, 12, 14])),
    data=st.binary(max_size=300),
    offset=st.one_of(st.none(), numbers, small.map(lambda n: n * 32)),
    ndim=st.one_of(st.none(), st.integers(0, 6)),
)


@common
@given(
    metadata=st.lists(pairs, max_size=4),
    infos=st.lists(tensors, max_size=4),
    counts=st.tuples(st.one_of(st.none(), numbers), st.one_of(st.none(), numbers)),
    version=st.sampled_from([2, 3, 3, 3]),
    tail=st.binary(max_size=600),
)
def test_generated_gguf(
    tmp_path: Path, metadata: list[Any], infos: list[Tensor], counts: tuple[int, int], version: int, tail: bytes
) -> None:
    content = gguf_file(metadata, infos, version=version, tensor_count=counts[0], pair_count=counts[1]) + tail
    path = tmp_path / "file"
    path.write_bytes(content)
    _, peak = measured(lambda: opens(GGUFFile, path))
    assert peak < MEMORY


@common
@given(content=st.binary(min_size=1, max_size=200))
def test_random_bytes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    length = struct.pack("<Q", len(content))
    for head in (b"", b"GGUF\x03\0\0\0", length, length + b"{"):
        path.write_bytes(head + content)
        opens(open_weights, path)
        opens(GGUFFile, path)
        opens(SafetensorsFile, path)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.integers(), st.floats(), st.text(max_size=5), st.just("F32")),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), inner, max_size=4),
    ),
    max_leaves=10,
)
entries = st.one_of(
    json_values,
    st.builds(
        entry,
        st.sampled_from(["F32", "U8", "BF16", "F8_E4M3", "Q4_0", ""]),
        st.lists(st.one_of(st.integers(0, 4), numbers), max_size=4),
        st.integers(0, 8),
        st.one_of(st.integers(0, 32), numbers),
    ),
)


@common
@given(
    header=st.dictionaries(st.one_of(st.text(max_size=4), st.just("__metadata__")), entries, max_size=4),
    data=st.binary(max_size=64),
    length=st.one_of(st.none(), numbers),
)
def test_generated_safetensors(tmp_path: Path, header: dict[str, Any], data: bytes, length: int | None) -> None:
    path = tmp_path / "file"
    path.write_bytes(safetensors_file(header, data, length=length))
    _, peak = measured(lambda: opens(SafetensorsFile, path))
    assert peak < MEMORY


@common
@given(sizes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=6), shuffle=st.randoms())
def test_sound_safetensors_are_accepted(tmp_path: Path, sizes: list[list[int]], shuffle: random.Random) -> None:
    """A reader that refuses everything would pass the other tests."""
    position, items = 0, []
    for i, shape in enumerate(sizes):
        count = 1
        for n in shape:
            count *= n
        items.append((f"t{i}", entry("F16", shape, position, position + 2 * count)))
        position += 2 * count
    shuffle.shuffle(items)
    path = tmp_path / "file"
    path.write_bytes(safetensors_file(dict(items), bytes(position)))
    assert opens(SafetensorsFile, path)


@common
@given(content=st.one_of(st.binary(max_size=60), json_values.map(lambda v: json.dumps({"weight_map": v}).encode())))
def test_generated_index(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(b"{" + content if not content.startswith(b"{") else content)
    with pytest.raises(ModelFormatError):
        open_safetensors(path)


# Memory in proportion to the file, also where the file is large


def sparse(path: Path, head: bytes, size: int) -> Path:
    """A file of `size` bytes that begins with `head` and goes on with zeros; it takes no room on disk."""
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size)
    return path


def test_counts_that_a_large_file_could_hold(tmp_path: Path) -> None:
    """With gigabytes of zeros behind it, a hostile count passes the check against the file's size: the limits hold."""
    size = 8 << 30
    key = gguf_file(pair_count=1) + string("k") + struct.pack("<I", ARRAY)
    heads = {
        "strings": key + struct.pack("<IQ", STRING, 60_000_000),
        "arrays": key + struct.pack("<IQ", ARRAY, 40_000_000),
        "tensors": gguf_file(tensor_count=100_000_000),
        "keys": gguf_file(pair_count=100_000_000),
        "string": gguf_file(pair_count=1) + string("k") + struct.pack("<IQ", STRING, 1 << 32),
        "numbers": key + struct.pack("<IQ", F32, 1 << 30),
    }
    for name, head in heads.items():
        path = sparse(tmp_path / "sparse", head, size)

        def attempt(path: Path = path) -> None:
            with pytest.raises(ModelFormatError):
                GGUFFile(path)

        _, peak = measured(attempt)
        assert peak < MEMORY, name


def test_large_tensors_are_mapped_not_read(tmp_path: Path) -> None:
    """Opening costs nothing per weight byte."""
    count = 1 << 30
    content = gguf_file(tensors=[Tensor("t", [1024, count // 1024], 0, b"")])
    path = sparse(tmp_path / "big.gguf", content, len(content) + 4 * count)

    def attempt() -> None:
        with GGUFFile(path) as file:
            assert file.tensors["t"].nbytes == 4 << 30
            assert file.tensors["t"].dequantize([0, count // 1024 - 1]).sum() == 0

    _, peak = measured(attempt)
    assert peak < MEMORY
