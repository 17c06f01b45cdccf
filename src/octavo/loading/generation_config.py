"""What a model's files recommend for sampling: generation_config.json of a folder, general.sampling.* of a GGUF file.

It is advice. A value that cannot be used is told and left out; the model can be used all the same.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from octavo.core.errors import InvalidRequestError
from octavo.core.model_folder import read_object
from octavo.core.params import SamplingParams

log = logging.getLogger(__name__)

# field of SamplingParams, as transformers names it too -> llama.cpp's key
GGUF_KEYS = {
    "temperature": "general.sampling.temp",
    "top_p": "general.sampling.top_p",
    "top_k": "general.sampling.top_k",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}
_MAX_BYTES = 1 << 20


def generation_config_of(path: Path, metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """Fields of SamplingParams that the model in `path` asks for; `metadata` is a GGUF file's, None of a folder.

    Raises ModelFormatError for a generation_config.json that is not a JSON object.
    """
    if metadata is not None:
        keys = GGUF_KEYS
        values = {name: _rounded(metadata.get(key)) for name, key in keys.items()}
    else:
        keys = {name: f"generation_config.json: {name}" for name in GGUF_KEYS}
        stored = read_object(path, "generation_config.json", _MAX_BYTES)
        values = {name: stored.get(name) for name in keys}
        sampled = stored.get("do_sample")
        if not isinstance(sampled, bool | None):
            log.warning("%s: generation_config.json: do_sample: must be true or false; it is not used", path)
        if sampled is False:  # transformers then ignores the others
            values |= {"temperature": 0.0, "top_p": None, "top_k": None, "min_p": None}
    return {
        name: value for name, value in values.items() if value is not None and _is_usable(path, keys[name], name, value)
    }


def _rounded(value: Any) -> Any:
    """GGUF files hold float32: 0.95 is 0.95 again, not 0.949999988."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _is_usable(path: Path, key: str, name: str, value: Any) -> bool:
    try:
        SamplingParams(**{name: value})
    except InvalidRequestError as error:
        log.warning("%s: %s: %s; it is not used", path, key, error.problem)
        return False
    return True
