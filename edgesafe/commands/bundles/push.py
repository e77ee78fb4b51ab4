"""Put a certified bundle on the Hugging Face hub, with a model card.

The bundle is verified first. Only the files that its manifest lists, the manifest, the certificate and signatures are sent.
A new repository is private. The same push again changes nothing; an interrupted one continues.

Example:
  edgesafe push build/rpi5/bundle ORG/NAME --license apache-2.0
"""

from __future__ import annotations

import argparse

from edgesafe.commands._shared import add_bundle, add_json, print_json, utf8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `edgesafe push`."""
    from edgesafe.hub.push import UNSTATED

    add_bundle(parser)
    parser.add_argument("repo", type=utf8, metavar="ORG/NAME", help="the repository, which is made where there is none")
    parser.add_argument("--public", action="store_true", help="let anyone see a repository that is made now (default: private)")
    text = "licence for the model card, by the hub's identifier, such as apache-2.0 (default: %(default)s, which states none)"
    parser.add_argument("--license", default=UNSTATED, metavar="ID", help=text)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Push and print what opens the bundle from now on."""
    from edgesafe.hub.push import push

    pushed = push(args.bundle, args.repo, public=args.public, licence=args.license)
    if args.json:
        print_json(pushed.to_json())
    else:
        print(f"{pushed.source}: {pushed.files} files, {'pushed' if pushed.new else 'which were there already'}")
    return 0
