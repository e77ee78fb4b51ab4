"""Sign a bundle with a private key.

Writes a signature beside the manifest, the certificate and each record in the bundle, in OpenSSF model-signing's format. The
manifest holds the digest of every other file, so all bytes are signed. A bundle that `edgesafe verify` refuses, or that has no
certificate, is not signed.

Example:
  edgesafe sign build/rpi5/bundle --key key.pem
"""

from __future__ import annotations

import argparse
from pathlib import Path

from edgesafe.commands._shared import add_bundle, folder
from edgesafe.errors import ConfigError
from edgesafe.format.targets import shown_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `edgesafe sign`."""
    add_bundle(parser)
    text = "PEM file with a private key on the curve P-256, P-384 or P-521"
    parser.add_argument("--key", type=folder, metavar="FILE", required=True, help=text)
    text = "file whose first line is the key's password, where it has one"
    parser.add_argument("--password-file", type=folder, metavar="FILE", help=text)


def run(args: argparse.Namespace) -> int:
    """Sign and print the signatures' paths."""
    from edgesafe.assurance.signing import sign

    password = _first_line(args.password_file) if args.password_file is not None else None
    for path in sign(args.bundle, args.key, password=password):
        print(path)
    return 0


def _first_line(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").partition("\n")[0].rstrip("\r")
    except UnicodeDecodeError as error:
        raise ConfigError("the password is not UTF-8", where=shown_path(path), expected="a line of text") from error
