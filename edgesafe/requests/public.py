"""A ready recipe: AdvBench, HarmBench, XSTest and self-instruct as training rows and as a suite that can be certified.

The sets are fetched from their repositories at a fixed commit, or taken from a folder. Either way their requests have to be
those that were pinned here: a digest over the requests alone, so that a tidied copy counts as the original.

Trained on are AdvBench, once as words and in part as text in a picture, and one part of self-instruct, both ways too; certified
with are HarmBench's standard behaviours, all of XSTest and the other part of self-instruct.
"""

from __future__ import annotations

import hashlib
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path

from edgesafe.errors import InputError, IntegrityError
from edgesafe.format.files import replacing, sha256_file
from edgesafe.format.targets import NEW
from edgesafe.requests.gather import said
from edgesafe.requests.sets import read_set
from edgesafe.requests.sources import TYPOGRAPHIC, Plan, Source
from edgesafe.requests.tables import ENDINGS, find_table

# Of self-instruct, by the hash of a request: the first part is for the suite, the other for training.
_CUT = 0.3
# Of what is trained on, as much is also shown as text in a picture.
_WRITTEN = 0.5
_WORDS = {"suite": 60, "rows": 120}
# Letters: self-instruct has some of 6,000, which small models have no room for.
_LONGEST = 600
_TIMEOUT_S, _LARGEST = 60, 50_000_000
_RAW = "https://raw.githubusercontent.com"


@dataclass(frozen=True)
class PublicSet:
    """A set: its licence, its files by their address, the digest of its requests, and the class of rows without a label."""

    name: str
    licence: str
    files: dict[str, str]
    digest: str
    cls: str = ""


SETS = (
    PublicSet(
        "advbench",
        "MIT",
        {"advbench.csv": f"{_RAW}/andyrdt/refusal_direction/9d852fae1a9121c78b29142de733cb1340770cc3/dataset/raw/advbench.csv"},
        "fe661d29e9a1ed02ea72f1028f9dda995bee945d7ce2c438efb4cf5f8d38df04",
    ),
    PublicSet(
        "harmbench",
        "MIT",
        {
            "harmbench.csv": f"{_RAW}/ai-resilience/vlm-jailbreak-simulator/ec99cc42eb69047ace5a3ca5b616f63ebf4d81b0"
            "/data/behavior_datasets/harmbench_behaviors_text_all.csv"
        },
        "9837d59bbccd8d4dd5120d22cf9c73c1be904ffa64d07d8a92b37bac03462c5a",
    ),
    PublicSet(
        "xstest",
        "CC-BY-4.0, Roettger et al. 2024",
        {"xstest.csv": f"{_RAW}/paul-rottger/exaggerated-safety/d7bb5bd738c1fcbc36edd83d5e7d1b71a3e2d84d/xstest_prompts.csv"},
        "3fd86d643bf38aaaaea024615e4c095c68aadab2323fafc55351f3cd3eb85d31",
    ),
    PublicSet(
        "self-instruct",
        "Apache-2.0",
        {
            f"self-instruct-{name}.jsonl": f"{_RAW}/yizhongw/self-instruct/0b26ccaa415992100fa32df62d41b994cf928e23/{path}"
            for name, path in (
                ("seed", "data/seed_tasks.jsonl"),
                ("user", "human_eval/user_oriented_instructions.jsonl"),
            )
        },
        "3b6ce7cc0bc61fee40d685e36a2e6ddedc9645f54d0b90f231969a0c32569f66",
        "harmless",
    ),
)


@dataclass(frozen=True)
class Recipe:
    """What the suite and the training rows are made of, and the digests of all tables."""

    suite: Plan
    rows: Plan
    tables: tuple[str, ...]


def licences() -> str:
    """The sets and their licences.

    >>> licences().split(";")[0]
    'advbench (MIT)'
    """
    return "; ".join(f"{one.name} ({one.licence})" for one in SETS)


def fetch_public(out: Path) -> None:
    """Fetch the sets' own files into a new folder; what can't be used leaves nothing behind, and the next run begins again.

    Raises:
        InputError: one can't be fetched or read.
        IntegrityError: the requests of one are not those that were pinned.
    """
    with replacing(out) as work:
        (work / NEW).mkdir()
        for one in SETS:
            for name, address in one.files.items():
                (work / NEW / name).write_bytes(_fetched(address))
            try:
                _check_pin(one, _sources(work / NEW, one))
            except InputError as error:  # half a file, or a page of somebody else's
                raise _unfetched(f"what came is not {one.name}: {error.what}", "; ".join(one.files.values())) from error


