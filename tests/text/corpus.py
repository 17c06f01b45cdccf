"""Varied strings for comparing tokenizers: a hand-written list and seeded random ones."""

from __future__ import annotations

import functools
import random

HAND_WRITTEN = [
    # ordinary and code
    "Hello, world!",
    "The quick brown fox jumps over the lazy dog.",
    "don't can't won't I'll I'd you've they're it's DON'T I'LL",
    "def f(x):\n    return x ** 2  # squared\n",
    'for (int i = 0; i < 10; ++i) {\n\tprintf("%d\\n", i);\n}\n',
    '{"key": [1, 2.5, null, true], "nested": {"a": "\\u00e9"}}',
    "SELECT * FROM t WHERE a='b' AND c>=3;",
    '<html>\n<body class="x">text</body>\n</html>',
    "https://example.com/a/b?c=d&e=%20f#g",
    "x = [[0]*10 for _ in range(10)]; y := λx.x+1",
    "#!/bin/bash\nset -euo pipefail\necho \"${HOME:-/root}\" | sed 's/a/b/g'",
    "\\documentclass{article}\\begin{equation}\\int_0^\\infty e^{-x^2}dx\\end{equation}",
    # digits
    "0",
    "7",
    "12",
    "123",
    "1234",
    "1234567890",
    "3.14159",
    "1,000,000.00",
    "2024-01-31T23:59:59Z",
    "0x1F 1e-10 1_000",
    "٠١٢٣٤٥٦٧٨٩",
    "१२३",
    "Ⅷ ½ ² ₃ ①",
    "phone: +49 (0)30 123456",
    "v1.2.3-rc4",
    "a1b2c3",
    " 1 22  333   4444",
    # white space
    "",
    " ",
    "  ",
    "   ",
    "    ",
    "\t",
    "\n",
    "\r\n",
    "\n\n\n",
    " \n \n ",
    "\t\t\tx",
    "a  b   c    d",
    " leading",
    "trailing ",
    "\u00a0nbsp\u00a0",
    "em\u2003space thin\u2009space",
    "\u3000ideographic\u3000",
    "zero\u200bwidth",
    "line\u2028sep\u2029para",
    "a\n  b\n    c\n      d",
    " " * 31,
    " " * 32,
    " " * 33,
    " " * 100,
    "\n" * 40,
    "\t" * 40,
    "x" + " " * 17 + "y",
    "\x0b\x0c\x1c\x85",
    # CJK and others
    "今天天气很好，我们去公园吧。",
    "東京は日本の首都です。",
    "서울은 대한민국의 수도입니다.",
    "中文English混合123文本",
    "日本語 と English",
    "Привет, как дела?",
    "Γειά σου Κόσμε",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "வணக்கம் உலகம்",
    "ሰላም ልዑል",
    "ສະບາຍດີ",
    "გამარჯობა",
    "𠀀𠀁𠀂 rare ideographs 𪛖",
    "Zażółć gęślą jaźń",
    "Đặng Thùy Trâm",
    "ÅÄÖ åäö ß ﬁ ﬂ ŉ",
    "İstanbul ıssız",
    "Ǆ ǅ ǆ",
    # emoji
    "😀",
    "😀😁😂",
    "👨‍👩‍👧‍👦 family",
    "🏳️‍🌈🏴‍☠️",
    "👍🏽👍🏿",
    "🇩🇪🇫🇷🇯🇵",
    "1️⃣2️⃣#️⃣",
    "❤️‍🔥",
    "text😀text",
    "🧑🏻‍🤝‍🧑🏿",
    "\u200d\ufe0f",
    "☺ vs ☺️",
    # right to left, combining, control
    "مرحبا بالعالم",
    "שלום עולם",
    "English مختلط עברית mixed",
    "\u202eoverride\u202c",
    "e\u0301 vs é",
    "a\u0300\u0301\u0302\u0303",
    "Z̴̰̈́a̷͔͑l̵̟̈g̶͖̑ȍ̸͜",
    "\u0301starts with a mark",
    "क्षि",
    "นี่",
    "\x00",
    "a\x00b\x00",
    "\x01\x02\x03\x1b[31mred\x1b[0m",
    "\x7f\x80\x9f",
    "\ufeffBOM",
    "\ufffd replacement",
    "\ue000 private",
    "\U0010ffff",
    "\ufffe\uffff",
    # special tokens in the text, whole and broken
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|>",
    "a<|endoftext|>b",
    "<|im_end|><|im_end|>",
    "<|im_start",
    "|im_end|>",
    "<<|im_end|>>",
    "<bos>text<eos>",
    "<start_of_turn>user\nHi<end_of_turn>\n",
    "<unused12><unused123>",
    "<unused",
    "<pad><unk><mask>",
    "<s>[INST] x [/INST]</s>",
    "<|begin_of_text|>x<|eot_id|>",
    "<0x41><0x0A>",
    "</s>",
    "<h1>t</h1>",
    " <|im_end|> ",
    "▁",
    "▁▁▁",
    "a▁b",
    "▁the",
    " ▁ ",
    "[multimodal]",
    ">▁</",
    "> </",
    ">  </b>",
    "a> </a> b> </c>",
    # long words and repetition
    "a" * 300,
    "ab" * 150,
    "Donaudampfschifffahrtsgesellschaftskapitän",
    "pneumonoultramicroscopicsilicovolcanoconiosis",
    "-" * 80,
    "=" * 79,
    "*" * 33 + " " + "#" * 7,
    "!?" * 50,
    "hahaha" * 20,
    "ACGT" * 60,
    "…" * 9,
    "'" * 10,
    "''s's'S'll",
]

