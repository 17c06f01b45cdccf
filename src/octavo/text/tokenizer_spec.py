"""What may stand in a ``tokenizer.json``. The file is untrusted, and the library that runs it ends the process where
memory runs out and hangs where an expression backtracks: so every part is checked before the library sees it.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from octavo.core.errors import ModelFormatError, shown
from octavo.core.model_folder import check_amount, read_file
from octavo.text.added_tokens import check_lengths
from octavo.text.library import MAX_TEXT_BYTES
from octavo.text.regex_shape import MAX_STEPS, SLOW, UnsafePatternError, check_pattern

MAX_FILE_BYTES = 64 << 20  # Gemma 3's has 33 MB
# In one of a million tokens. Gemma 3's has 530,000 brackets and 1.9 million commas.
_MAX_LISTS, _MAX_OBJECTS, _MAX_COMMAS = 1 << 20, 1 << 17, 1 << 22
MAX_TOKEN_ID = 2**31 - 1
MAX_GROWTH = 64  # how much longer than a text its replacements together may make it
_UNICODE_GROWTH = 18  # U+FDFA becomes as many characters; once, since what comes of it grows no more
_MAX_TOKEN = 4096  # characters
_MAX_SCORED = 128  # bytes of a token of Unigram: at every character all that begin there are looked at. Real: 48
_MAX_LITERAL = 256  # characters of a text to find
_MAX_STEPS = 32  # of all sequences together, and of the template of a post-processor; real files have at most 10
_MAX_SHORT = 64  # characters of a prefix, suffix or replacement
_MAX_CHARSMAP = 8 << 20  # bytes
_KEYS = frozenset(
    "version truncation padding added_tokens normalizer pre_tokenizer post_processor decoder model".split()
)


class TokenizerSpec:
    """A checked ``tokenizer.json``."""

    def __init__(self, path: object, data: bytes) -> None:
        """Raises ModelFormatError naming ``tokenizer.json`` and the part of it at fault."""
        self._path = path
        self.patterns: list[str] = []  # the expressions in it
        self.max_token_id = -1
        self._replaced, self._composed = 1.0, 1.0
        self._table = False  # whether a table of the file normalises text
        self._parts = 0  # steps of all sequences
        self._steps_of_patterns = 0
        self._moves: str | None = None  # a part that may make runs of characters
        spec = self._parse(data)
        for key in spec.keys() - _KEYS:
            raise self._error(key, "is not a part of a tokenizer")
        self._model(spec.get("model"))
        self._added_tokens(spec.get("added_tokens"))
        self._each("normalizer", spec.get("normalizer"), self._normalizer, "normalizers")
        self._each("pre_tokenizer", spec.get("pre_tokenizer"), self._pre_tokenizer, "pretokenizers")
        self._each("post_processor", spec.get("post_processor"), self._post_processor, "processors")
        self._each("decoder", spec.get("decoder"), self._decoder, "decoders")
        slow = next((pattern for pattern in self.patterns if pattern in SLOW), None)
        if slow is not None and self._moves is not None:  # then the runs of a text say nothing
            raise self._error(self._moves, f"is not taken together with the expression {slow}")

    @property
    def runs(self) -> list[str]:
        """Classes of characters whose runs in a text must be short, for an expression's sake."""
        return [SLOW[pattern] for pattern in self.patterns if pattern in SLOW]

    def takes(self, text: str) -> bool:
        """Whether a text stays within MAX_TEXT_BYTES when it is normalised."""
        size = len(text.encode())
        if size * self._replaced * self._composed <= MAX_TEXT_BYTES:
            return True
        if self._table or size * self._replaced > MAX_TEXT_BYTES:
            return False
        return len(unicodedata.normalize("NFKD", text).encode()) * self._replaced <= MAX_TEXT_BYTES

    def _error(self, part: str, message: str) -> ModelFormatError:
        return ModelFormatError(self._path, f"tokenizer.json: {part}", message)

    def _parse(self, data: bytes) -> dict[str, Any]:
        def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            found = dict(pairs)
            if len(found) < len(pairs):  # the library may read the other one
                raise ValueError("a key stands there twice")
            return found

        check_amount(self._path, "tokenizer.json", data, _MAX_LISTS, _MAX_OBJECTS, _MAX_COMMAS)
        try:
            spec = json.loads(data, object_pairs_hook=once)
        except (ValueError, RecursionError) as error:
            raise ModelFormatError(self._path, "tokenizer.json", f"not valid JSON: {error}") from None
        if not isinstance(spec, dict):
            raise ModelFormatError(self._path, "tokenizer.json", f"expected an object, found {type(spec).__name__}")
        return spec

    # --- values ---

    def _object(self, part: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self._error(part, f"expected an object, found {shown(value)}")
        return value

    def _list(self, part: str, value: Any, most: int = _MAX_STEPS) -> list[Any]:
        if not isinstance(value, list) or len(value) > most:
            raise self._error(part, f"expected a list of at most {most}, found {shown(value)}")
        return value

    def _text(self, part: str, value: Any, most: int = _MAX_SHORT, least: int = 0) -> str:
        if not isinstance(value, str) or not least <= len(value) <= most:
            raise self._error(part, f"expected a string of {least} to {most} characters, found {shown(value)}")
        return value

    def _flags(self, part: str, spec: dict[str, Any], *names: str) -> None:
        for name in names:
            if spec.get(name) is not None and not isinstance(spec[name], bool):
                raise self._error(f"{part}.{name}", f"expected true or false, found {shown(spec[name])}")

    def _number(self, part: str, value: Any, low: int, high: int) -> int:
        if type(value) is not int or not low <= value <= high:
            raise self._error(part, f"expected an integer from {low} to {high}, found {shown(value)}")
        return value

    def _choice(self, part: str, value: Any, *allowed: str) -> str:
        if value not in allowed:
            raise self._error(part, f"expected one of {', '.join(allowed)}, found {shown(value)}")
        return value

    def _pattern(self, part: str, value: Any) -> tuple[str, bool]:
        """A text to find, and whether it is an expression."""
        spec = self._object(part, value)
        if list(spec) == ["String"]:
            text = self._text(part, spec["String"], _MAX_LITERAL, least=1)
            self._count_steps(part, len(text))
            return text, False
        if list(spec) == ["Regex"]:
            pattern = self._text(part, spec["Regex"], 1 << 20)
            try:
                steps = check_pattern(pattern)
            except UnsafePatternError as error:
                raise self._error(part, f"{shown(pattern)} is not run on text: {error}") from None
            self._count_steps(part, steps)
            self.patterns.append(pattern)
            return pattern, True
        raise self._error(part, f"expected an object with String or Regex, found {shown(value)}")

    def _count_steps(self, part: str, steps: int) -> None:
        self._steps_of_patterns += steps
        if self._steps_of_patterns > MAX_STEPS:
            raise self._error(part, f"all expressions together may take more than {MAX_STEPS} steps at a character")

    def _each(self, part: str, value: Any, check: Callable[[str, str, dict[str, Any]], None], inner: str) -> None:
        """Check a part, or each of a sequence of them."""
        for name, step in self._steps(part, value, inner, 0):
            check(name, step["type"], step)

    def _steps(self, part: str, value: Any, inner: str, depth: int) -> Iterator[tuple[str, dict[str, Any]]]:
        if value is None:
            return
        spec = self._object(part, value)
        self._parts += 1
        if self._parts > _MAX_STEPS:
            raise self._error(part, f"more than {_MAX_STEPS} parts in all")
        if not isinstance(spec.get("type"), str):
            raise self._error(f"{part}.type", f"expected a name, found {shown(spec.get('type'))}")
        if spec["type"] != "Sequence":
            yield part, spec
            return
        if depth > 3:
            raise self._error(part, "sequences nested more than 3 deep")
        for number, step in enumerate(self._list(f"{part}.{inner}", spec.get(inner))):
            yield from self._steps(f"{part}.{inner}[{number}]", step, inner, depth + 1)

    def _unknown(self, part: str, kind: str, known: str) -> ModelFormatError:
        return self._error(f"{part}.type", f"{shown(kind)} is not known; known are {known}")

    # --- parts ---

    def _model(self, value: Any) -> None:
        spec = self._object("model", value)
        kind = spec.get("type", "BPE" if "merges" in spec else "Unigram" if "unk_id" in spec else None)
        self._choice("model.type", kind, "BPE", "WordPiece", "WordLevel", "Unigram")
        for name in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
            if spec.get(name) is not None:
                self._text(f"model.{name}", spec[name])
        self._flags("model", spec, "fuse_unk", "byte_fallback", "ignore_merges")
        if spec.get("dropout"):
            raise self._error("model.dropout", f"must be null or 0, not {shown(spec['dropout'])}: it is for training")
        if spec.get("max_input_chars_per_word") is not None:
            self._number("model.max_input_chars_per_word", spec["max_input_chars_per_word"], 0, 1000)
        if kind == "Unigram":
            self.max_token_id = self._scored(spec.get("vocab")) - 1
            if spec.get("unk_id") is not None:
                self._number("model.unk_id", spec["unk_id"], 0, max(self.max_token_id, 0))
            return
        vocab = self._object("model.vocab", spec.get("vocab"))
        ids = vocab.values()
        sound = set(map(type, ids)) <= {int} and min(ids, default=0) >= 0 and max(ids, default=0) <= MAX_TOKEN_ID
        if not sound or max(map(len, vocab), default=0) > _MAX_TOKEN:
            message = f"tokens have at most {_MAX_TOKEN} characters, and ids from 0 to {MAX_TOKEN_ID}"
            raise self._error("model.vocab", message)
        self.max_token_id = max(vocab.values(), default=-1)
        if kind == "BPE" and not isinstance(spec.get("merges"), list):
            raise self._error("model.merges", f"expected a list, found {shown(spec.get('merges'))}")
        prefix = spec.get("continuing_subword_prefix")
        if kind == "BPE" and prefix:  # the library cuts it off without looking, and may end the process
            for merge in spec["merges"]:
                parts = merge.split(" ") if isinstance(merge, str) else merge
                whole = isinstance(parts, list) and len(parts) == 2 and isinstance(parts[1], str)
                if not whole or not parts[1].startswith(prefix):
                    message = f"{shown(merge)}: the second must begin with the prefix {prefix!r}"
                    raise self._error("model.merges", message)

    def _scored(self, vocab: Any) -> int:
        """How many tokens there are."""
        entries = self._list("model.vocab", vocab, MAX_TOKEN_ID)
        for entry in entries:
            text, score = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
            sound = isinstance(text, str) and len(text.encode("utf-8", "surrogatepass")) <= _MAX_SCORED
            if not sound or not isinstance(score, int | float) or not math.isfinite(score):
                message = f"expected a text of at most {_MAX_SCORED} bytes and a finite score, found {shown(entry)}"
                raise self._error("model.vocab", message)
        return len(entries)

    def _added_tokens(self, value: Any) -> None:
        contents = []
        for number, token in enumerate(self._list("added_tokens", [] if value is None else value, 1 << 17)):
            part = f"added_tokens[{number}]"
            spec = self._object(part, token)
            contents.append(self._text(f"{part}.content", spec.get("content"), _MAX_TOKEN))
            token_id = self._number(f"{part}.id", spec.get("id"), 0, MAX_TOKEN_ID)
            self.max_token_id = max(self.max_token_id, token_id)
            self._flags(part, spec, "single_word", "lstrip", "rstrip", "normalized", "special")
        try:
            check_lengths(contents)
        except ValueError as error:
            raise self._error("added_tokens", str(error)) from None

    def _normalizer(self, part: str, kind: str, spec: dict[str, Any]) -> None:
        if kind not in ("NFC", "NFD"):
            self._moves = part
        if kind == "Replace":
            pattern, is_regex = self._pattern(f"{part}.pattern", spec.get("pattern"))
            size = _size(self._text(f"{part}.content", spec.get("content")))
            self._grow(part, 1 + size if is_regex else size / len(pattern))
        elif kind == "Prepend":  # to what stands between two added tokens
            self._grow(part, 1 + _size(self._text(f"{part}.prepend", spec.get("prepend"))) / 2)
        elif kind == "Precompiled":
            self._charsmap(f"{part}.precompiled_charsmap", spec.get("precompiled_charsmap"))
            self._composed, self._table = _UNICODE_GROWTH, True
        elif kind == "NFKC":
            self._composed = _UNICODE_GROWTH
        elif kind == "NFKD":  # no known model that writes text has it
            raise self._error(part, "NFKD is not run: for a run of accents the library takes time in its square")
        elif kind in ("NFC", "NFD"):
            self._composed = max(self._composed, 4)
        elif kind in ("ByteLevel", "BertNormalizer"):
            self._flags(part, spec, "clean_text", "handle_chinese_chars", "strip_accents", "lowercase")
            self._grow(part, 4)
        elif kind in ("Lowercase", "Strip", "StripAccents", "Nmt"):
            self._flags(part, spec, "strip_left", "strip_right")
        else:
            known = "BertNormalizer, ByteLevel, Lowercase, NFC, NFD, NFKC, Nmt, Precompiled, Prepend, Replace, "
            raise self._unknown(part, kind, known + "Strip, StripAccents")

    def _grow(self, part: str, factor: float) -> None:
        self._replaced *= max(1.0, factor)
        if self._replaced > MAX_GROWTH:
            raise self._error(
                part, f"replacements may make texts {self._replaced:g} times as long; {MAX_GROWTH} is most"
            )

    def _charsmap(self, part: str, value: Any) -> None:
        """The length of a table in four bytes, the table, a double array over UTF-8 with an entry of four bytes each,
        and the texts that it points to, each ended by a zero byte."""
        text = "" if value is None else self._text(part, value, _MAX_CHARSMAP)
        try:
            data = base64.b64decode(text, validate=True)
            size = int.from_bytes(data[:4], "little")
            texts = data[4 + size :].decode()
        except (binascii.Error, UnicodeDecodeError) as error:
            raise self._error(part, f"malformed: {error}") from None
        if not data and value is None:
            return
        if size % 1024 or not 1024 <= size <= len(data) - 4:
            raise self._error(part, f"malformed: a table of {size} bytes in {len(data)}")
        most = max(map(_size, texts.split("\0")))
        if most > _MAX_SHORT:
            raise self._error(part, f"a character becomes more than {_MAX_SHORT}")
        self._grow(part, most / _UNICODE_GROWTH)
        self._check_table(part, data[4 : 4 + size], data[4 + size :])

    def _check_table(self, part: str, table: bytes, texts: bytes) -> None:
        """Every step from any entry must end inside, and every value be where a character begins."""
        import numpy as np

        units = np.frombuffer(table, "<u4")
        inner = (units >> 31) == 0  # the others are values
        offsets = (units >> 10) << ((units & (1 << 9)) >> 6)
        furthest = (np.arange(len(units), dtype=np.uint64) ^ offsets.astype(np.uint64)) | 0xFF
        if (furthest[inner] >= len(units)).any():
            raise self._error(part, "malformed: the table points outside itself")
        values = units[~inner] & 0x7FFFFFFF
        begins = np.frombuffer(texts, np.uint8) & 0xC0 != 0x80
        if (values >= len(begins)).any() or not begins[values].all():
            raise self._error(part, "malformed: the table points beside its texts")

    def _pre_tokenizer(self, part: str, kind: str, spec: dict[str, Any]) -> None:
        behaviors = ("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")
        if kind == "Split":
            self._pattern(f"{part}.pattern", spec.get("pattern"))
            self._choice(f"{part}.behavior", spec.get("behavior"), *behaviors)
            self._flags(part, spec, "invert")
        elif kind == "Metaspace":
            if self._text(f"{part}.replacement", spec.get("replacement"), 1, least=1) != "\u2581":
                self._moves = part
            if spec.get("prepend_scheme") is not None:
                self._choice(f"{part}.prepend_scheme", spec["prepend_scheme"], "first", "never", "always")
            self._flags(part, spec, "split", "add_prefix_space")
        elif kind == "Punctuation":
            self._choice(f"{part}.behavior", spec.get("behavior", "Isolated"), *behaviors)
        elif kind == "CharDelimiterSplit":
            self._text(f"{part}.delimiter", spec.get("delimiter"), 1, least=1)
        elif kind == "FixedLength":
            self._number(f"{part}.length", spec.get("length"), 1, 1 << 20)
        elif kind in ("BertPreTokenizer", "ByteLevel", "Digits", "UnicodeScripts", "Whitespace", "WhitespaceSplit"):
            self._flags(part, spec, "add_prefix_space", "trim_offsets", "use_regex", "individual_digits")
        else:
            known = "BertPreTokenizer, ByteLevel, CharDelimiterSplit, Digits, FixedLength, Metaspace, Punctuation, "
            raise self._unknown(part, kind, known + "Split, UnicodeScripts, Whitespace, WhitespaceSplit")

    def _post_processor(self, part: str, kind: str, spec: dict[str, Any]) -> None:
        if kind == "TemplateProcessing":
            for name, most in (("single", 1), ("pair", 2)):
                pieces = self._list(f"{part}.{name}", spec.get(name))
                if sum(isinstance(piece, dict) and "Sequence" in piece for piece in pieces) > most:
                    raise self._error(f"{part}.{name}", f"has more than {most} Sequence")
            tokens = self._object(f"{part}.special_tokens", spec.get("special_tokens"))
            for name, token in list(tokens.items())[: _MAX_STEPS + 1]:
                where = f"{part}.special_tokens.{name[:40]}"
                for token_id in self._list(f"{where}.ids", self._object(where, token).get("ids")):
                    self._number(f"{where}.ids", token_id, 0, MAX_TOKEN_ID)
                for text in self._list(f"{where}.tokens", token.get("tokens")):
                    self._text(f"{where}.tokens", text, _MAX_TOKEN)
            if len(tokens) > _MAX_STEPS:
                raise self._error(f"{part}.special_tokens", f"more than {_MAX_STEPS}")
        elif kind in ("BertProcessing", "RobertaProcessing"):
            for name in ("sep", "cls"):
                text, token_id = (*self._list(f"{part}.{name}", spec.get(name), 2), None, None)[:2]
                self._text(f"{part}.{name}", text, _MAX_TOKEN)
                self._number(f"{part}.{name}", token_id, 0, MAX_TOKEN_ID)
            self._flags(part, spec, "add_prefix_space", "trim_offsets")
        elif kind == "ByteLevel":
            self._flags(part, spec, "add_prefix_space", "trim_offsets", "use_regex")
        else:
            raise self._unknown(part, kind, "BertProcessing, ByteLevel, RobertaProcessing, TemplateProcessing")

    def _decoder(self, part: str, kind: str, spec: dict[str, Any]) -> None:
        """Decoding is not left to the library; this only must load."""
        if kind == "Replace":
            self._pattern(f"{part}.pattern", spec.get("pattern"))
            self._text(f"{part}.content", spec.get("content"))
        elif kind == "Strip":
            self._text(f"{part}.content", spec.get("content"), 1, least=1)
            for name in ("start", "stop"):
                self._number(f"{part}.{name}", spec.get(name), 0, 1000)


def _size(text: str) -> int:
    """The length of what a text becomes, in characters of at most two bytes: such as have three weigh no more."""
    return max(len(text), len(text.encode("utf-8", "surrogatepass")) // 2)


def read_spec(path: Path, name: str) -> tuple[TokenizerSpec, bytes]:
    """The file of this name in a model folder, checked, and its bytes. Raises ModelFormatError."""
    data = read_file(path, name, MAX_FILE_BYTES)
    if data is None:
        raise ModelFormatError(path, name, "cannot be read: there is no such file")
    return TokenizerSpec(path, data), data
