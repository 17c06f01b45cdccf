"""Draws the ratios of Octavo's figures to its peers' over the runs that compare.py recorded. Needs matplotlib.

    python benchmarks/plot.py --model smollm2 --instruction-set avx512 ratios.svg

A panel for each work, a line for each peer: the median of a run's rounds, from the lowest to the highest.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import history

COLUMNS = 3


def chosen(entries: list[dict[str, Any]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Those that the filters leave, in the order of their dates; all of one model, on one kind of machine."""
    left = [
        entry
        for entry in sorted(entries, key=lambda entry: entry["date"])
        if args.model.lower() in entry["model"].lower()
        and args.processor.lower() in entry["machine"]["processor"].lower()
        and args.instruction_set in (None, entry["instruction_set"])
        and args.threads in (None, entry["machine"]["threads"])
    ]
    kinds = list(dict.fromkeys(kind(entry) for entry in left))
    if not left:
        raise SystemExit(f"{args.history} has no such run")
    if len(kinds) > 1:
        raise SystemExit(
            "the runs are of several kinds, whose ratios make no line; choose one with --model, --instruction-set, "
            "--threads or --processor:\n" + "\n".join(f"  {one}" for one in kinds)
        )
    return left


def kind(entry: dict[str, Any]) -> str:
    machine = entry["machine"]
    return f"{entry['model']}, {entry['instruction_set']}, {machine['threads']} threads of {machine['processor']}"


Point = tuple[int, float, float, float]  # the run's place, and its ratio: median, lowest and highest


def lines(entries: list[dict[str, Any]], peers: list[str]) -> dict[tuple[str, str], dict[str, list[Point]]]:
    """For each work and its unit: the points of each peer."""
    found: dict[tuple[str, str], dict[str, list[Point]]] = {}
    for place, entry in enumerate(entries):
        for row in entry["figures"]:
            for peer, ratio in row["ratio"].items():
                if not peers or peer in peers:
                    line = found.setdefault((row["work"], row["unit"]), {}).setdefault(peer, [])
                    line.append((place, ratio["median"], ratio["min"], ratio["max"]))
    return found


def draw(entries: list[dict[str, Any]], peers: list[str], output: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    panels = lines(entries, peers)
    if not panels:
        raise SystemExit("no run has a ratio to such a peer")
    names = sorted({peer for panel in panels.values() for peer in panel})
    rows = -(-len(panels) // COLUMNS)
    width = max(4.2, 1.2 + 0.35 * len(entries))
    figure = Figure(figsize=(width * min(COLUMNS, len(panels)), 3 * rows + 1), layout="constrained")
    grid = figure.subplots(rows, min(COLUMNS, len(panels)), squeeze=False)
    places = range(len(entries))
    for axes, ((work, unit), panel) in zip(grid.flat, panels.items(), strict=False):
        for peer, points in panel.items():
            xs, medians, lows, highs = zip(*points, strict=True)
            colour = f"C{names.index(peer)}"
            axes.plot(xs, medians, marker="o", markersize=4, color=colour, label=peer)
            axes.vlines(xs, lows, highs, color=colour, linewidth=1, alpha=0.6)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_title(work + (" (below 1 is better)" if unit == "s" else ""), fontsize=10)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(axis="y", alpha=0.3)
        axes.set_xlim(-0.5, len(entries) - 0.5)
        labels = [f"{entry['commit']}\n{entry['date'][:10]}" for entry in entries]
        axes.set_xticks(places, labels, rotation=90, fontsize=7)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    handles = {label: h for axes in grid.flat for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        [handles[name] for name in names], names, loc="outside lower center", ncols=len(names), title="Octavo / peer"
    )
    figure.suptitle(kind(entries[-1]), fontsize=11)
    figure.savefig(output, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--history", type=Path, default=history.FILE)
    parser.add_argument("--model", default="", help="part of the file's name")
    parser.add_argument("--instruction-set", help="avx512, avx2, ...: that was used")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--processor", default="", help="part of its name")
    parser.add_argument("--peer", action="append", default=[], help="draw this one; repeatable")
    parser.add_argument("output", type=Path, help=".svg, .png or .pdf")
    args = parser.parse_args()
    try:
        entries = history.load(args.history)
    except history.DamagedError as error:
        raise SystemExit(str(error)) from None
    draw(chosen(entries, args), args.peer, args.output)


if __name__ == "__main__":
    main()
