"""Serve a local page for trying a bundle in a browser.

Only this machine can reach the page. Ctrl-C ends it.

Example:
  edgesafe serve build/rpi5/bundle
"""

from __future__ import annotations

import argparse
import sys

from edgesafe.commands._shared import add_bundle, add_engine, engine_option
from edgesafe.errors import ConfigError

_PORT = 8765


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `edgesafe serve`."""
    add_bundle(parser)
    text = "port on 127.0.0.1; 0 takes a free one (default: %(default)s)"
    parser.add_argument("--port", type=int, default=_PORT, metavar="N", help=text)
    text = "threads (default: the best that was measured, or else the profile's)"
    parser.add_argument("--threads", type=int, metavar="N", help=text)
    parser.add_argument("--allow-uncertified", action="store_true", help="let the page use exits without a passed verdict")
    add_engine(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C."""
    from edgesafe.runtime import Session
    from edgesafe.serve.server import HOST, PageServer

    if not 0 <= args.port < 65536:
        raise ConfigError(f"--port is {args.port}", where="--port", expected="0 to 65535", todo="try --port 0")
    engine = engine_option(args)
    with Session.open(args.bundle, threads=args.threads, allow_uncertified=args.allow_uncertified, **engine) as session:
        try:
            server = PageServer(session, args.port)
        except OSError as error:
            raise ConfigError(f"can't listen: {error.strerror}", where=f"--port {args.port}", todo="try --port 0") from error
        with server:
            print(f"http://{HOST}:{server.port}/  (for this machine only; Ctrl-C ends it)", flush=True)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                print(file=sys.stderr)
    return 0
