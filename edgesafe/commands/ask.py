"""Answer a question about a picture.

The answer is streamed to stdout; a line on stderr says which exit gave it and how long it took.

Example:
  edgesafe ask build/rpi5/bundle --image photo.jpg --prompt "What is in the picture?" --budget-ms 700
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from edgesafe.commands._shared import add_bundle, add_engine, add_json, engine_option, print_json

if TYPE_CHECKING:
    from edgesafe.runtime import Budget


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `edgesafe ask`."""
    from edgesafe.format.exits import Exit
    from edgesafe.format.suite import MAX_NEW_TOKENS

    add = parser.add_argument
    add_bundle(parser)
    add("--image", required=True, metavar="FILE", help="a picture file")
    add("--prompt", required=True, metavar="TEXT", help="the question")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--budget-ms", type=float, metavar="MS", help="take the deepest certified exit that fits (ms)")
    text = (
        "take this exit, such as 6: after six blocks; 6@9: with 9 visual tokens, 6x1: of one tile (default: deepest certified)"
    )
    which.add_argument("--exit", "--exit-depth", type=Exit.parse, metavar="EXIT", help=text)
    add("--max-image-tokens", type=int, metavar="N", help="take no exit that makes more tokens of the picture")
    add("--total-ms", type=float, metavar="MS", help="time limit for the whole answer (ms); decoding stops in time")
    add("--require-measured", action="store_true", help="refuse a budget that only an estimate supports")
    add(
        "--max-new-tokens",
        type=int,
        default=MAX_NEW_TOKENS,
        metavar="N",
        help="longest answer in tokens (default: %(default)s); a longer one than was certified says so",
    )
    add(
        "--temperature",
        type=float,
        default=0.0,
        metavar="X",
        help="sampling temperature; 0 takes the likeliest token, and only that is certified unless the certificate was made at "
        "another temperature, too (default: %(default)g)",
    )
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the likeliest tokens with this total probability (default: %(default)g)",
    )
    add("--seed", type=int, default=0, metavar="N", help="sampling seed (default: %(default)s)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text; may be repeated")
    add("--threads", type=int, metavar="N", help="threads (default: the best that was measured, or else the profile's)")
    add("--allow-uncertified", action="store_true", help="allow an exit without a passed verdict; the answer then says so")
    add_engine(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Stream an answer to stdout and say on stderr how it came about."""
    from edgesafe.runtime import Sampling, Session
    from edgesafe.runtime.answer import describe

    sampling = Sampling(args.temperature, args.top_p, args.seed, stop=tuple(args.stop))
    budget, engine = _budget(args), engine_option(args)
    with Session.open(args.bundle, threads=args.threads, allow_uncertified=args.allow_uncertified, engine=engine) as session:
        stream = session.stream(
            args.image,
            args.prompt,
            budget,
            exit=args.exit,
            max_image_tokens=args.max_image_tokens,
            max_new_tokens=args.max_new_tokens,
            sampling=sampling,
        )
        for piece in stream:
            if not args.json:
                print(piece, end="", flush=True)
        answer = stream.answer
    if args.json:
        print_json(answer.to_dict())
        return 0
    print(flush=True)
    print(describe(answer), file=sys.stderr)
    return 0


def _budget(args: argparse.Namespace) -> Budget | None:
    from edgesafe.runtime import Budget

    if args.budget_ms is None and args.total_ms is None:
        return None
    return Budget(args.budget_ms, args.total_ms, require_measured=args.require_measured)
