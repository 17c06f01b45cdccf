"""Train a head that guesses what a model says next, for speculative decoding; it needs PyTorch.

The model writes texts by itself, nothing else is needed: a chat model what users may ask, and answers. The head learns
to go on from the model's own states, as octavo.models.draft_head says, and is written to a .safetensors file:

  octavo train-head smollm2 --output head.safetensors
  octavo run smollm2 --speculative-config '{"method": "draft_head", "model": "head.safetensors"}' "Hello"
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from octavo.cli.engine_args import add_engine_arguments, add_model_argument, engine_config, take_model_argument
from octavo.cli.output_files import check_writable, with_errors_named
from octavo.core.errors import ConfigError, InvalidRequestError

_LEFT_OUT = ["seed", "kv_offload_dir", "kv_offload_bytes", "speculative_config"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `octavo train-head`."""
    parser.usage = "octavo train-head [-h] [-v] [MODEL] --output FILE [flags]"
    add_model_argument(parser, "for which a head is trained")
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="FILE", help="where the head goes")
    add("--tokens", type=int, default=300_000, metavar="N", help="of texts that the model writes (%(default)s)")
    add("--text-tokens", type=int, default=384, metavar="N", help="most of one text (%(default)s)")
    add("--minutes", type=float, default=30.0, metavar="X", help="of training, after the writing (%(default)g)")
    add("--cell-size", type=int, metavar="N", help="inner size of the cell (twice the model's hidden size)")
    add(
        "--draft-vocab",
        type=int,
        default=8192,
        metavar="N",
        help="most frequent tokens that it can guess (%(default)s)",
    )
    add("--places", type=int, default=4, metavar="N", help="guesses in a row that it learns (%(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of texts and training (%(default)s)")
    add_engine_arguments(parser, leave_out=_LEFT_OUT)


def run(args: argparse.Namespace) -> int:
    """Everything that can be checked without the model is checked before it is loaded."""
    for name, least in (("tokens", 1000), ("text_tokens", 16), ("draft_vocab", 1), ("places", 1), ("cell_size", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise InvalidRequestError(f"--{name.replace('_', '-')}", f"must be at least {least}, not {value}")
    if not 0 < args.minutes < float("inf"):
        raise InvalidRequestError("--minutes", f"must be more than 0, not {args.minutes:g}")
    if not 0 <= args.seed < 1 << 63:
        raise InvalidRequestError("--seed", f"must be from 0 to {2**63 - 1}, not {args.seed}")
    take_model_argument(args)
    config = engine_config(args)
    if config.speculative_config is not None:
        raise InvalidRequestError("OCTAVO_SPECULATIVE_CONFIG", "must not be set: a head is trained without guesses")
    check_writable("--output", args.output)
    if find_spec("torch") is None:
        raise ConfigError("train-head needs PyTorch, which nothing else of Octavo does: pip install torch")
    from octavo.cli.answering import open_model
    from octavo.training.recipe import Recipe, train_head

    recipe = Recipe(
        args.tokens, args.text_tokens, args.minutes, None, args.cell_size, args.draft_vocab, args.places, args.seed
    )
    with open_model(config, args.verbose) as answerer:
        found = train_head(answerer.llm, recipe, _progress if args.verbose or sys.stderr.isatty() else _nothing)
    with_errors_named("--output", args.output, lambda: found.save(args.output))
    rates = ", ".join(f"{rate:.0%}" for rate in found.agreement)
    print(f"{args.output}: of its first, second, … guesses {rates} are the model's own best token on texts not learnt")
    return 0


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _nothing(text: str) -> None:
    """Nobody watches."""
