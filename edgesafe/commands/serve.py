"""Serve a local page for trying a bundle in a browser.

Only this machine can reach the page. Ctrl-C ends it.

Example:
  edgesafe serve build/rpi5/bundle
"""

from __future__ import annotations

import argparse

from edgesafe.commands._shared import add_bundle, add_engine, engine_option


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `edgesafe serve`."""
    from edgesafe.serve.server import PORT

    add_bundle(parser)
    text = "port on 127.0.0.1; 0 takes a free one (default: %(default)s)"
    parser.add_argument("--port", type=int, default=PORT, metavar="N", help=text)
    text = "threads (default: the best that was measured, or else the profile's)"
    parser.add_argument("--threads", type=int, metavar="N", help=text)
    parser.add_argument("--allow-uncertified", action="store_true", help="let the page use exits without a passed verdict")
    add_engine(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C."""
    from edgesafe.serve.server import serve

    serve(
        args.bundle,
        port=args.port,
        threads=args.threads,
        allow_uncertified=args.allow_uncertified,
        engine=engine_option(args),
    )
    return 0
