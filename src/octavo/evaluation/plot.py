"""An evaluation as a picture: scores and seconds over the length of the document. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.core.errors import InvalidRequestError
from octavo.evaluation.modes import MODES
from octavo.evaluation.summary import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg", ".pdf")
_WIDTH, _HEIGHT = 2.6, 4.6  # inches: of a task, and of the whole
_COLORS = dict(zip(MODES, ("#4c5a69", "#c2571a", "#1f77b4"), strict=True))
_GAP = 0.12  # between modes at one length, of the distance between two lengths


def check_plot(field: str, path: Path) -> None:
    """Whether a plot can be drawn and has a name that says how. Raises InvalidRequestError naming `field`."""
    if path.suffix.lower() not in SUFFIXES:
        raise InvalidRequestError(field, f"must end in {', '.join(SUFFIXES)}, not {path.suffix or path.name!r}")
    if find_spec("matplotlib") is None:
        raise InvalidRequestError(field, "needs matplotlib: pip install 'octavo[eval]'")


def save_plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw a column for each task, scores with their intervals above seconds. Raises OSError."""
    from matplotlib.figure import Figure  # not pyplot: no window, and nothing that is shared

    tasks = list(dict.fromkeys(row.task for row in rows))
    modes = [mode for mode in MODES if any(row.mode == mode for row in rows)]
    figure = Figure(figsize=(_WIDTH * max(len(tasks), 2), _HEIGHT), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    grid = figure.subplots(2, len(tasks), sharex="col", sharey="row", squeeze=False)
    for (above, below), task in zip(grid.T, tasks, strict=True):
        above.set_title(task, fontsize="medium")
        _draw(above, below, [row for row in rows if row.task == task], modes)
    grid[0, 0].set(ylabel="score", ylim=(-0.05, 1.05))
    grid[1, 0].set(ylabel="seconds (median)")
    grid[1, 0].set_ylim(bottom=0)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(modes), frameon=False)
    figure.savefig(path, format=path.suffix[1:].lower(), dpi=150)


def _draw(above: Axes, below: Axes, rows: Sequence[Row], modes: Sequence[str]) -> None:
    """Lengths stand side by side at equal distances; modes a little apart, so that intervals do not hide each other."""
    lengths = sorted({row.length for row in rows})
    for number, mode in enumerate(modes):
        shift = (number - (len(modes) - 1) / 2) * _GAP
        found = sorted((row for row in rows if row.mode == mode), key=lambda row: row.length)
        style: dict[str, Any] = {"color": _COLORS[mode], "label": mode, "marker": "o", "markersize": 4}
        scored = [(lengths.index(row.length) + shift, row.score) for row in found if row.score is not None]
        # At least 0: where all scores are equal, rounding may put the mean outside.
        errors = [[max(s.mean - s.low, 0) for _, s in scored], [max(s.high - s.mean, 0) for _, s in scored]]
        above.errorbar([x for x, _ in scored], [s.mean for _, s in scored], errors, capsize=3, **style)
        timed = [(lengths.index(row.length) + shift, row.seconds) for row in found if row.seconds is not None]
        below.plot([x for x, _ in timed], [seconds for _, seconds in timed], **style)
    below.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    below.set_xlim(-0.5, len(lengths) - 0.5)
    below.set_xlabel("tokens")