_ALPHABETS = [
    [chr(code) for code in range(0x20, 0x7F)],
    [chr(code) for code in range(0x20)],
    list(" \t\n\r  \u00a0\u3000"),
    list("0123456789.,-+ eExX"),
    [chr(code) for code in range(0xA0, 0x250)],
    [chr(code) for code in range(0x370, 0x600)],
    [chr(code) for code in range(0x600, 0x700)],
    [chr(code) for code in range(0x900, 0xA00)],
    [chr(code) for code in range(0x300, 0x370)],
    [chr(code) for code in range(0x3040, 0x3100)],
    [chr(code) for code in range(0x4E00, 0x9FA6)],
    [chr(code) for code in range(0xAC00, 0xD7A4)],
    [chr(code) for code in range(0x1F300, 0x1FAFF)],
    list("\u200d\ufe0f👨👩👧👦🏽❤🏳🌈"),
    list("'stremvldSTREMVLD’ "),
    list("_-/\\(){}[]<>=!&|^%$#@;:\"'`~?*+.,"),
]
# fmt: off
_WORDS = [
    "the", "of", "and", "import", "return", "class", "self", "None", "True", "function", "const", "let",
    "var", "print", "hello", "world", "we're", "it's", "Einstein", "electroencephalography", "naïve",
    "façade", "北京", "東京", "서울", "Москва", "مرحبا", "😀", "👍🏽", "42", "1999", "3.14", "foo_bar", "fooBar",
    "FOO", "x1", "::", "->", "!=", "//", "/*", "*/",
]
# fmt: on
_SEPARATORS = [" ", " ", " ", "  ", "\n", "\n\n", "\t", "", ", ", ". ", "\r\n", "    "]


def corpus(seed: int = 20, specials: tuple[str, ...] = ("<|im_end|>", "<bos>", "</s>")) -> list[str]:
    """At least 1,200 strings, the same every time; `specials` are sprinkled in."""
    return list(_corpus(seed, specials))


@functools.cache
def _corpus(seed: int, specials: tuple[str, ...]) -> list[str]:
    rng = random.Random(seed)
    strings = list(HAND_WRITTEN)
    for _ in range(400):  # within one alphabet
        alphabet = rng.choice(_ALPHABETS)
        strings.append("".join(rng.choices(alphabet, k=rng.randint(1, 40))))
    for _ in range(300):  # across alphabets
        strings.append("".join(rng.choice(rng.choice(_ALPHABETS)) for _ in range(rng.randint(1, 60))))
    for _ in range(300):  # words
        parts: list[str] = []
        for _ in range(rng.randint(1, 25)):
            parts += [rng.choice(_WORDS), rng.choice(_SEPARATORS)]
        strings.append("".join(parts))
    for _ in range(150):  # any code point but surrogates
        codes = (rng.randrange(0x110000 - 0x800) for _ in range(rng.randint(1, 20)))
        strings.append("".join(chr(code if code < 0xD800 else code + 0x800) for code in codes))
    for _ in range(100):  # special tokens among words
        parts = [rng.choice([*specials, *_WORDS, " ", "\n"]) for _ in range(rng.randint(1, 12))]
        strings.append("".join(parts))
    return strings
