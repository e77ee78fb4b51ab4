"""Check that a bundle is whole and, with a public key, who vouches for it.

Without a key: every file has the bytes that were sealed, nothing was added, and certificate, suite and records are this
bundle's. That shows damage and mix-ups; whoever makes a whole new bundle passes it. With the public key of whoever signed, a
bundle of anybody else is refused.

Example:
  edgesafe verify build/rpi5/bundle --public-key key.pub
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from edgesafe.commands._shared import add_bundle, add_json, folder, print_json

if TYPE_CHECKING:
    from edgesafe.assurance.signing import Verified


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `edgesafe verify`."""
    add_bundle(parser)
    text = "PEM file with the public key of whoever signed the bundle"
    parser.add_argument("--public-key", type=folder, metavar="FILE", help=text)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Verify and print what was checked and what was not."""
    from edgesafe.assurance.signing import verify

    verified = verify(args.bundle, args.public_key)
    if args.json:
        print_json(verified.to_json())
    else:
        print(_text(verified))
    return 0


def _text(verified: Verified) -> str:
    exits = ", ".join(map(str, verified.certified))
    return "\n".join(
        [
            f"bundle {verified.digest[:12]}: {verified.files} files, all as sealed",
            *([f"from {verified.source}"] if verified.source else []),
            f"certified exits: {exits}" if exits else "certified exits: none",
            *([verified.statement] if verified.statement else []),
            f"signed with this key: {', '.join(verified.signed) or 'nothing was checked'}",
            *(f"not checked: {what}" for what in verified.not_checked),
        ]
    )
