"""Prompts of the oracle files: prose, code, other languages and chats, from 5 to 1,500 tokens.

The texts are fixed; changing one changes the oracle files, which then have to be made anew.
"""

from __future__ import annotations

from pathlib import Path

PROSE = (
    "The harbour lay quiet under a thin skin of fog. Two ferries had already gone, and the third would not leave "
    "until the pilot returned from the lighthouse with his charts. Marta counted the crates on the quay for the second "
    "time: forty-one, one short of what the ledger promised. She knew where the last one was. It had fallen between "
    "the tracks at the old station, burst open, and filled the whole waiting room with the smell of oranges.",
    "Paper was made by hand for more than a thousand years before anybody thought of making it by machine. Rags were "
    "sorted, soaked and beaten until the fibres came apart, and a mould was dipped into the vat and lifted out with a "
    "single even movement. The sheet that formed on the wires was laid on felt, pressed and hung to dry. A printer who "
    "folded such a sheet three times got eight leaves, sixteen pages, and called the book an octavo.",
    "In the spring of that year the river rose higher than any flood mark on the bridge. Farmers moved their animals "
    "to the hills; the miller tied his boat to the bell tower. For nine days nobody crossed. When the water went down "
    "it left behind a layer of grey silt, a dead willow across the market square, and, on the steps of the town hall, "
    "a grand piano in nearly perfect condition that nobody ever claimed.",
    "A theory is a map. It leaves out almost everything, and that is why it can be folded and carried in a pocket. The "
    "question to ask of a map is not whether it is true but where it leads you when you follow it: to the well, or "
    "over the cliff. Measurements are the walks we take to find out. An honest report says how far we walked, in what "
    "weather, with what shoes, and how often we got lost before we decided to write down only the successful trips.",
    "The cook's instructions were brief. Slice the onions thinly, salt them, and leave them alone for an hour. Heat "
    "the oil until a crumb of bread dances in it. Fry the aubergines in batches, never crowding the pan, and drain "
    "them on paper. Layer them with the onions, tomatoes and torn basil, pour over the beaten eggs, and bake until "
    "the middle no longer trembles. Eat it lukewarm, with your hands, preferably on a wall overlooking the sea.",
    "Clocks disagreed in those days by as much as half an hour from one town to the next, and travellers set their "
    "watches anew at every stop. The railway put an end to it. Time was sent down the wire from the observatory at ten "
    "each morning, and one after another the church towers, the schools and the factories gave in. Only the "
    "fishermen went on by the tide, which is never on time and never late.",
)

CODE = (
    '''def merge_intervals(intervals):
    """Merge overlapping [start, end) intervals."""
    merged = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    return merged


class LRUCache:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.entries = OrderedDict()

    def get(self, key):
        if key not in self.entries:
            return None
        self.entries.move_to_end(key)
        return self.entries[key]

    def put(self, key, value):
''',
    """#include <stdio.h>
#include <stdlib.h>

static int compare(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double median(double *values, size_t n) {
    qsort(values, n, sizeof(double), compare);
    if (n % 2 == 1) return values[n / 2];
""",
    """SELECT customers.name, COUNT(orders.id) AS num_orders, SUM(orders.total) AS spent
FROM customers
LEFT JOIN orders ON orders.customer_id = customers.id
WHERE orders.created_at >= '2024-01-01'
GROUP BY customers.name
HAVING COUNT(orders.id) > 3
ORDER BY spent DESC;

-- The same per month:
""",
    """<!DOCTYPE html>
<html lang="en">
<head>
  <meta charset="utf-8">
  <title>Tide table</title>
  <style>
    table { border-collapse: collapse; }
    td, th { padding: 0.2em 1em; text-align: right; }
  </style>
</head>
<body>
  <h1>High water</h1>
""",
    'for i in range(1, 101):\n    if i % 15 == 0:\n        print("FizzBuzz")\n    elif',
    '{"name": "octavo", "leaves": 8, "pages": [1, 2, 3, 4, 5, 6, 7, 8], "folded": true, "size": {"width": 6, "height":',
)

