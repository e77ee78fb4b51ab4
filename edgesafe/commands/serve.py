"""Serve a bundle: a local page for a browser, and the OpenAI API for programs.

Only this machine can reach it, unless --host names another address; then every request has to bring the token of --token-file.
Ctrl-C ends it. See edgesafe/serve/README.md.

Example:
  edgesafe serve build/rpi5/bundle
"""

from __future__ import annotations

import argparse
from pathlib import Path

from edgesafe.commands._shared import add_bundle, add_engine, engine_option, folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `edgesafe serve`."""
    from edgesafe.serve.access import HOST
    from edgesafe.serve.line import WAITING
    from edgesafe.serve.server import PORT

    add_bundle(parser)
    text = "port; 0 takes a free one (default: %(default)s)"
    parser.add_argument("--port", type=int, default=PORT, metavar="N", help=text)
    text = "address to listen on; one that other machines reach needs --token-file (default: %(default)s)"
    parser.add_argument("--host", default=HOST, metavar="ADDRESS", help=text)
    text = "file with the token that every request must bring (Authorization: Bearer TOKEN); the page is off then"
    parser.add_argument("--token-file", type=Path, metavar="FILE", help=text)
    text = "folder whose pictures requests may name as file:///DIR/NAME; can be given several times (default: none)"
    parser.add_argument("--files", type=folder, action="append", default=[], metavar="DIR", help=text)
    text = "requests that may wait; more are told to come back (default: %(default)s)"
    parser.add_argument("--queue", type=int, default=WAITING, metavar="N", help=text)
    text = "threads (default: the best that was measured, or else the profile's)"
    parser.add_argument("--threads", type=int, metavar="N", help=text)
    parser.add_argument("--allow-uncertified", action="store_true", help="let requests use exits without a passed verdict")
    add_engine(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C."""
    from edgesafe.serve.server import serve

    serve(
        args.bundle,
        port=args.port,
        host=args.host,
        token_file=args.token_file,
        folders=args.files,
        waiting=args.queue,
        threads=args.threads,
        allow_uncertified=args.allow_uncertified,
        engine=engine_option(args),
    )
    return 0
