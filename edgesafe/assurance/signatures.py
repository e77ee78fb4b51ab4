"""Signatures of single files with elliptic-curve keys: the one door to OpenSSF's model-signing."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edgesafe.errors import ConfigError, SignatureError
from edgesafe.format.bundle import signature_path
from edgesafe.format.targets import shown_path

if TYPE_CHECKING:
    from model_signing import hashing

_MAKE = "openssl ecparam -name prime256v1 -genkey -noout -out key.pem && openssl ec -in key.pem -pubout -out key.pub"


def load_signer(key: Path, password: str | None = None) -> Callable[[Path, Path], None]:
    """What signs a file with a private key: called with the file and with where the signature goes.

    Args:
        key: A PEM file with a private key on P-256, P-384 or P-521.
        password: The key's, where it is encrypted.

    Raises:
        ConfigError: The file can't be read, holds no such key, or the password is not the key's.
    """
    from model_signing import signing

    with _as_key(key, "private"):
        # The library's type says text, but cryptography below it takes bytes alone.
        secret = None if password is None else password.encode()
        config = signing.Config().use_elliptic_key_signer(private_key=key, password=secret)
    sign: Callable[[Path, Path], None] = config.set_hashing_config(_every_byte()).sign
    return sign


def load_verifier(key: Path) -> Callable[[Path], None]:
    """What holds a file against the signature beside it: called with the file.

    Args:
        key: A PEM file with the public key of whoever signed.

    Raises:
        ConfigError: The file can't be read or holds no public key on P-256, P-384 or P-521. What is returned raises
            SignatureError.
    """
    from model_signing import verifying

    with _as_key(key, "public"):
        verifying.Config().use_elliptic_key_verifier(public_key=key)

    def check(file: Path) -> None:
        # A configuration takes paths to leave out from each signature that it reads, so none is used twice.
        config = verifying.Config().use_elliptic_key_verifier(public_key=key).set_hashing_config(_every_byte())
        try:
            with contextlib.redirect_stdout(sys.stderr):  # the library prints its warnings
                config.verify(file, signature_path(file))
        except Exception as error:  # of many classes: the signature may hold anything
            raise _unsigned(file, key, str(error).strip() or type(error).__name__) from error

    return check


def _unsigned(file: Path, key: Path, why: str) -> SignatureError:
    signature = signature_path(file)
    if not signature.exists():
        what, why = f"{file.name} has no signature", ""
    else:
        what = f"{signature.name} is no signature of {file.name} by the key {shown_path(key)}"
    return SignatureError(
        what + (f": {why.partition('. ')[0]}" if why else ""),
        where=shown_path(file),
        expected=f"{signature.name} beside it, made from these bytes with the private key of {shown_path(key)}",
        todo="get the bundle from its source again; after a change of your own: edgesafe sign",
    )


def _every_byte() -> hashing.Config:
    from model_signing import hashing

    return hashing.Config().set_ignored_paths(paths=(), ignore_git_paths=False)


@contextlib.contextmanager
def _as_key(path: Path, kind: str) -> Iterator[None]:
    """Whatever goes wrong in here is the key's fault."""
    expected = f"a PEM file with a {kind} key on the curve P-256, P-384 or P-521"
    try:
        yield
    except OSError as error:
        what = f"the key can't be read: {error.strerror}"
        raise ConfigError(what, where=shown_path(path), expected=expected, todo=f"make one: {_MAKE}") from error
    except Exception as error:  # ValueError, TypeError and, for keys of other kinds, AttributeError
        # Messages about passwords and PEM files help; those about attributes don't.
        detail = f": {str(error).partition('. ')[0]}" if isinstance(error, ValueError | TypeError) else ""
        what = f"the key can't be used{detail}"
        todo = "give the key's own password: --password-file FILE" if "password" in detail.lower() else f"make one: {_MAKE}"
        raise ConfigError(what, where=shown_path(path), expected=expected, todo=todo) from error