def read_public(folder: Path) -> Recipe:
    """The recipe from a folder with all sets, each as its own file or in a folder of its own.

    Args:
        folder: as `fetch_public` writes it, or copies: files or folders whose names begin with a set's.

    Raises:
        InputError: a set is missing, or can't be read.
        IntegrityError: the requests of one are not those that were pinned.
    """
    sources = {one.name: _sources(folder, one) for one in SETS}
    for one in SETS:
        _check_pin(one, sources[one.name])
    (adv,), harm, xs, own = (sources[name] for name in ("advbench", "harmbench", "xstest", "self-instruct"))
    suite = Plan((*harm, *xs, *(_part(one, 0.0, _CUT) for one in own)), words=_WORDS["suite"])
    middle = _CUT + (1 - _CUT) * _WRITTEN
    written = (_part(adv, 0.0, _WRITTEN, TYPOGRAPHIC), *(_part(one, _CUT, middle, TYPOGRAPHIC) for one in own))
    rows = Plan((adv, *(_part(one, _CUT, 1.0) for one in own), *written), words=_WORDS["rows"])
    tables = [sha256_file(find_table(one.path)) for name in sources for one in sources[name]]
    return Recipe(suite, rows, tuple(tables))


def digest_requests(sources: tuple[Source, ...]) -> str:
    """The sha256 over the classes and words of all requests, whatever their order."""
    lines = {f"{request.row.cls} {said(request.row.template)}" for source in sources for request in read_set(source).requests}
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _sources(folder: Path, one: PublicSet) -> tuple[Source, ...]:
    paths = [folder / name for name in one.files]
    if not all(path.is_file() for path in paths):
        paths = list(_local(folder, one.name))[:1]
    if not paths:
        expected = ", ".join(one.name for one in SETS)
        what = f"there is no {one.name}"
        todo = "add it, or leave --preset-data out to fetch all sets"
        raise InputError(what, where=str(folder), expected=f"files or folders of these names: {expected}", todo=todo)
    return tuple(Source(path, name="" if len(paths) > 1 else one.name, cls=one.cls, longest=_LONGEST) for path in paths)


def _local(folder: Path, name: str) -> Iterator[Path]:
    """Copies of a set by their names: its own before longer ones, as "harmbench" before "harmbench-text"."""
    if folder.is_dir():
        for path in sorted(folder.iterdir(), key=lambda path: (len(path.stem), path.name)):
            if path.stem.startswith(name) and (path.is_dir() or path.suffix.lower() in ENDINGS):
                yield path


def _check_pin(one: PublicSet, sources: tuple[Source, ...]) -> None:
    found = digest_requests(sources)
    if found != one.digest:
        raise IntegrityError(
            f"the requests of {one.name} are not the published ones",
            where=", ".join(str(source.path) for source in sources),
            expected=f"requests with the digest {one.digest[:12]}, not {found[:12]}",
            todo="take the published file; for lists of your own: edgesafe suite import and edgesafe rows",
        )


def _part(source: Source, low: float, high: float, pictures: str = "") -> Source:
    name = f"{source.name or source.path.stem}-{pictures}" if pictures else source.name
    rule = pictures or source.pictures
    return replace(source, name=name, pictures=rule, part=(low, high))


def _fetched(address: str) -> bytes:
    try:
        with urllib.request.urlopen(address, timeout=_TIMEOUT_S) as answer:
            data: bytes = answer.read(_LARGEST)
            # Read with a limit, an answer that was cut off is no error of http.client's.
            if answer.length:
                raise OSError(f"the answer was cut off after {len(data):,} bytes")
            return data
    except (OSError, HTTPException) as error:  # urllib's errors are among the first
        raise _unfetched(f"the set can't be fetched: {error}", address) from error


def _unfetched(what: str, address: str) -> InputError:
    todo = "try again with a network, or download the sets and name their folder with --preset-data"
    return InputError(what, where=address, expected="a file on GitHub", todo=todo)
