"""A verified, certified bundle to the Hugging Face hub: its own files and a model card, in one commit."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgesafe.assurance.documents import model_card
from edgesafe.assurance.facts import Facts, read_facts
from edgesafe.errors import EdgesafeError, HubError, InputError
from edgesafe.format.bundle import CERTIFICATE, MANIFEST, Bundle, shipped_files
from edgesafe.hub.cache import HUB
from edgesafe.hub.reach import hub_errors, hub_name, library, offline
from edgesafe.progress import step

CARD, _ATTRIBUTES = "README.md", ".gitattributes"
UNSTATED = "other"
# A card without this line was written by somebody else, and is theirs.
MARK = "<!-- written by edgesafe push, which replaces it -->"
_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*")


@dataclass(frozen=True)
class Pushed:
    """What lies on the hub now: ``source`` opens it, ``new`` is whether this run changed anything, ``files`` counts them."""

    source: str
    digest: str
    files: int
    new: bool

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def push(path: str | os.PathLike[str], repo: str, *, public: bool = False, licence: str = UNSTATED) -> Pushed:
    """Make a repository hold exactly this bundle and its card; pushing the same bundle again changes nothing.

    Only the files that the manifest lists, the manifest, the certificate and their signatures leave this machine. An
    interrupted push leaves the repository as it was, and the next one sends only what the hub hasn't got.

    Args:
        path: The bundle's folder; it has to verify and to have a certificate.
        repo: ``ORG/NAME``. Where there is none it is made, private unless ``public``.
        public: Anyone may see a repository that is made now.
        licence: The licence's identifier on the hub, such as ``apache-2.0``.

    Raises:
        ConfigError: huggingface_hub is not installed.
        InputError: The repository's name or the licence is malformed.
        BundleError, CertificateError: The bundle doesn't verify, or has no certificate.
        HubError: There is no token, it may not write there, or something other than a bundle lies there.
        HubUnavailableError: The hub can't be reached.
    """
    where = HUB + repo
    if hub_name(where)[1] is not None:
        raise InputError("a push names no revision", where=repo, expected="ORG/NAME", todo="leave out what follows @")
    if not _LICENCE.fullmatch(licence):
        raise InputError(
            f"{licence!r} is no licence identifier", where="--license", expected="one of the hub's, e.g. apache-2.0"
        )
    hub = library()
    if hub.constants.HF_HUB_OFFLINE:
        raise offline(where, "HF_HUB_OFFLINE is set, and a push needs the network")
    if hub.get_token() is None:
        raise HubError("there is no token", where=where, todo="log in: hf auth login, or set HF_TOKEN")
    facts = read_facts(path)
    files = {name: facts.bundle.root / name for name in shipped_files(facts.manifest)}
    present = {name: file for name, file in files.items() if file.is_file()}
    with hub_errors(where), step(f"push {facts.bundle.digest[:12]} to {where}"):
        return _send(hub, repo, facts, {CARD: card(facts, repo, licence).encode(), **present}, public=public)


def card(facts: Facts, repo: str, licence: str) -> str:
    """The model card, in Markdown behind the hub's own header."""
    head = ["---", f"license: {licence}", "pipeline_tag: image-text-to-text", "library_name: edgesafe"]
    head += ["tags:", *(f"- {tag}" for tag in ("edgesafe", "onnx", "early-exit", "vision-language")), "---", MARK]
    stated = f"{licence}, as its publisher says." if licence != UNSTATED else "Its publisher states none."
    use = ["## Use", "", "```python", "# pip install 'edgesafe[hub]'", "from edgesafe import Session", ""]
    use += [f'session = Session.open("{HUB}{repo}")  # add @COMMIT to keep to these bytes', "```", ""]
    use += ["The certificate counts on machines like the one that made it. On any other, run "]
    use += [f"`edgesafe smoke {HUB}{repo}` there once.", "", "## Licence", "", stated]
    return "\n".join([*head, model_card(facts, repo, CERTIFICATE), *use]) + "\n"


def _send(hub: Any, repo: str, facts: Facts, files: dict[str, Any], *, public: bool) -> Pushed:
    api = hub.HfApi()
    api.create_repo(repo, private=not public, exist_ok=True)
    head = str(api.repo_info(repo).sha)
    there = {entry.path for entry in api.list_repo_tree(repo, revision=head, recursive=True) if hasattr(entry, "blob_id")}
    _check_ours(hub, repo, head, there)
    changes = [hub.CommitOperationAdd(name, file) for name, file in sorted(files.items())]
    changes += [hub.CommitOperationDelete(name) for name in sorted(there - files.keys() - {_ATTRIBUTES})]
    # With its parent named, two pushes at once can't mix: the later one fails.
    made = api.create_commit(repo, changes, commit_message=f"edgesafe bundle {facts.bundle.digest[:12]}", parent_commit=head)
    return Pushed(f"{HUB}{repo}@{made.oid}", facts.bundle.digest, len(files), made.oid != head)


def _check_ours(hub: Any, repo: str, head: str, there: set[str]) -> None:
    """Refuse to replace what no push has put there.

    Raises:
        HubError: The repository holds something else, or a card that somebody wrote.
    """
    where = f"{HUB}{repo}@{head}"
    if foreign := sorted(there - _ours(hub, repo, head, there)):
        what, expected = f"it holds something other than a bundle: {foreign[0]}", "a repository that is empty or holds a bundle"
        raise HubError(what, where=where, expected=expected, todo="name another repository, or empty this one")
    if CARD in there and MARK not in Path(hub.hf_hub_download(repo, CARD, revision=head)).read_text(errors="replace"):
        what, todo = f"its {CARD} was written by somebody, and a push replaces it", f"delete {CARD} there, then push again"
        raise HubError(what, where=where, todo=todo)


def _ours(hub: Any, repo: str, head: str, there: set[str]) -> set[str]:
    """The files of a commit that belong to a bundle, by its own manifest."""
    ours = {CARD, _ATTRIBUTES}
    if MANIFEST in there:
        snapshot = hub.snapshot_download(repo, revision=head, allow_patterns=[MANIFEST])
        with contextlib.suppress(EdgesafeError):  # of another program
            ours |= set(shipped_files(Bundle.open(snapshot, verify=False).manifest))
    return ours
