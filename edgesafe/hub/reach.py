"""What can go wrong between here and the Hugging Face hub, as errors of the tree; and the library that talks to it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from edgesafe.errors import ConfigError, EdgesafeError, HubError, HubUnavailableError, InputError
from edgesafe.hub.cache import HUB

# A revision is a commit, a tag or a branch, whose name may have slashes.
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(\w[\w./-]*))?")
_LOG_IN = "log in: hf auth login, or set HF_TOKEN"
_CONFLICTS, _LATER = (409, 412), (408, 425, 429)


def split_revision(model: str) -> tuple[str, str | None] | None:
    """A hub id and its revision (None: the hub's default); None where the text is not a hub id.

    >>> split_revision("org/name"), split_revision("org/name@v1.0"), split_revision("./name")
    (('org/name', None), ('org/name', 'v1.0'), None)
    """
    matched = _HUB_ID.fullmatch(model)
    return (matched[1], matched[2]) if matched else None


def hub_name(text: str) -> tuple[str, str | None]:
    """The repository and revision that ``hub:ORG/NAME[@REVISION]`` names.

    Raises:
        InputError: It names none.
    """
    found = split_revision(text.removeprefix(HUB)) if text.startswith(HUB) else None
    if found is None or ".." in text or "--" in found[0]:
        raise InputError("it names no bundle on the hub", where=text, expected=f"{HUB}ORG/NAME or {HUB}ORG/NAME@REVISION")
    return found


def library() -> ModuleType:
    """huggingface_hub.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        what = "the Hugging Face hub needs the package huggingface_hub, which is not installed"
        raise ConfigError(what, expected="the hub extra", todo="pip install 'edgesafe[hub]'") from error
    return huggingface_hub


@contextmanager
def hub_errors(where: str) -> Iterator[None]:
    """What huggingface_hub raises, as an error of the tree.

    Args:
        where: What was asked for, ``hub:ORG/NAME@REVISION``.

    Raises:
        HubError: The hub said no: no such repository or revision, a gated one, a missing token or right.
        HubUnavailableError: There is no network, or the hub can't answer now.
    """
    try:
        yield
    except (EdgesafeError, TypeError, AttributeError, LookupError, AssertionError):  # ours, or a bug
        raise
    except Exception as error:  # httpx, hub and cache errors share no base class
        if isinstance(error, OSError) and error.filename is not None:  # about a file here, such as a full disk
            raise
        raise _named(error, where) from error


def offline(where: str, what: str = "HF_HUB_OFFLINE is set, and the cache doesn't have it") -> HubUnavailableError:
    """The refusal of what needs the network while it is switched off."""
    return HubUnavailableError(what, where=where, todo="unset HF_HUB_OFFLINE and run it again")


def _named(error: BaseException, where: str) -> EdgesafeError:
    from huggingface_hub import errors

    kinds: tuple[tuple[type[BaseException], str, str], ...] = (
        (errors.GatedRepoError, "the repository is gated", f"accept its terms on its page, then {_LOG_IN}"),
        (errors.RepositoryNotFoundError, "there is no such repository, or it is private", f"check the name, or {_LOG_IN}"),
        (errors.RevisionNotFoundError, "the repository has no such revision", "name a commit, tag or branch that it has"),
        (errors.LocalTokenNotFoundError, "there is no token", _LOG_IN),
        (errors.HFValidationError, "the name is not one that the hub allows", "name it as ORG/NAME"),
    )
    for kind, what, todo in kinds:
        if isinstance(error, kind):
            return HubError(what, where=where, todo=todo)
    if isinstance(error, errors.IncompleteSnapshotError):
        what, todo = "the snapshot in the cache is not whole", "run it again with the network, which continues where it stopped"
        return HubUnavailableError(what, where=where, todo=todo)
    # Around what kept it from the hub, or what an upload's thread raised.
    if isinstance(error, errors.LocalEntryNotFoundError | RuntimeError) and error.__cause__ is not None:
        return _named(error.__cause__, where)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return offline(where)
    if isinstance(error, errors.HfHubHTTPError):
        return _refused(error.response.status_code, str(error.server_message or "").strip(), where)
    return HubUnavailableError(
        f"the hub can't be reached: {type(error).__name__}: {str(error).partition(chr(10))[0]}",
        where=where,
        todo="check the network and run it again, which continues where it stopped",
    )


def _refused(status: int, message: str, where: str) -> EdgesafeError:
    said = f": {message[:300]}" if message else ""
    if status in (401, 403):
        return HubError(f"the token is missing, wrong or may not do this{said}", where=where, todo=_LOG_IN)
    if status in _CONFLICTS:
        return HubUnavailableError("the repository changed meanwhile", where=where, todo="run it again")
    if status in _LATER or status >= 500:
        return HubUnavailableError(f"the hub answered {status}{said}", where=where, todo="run it again later")
    return HubError(f"the hub answered {status}{said}", where=where)