LANGUAGES = (
    "Der Hafen lag still unter einer dünnen Nebelschicht, und die dritte Fähre wartete auf den Lotsen.",
    "Le papier fut fabriqué à la main pendant plus de mille ans avant que l'on songe à une machine.",
    "En la primavera de aquel año el río subió más alto que cualquier marca del puente, y nadie pudo cruzar.",
    "La ricetta era breve: affettare le cipolle, salarle e lasciarle riposare per un'ora intera.",
    "Теория похожа на карту: она опускает почти всё, и поэтому её можно носить в кармане.",
    "港は薄い霧に包まれて静かだった。三隻目の渡し船は水先案内人を待っていた。",
    "纸在手工制作了一千多年之后，人们才想到用机器来造。",
    "그해 봄에 강물은 다리의 어느 표시보다도 높이 올라왔다.",
    "كان الميناء هادئا تحت طبقة رقيقة من الضباب، وكانت العبارة الثالثة تنتظر.",
    "Η θεωρία είναι ένας χάρτης· αφήνει έξω σχεδόν τα πάντα.",
    "Saatler o günlerde bir kasabadan ötekine yarım saat kadar farklıydı.",
    "Emoji \U0001f6a2\U0001f32b\ufe0f and symbols: ∀x∈ℝ, x² ≥ 0; ½ + ¼ = ¾; “quotes” — dashes… \t tabs\n\n\nand "
    "  spaces",
)

SHORT = (
    "The capital of France is",
    "Once upon a time, there",
    "2 + 2 = 4, 3 + 3 =",
    "Dear Sir or Madam,\n\nI am writing",
    "import numpy as np\n\ndef softmax(x):",
    "Water boils at a temperature of",
    "Roses are red, violets are blue,",
    "1, 1, 2, 3, 5, 8, 13, 21,",
    "The three primary colours are red, blue and",
    "Translate to French: good morning =>",
)

QUESTIONS = (
    "What is a sheet of paper folded into eight leaves called?",
    "Write a haiku about the sea.",
    "Explain in two sentences why the sky is blue.",
    "List three things to check before lending someone your bicycle, with a short reason for each.",
    "Summarise the following text in one sentence.\n\n" + PROSE[1],
    "Find the bug in this code and explain how to fix it:\n\n" + CODE[0],
    "Translate into English: " + LANGUAGES[0],
    "My grandmother gave me 12 apples, I ate 5 and bought twice as many as were left. How many do I have?",
)

LICENSE = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
STORY = "\n\n".join(PROSE)


def chat(question: str, system: str = "You are a helpful AI assistant.") -> str:
    """A conversation in ChatML, as far as the answer."""
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def smollm2_prompts() -> list[tuple[str, int | None]]:
    """50 texts, each with the number of tokens it is cut to, or None for all of it."""
    whole = [*SHORT, *LANGUAGES, *CODE, *PROSE, *(chat(question) for question in QUESTIONS)]  # 42 of up to 300 tokens
    long: list[tuple[str, int | None]] = [
        (STORY, 380),
        (chat("Which of these paragraphs mentions a piano?\n\n" + STORY), None),
        ("\n".join(LANGUAGES), 450),
        (LICENSE, 640),
        (LICENSE[3000:], 850),
        ("\n\n".join([*CODE, *PROSE]), 1100),
        (chat("Read this licence, then say who may use the work.\n\n" + LICENSE[:4500]), None),
        (LICENSE, 1500),
    ]
    return [(text, None) for text in whole] + long


def gemma3_prompts() -> list[tuple[str, int | None]]:
    """8 texts; the longest goes past the window of 512 tokens."""
    return [
        (SHORT[0], None),
        (SHORT[7], None),
        (CODE[4], None),
        (LANGUAGES[5], None),
        (PROSE[0], None),
        (CODE[0], None),
        ("\n".join(LANGUAGES), 300),
        (LICENSE, 700),
    ]
