"""Who answers: an endpoint's own description. It is all that its certificate can name, since the model's bytes are not seen."""

from __future__ import annotations

import difflib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from edgesafe.endpoint.client import Again, Client
from edgesafe.endpoint.kept import Run
from edgesafe.endpoint.local_guard import LocalGuard
from edgesafe.errors import ConfigError

# What servers say of a model that stays the same as long as the model does. Others, such as `created`, change with each start.
_LASTING = ("id", "owned_by", "root", "parent", "max_model_len", "meta", "quantization", "edgesafe")
_MOST = 8192  # bytes of JSON; a description is not a place for documents
_TRIES = 3


def subject_of(
    client: Client | LocalGuard, model: str, quantization: str, earlier: Run | None, *, ask: bool, unlisted: bool
) -> dict[str, Any]:
    """The subject of a run: as `describe` finds it, or, where nothing is left to ask, as the earlier run has it.

    A run that has all its answers needs no server any more. A proxy's name is no sign of another model, so the first one stays.
    """
    before = dict(earlier.head.get("subject", {})) if earlier else {}
    given = {"url": str(client.address), "model": model, "quantization": quantization}
    found = describe(client, model, quantization, unlisted=unlisted) if ask else {**before, **given}
    return {**found, "server": before.get("server", "")} if earlier else found


def describe(client: Client | LocalGuard, model: str, quantization: str, *, unlisted: bool = False) -> dict[str, Any]:
    """What is known of an endpoint: {url, model, quantization, listed, server}.

    ``quantization`` is what the user says of it, or empty. ``listed`` is the server's own entry for the model, as far as it
    lasts, and ``server`` the name in its replies' heads; None and empty where it does not say.

    Raises:
        ConfigError: The server lists its models, and this one is not among them, unless it may be `unlisted`.
        EndpointError: It can't be asked.
    """
    models, server = _models(client)
    known = [str(one["id"]) for one in models]
    if known and model not in known and not unlisted:
        near = difflib.get_close_matches(model, known, n=3) or known[:3]
        raise ConfigError(
            f"the server has no model {model!r}",
            where=f"--model at {client.address}",
            expected=f"one of the {len(known)} that it lists, such as {', '.join(map(repr, near))}",
            todo="name one of them, for a certificate under another name would mislead; or add --unlisted",
        )
    entry = next((one for one in models if one["id"] == model), None)
    return {
        "url": str(client.address),
        "model": model,
        "quantization": quantization,
        "listed": _lasting(entry) if entry else None,
        "server": server,
    }


def _models(client: Client | LocalGuard) -> tuple[list[dict[str, Any]], str]:
    for left in reversed(range(_TRIES)):
        try:
            return client.models()
        except Again as again:
            if not left:
                raise again.error from again
            time.sleep(min(again.after_s or 1.0, 10.0))
    raise AssertionError("the last try raises")


def _lasting(entry: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: entry[name] for name in _LASTING if entry.get(name) is not None}
    kept = kept if len(json.dumps(kept)) <= _MOST else {"id": entry["id"]}
    # UTF-8 holds no half characters, and neither can the files that this goes into.
    plain: dict[str, Any] = json.loads(json.dumps(kept, ensure_ascii=False).encode("utf-8", "replace"))
    return plain


def names(answered: Sequence[str]) -> list[str]:
    """The names that answers gave of themselves, each once, sorted; more than one where the server changed meanwhile.

    >>> names(["b", "", "a", "b"])
    ['a', 'b']
    """
    return sorted({name for name in answered if name})
