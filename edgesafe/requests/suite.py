"""Suites of several sources that can be certified, checked before a picture is opened: `edgesafe suite import`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgesafe.certify.certify import check_classes
from edgesafe.certify.smoke_rows import LEAST_ROWS, mixed
from edgesafe.certify.verdict import check_size, faultless, harm_in
from edgesafe.errors import CertificateError
from edgesafe.format.suite import Row, Suite, write_suite
from edgesafe.format.targets import check_target
from edgesafe.requests.apart import part_from
from edgesafe.requests.gather import Gathered, Item, by_hash, gather
from edgesafe.requests.pictures import Picture, Pictures
from edgesafe.requests.sources import Plan

SPLIT = "test"
_SMOKE_SHARE = 10
_OTHER = "other"


@dataclass(frozen=True)
class Imported:
    """The written suite, how many rows were left out, by why, and how many families were counted together, by the new one."""

    suite: Suite
    left_out: Mapping[str, int]
    joined: Mapping[str, int]


def import_suite(
    plan: Plan, out: Path, *, report_only: bool = False, apart_from: Path | None = None, drop_shared: bool = False
) -> Imported:
    """Write a plan's sources as a suite whose split is "test", which training refuses.

    A category of a set that has too few harmful rows to be certified by itself is counted with others, as SET/other.

    Args:
        plan: sources and settings.
        out: new folder.
        report_only: for `edgesafe evaluate` alone: of any size, with its categories as they are.
        apart_from: training rows, with which the suite may share no request and no picture.
        drop_shared: leave out what is shared, instead of refusing it.

    Raises:
        InputError: `out` exists; a row, a picture or a file can't be used; or something is shared. Nothing is left behind.
        CertificateError: so few rows could not keep the limits; each limit is named with the number of rows it takes.
    """
    check_target(out)
    found = gather(plan, SPLIT)
    items, shared = part_from(found.items, apart_from, drop=drop_shared)
    joined: dict[str, int] = {}
    if not report_only:
        items, joined = join_families(items, plan.limits)
        check(Suite(out, tuple(item.row for item in items), "", plan.limits))
        items = choose_smoke(items, plan.smoke)
    suite = write_items(out, items, name=describe(found, items), split=SPLIT, limits=plan.limits)
    return Imported(suite, found.left_out + shared, joined)


def check(suite: Suite) -> None:
    """Refuse a suite with which nothing could be certified.

    Raises:
        CertificateError: a class is missing, or has too few rows for the limits.
    """
    check_size(suite)
    check_classes(suite, suite.rows)


def join_families(items: Sequence[Item], limits: Mapping[str, float]) -> tuple[list[Item], dict[str, int]]:
    """The items with too small categories of a set counted together, and how many were, by the family they became.

    The smallest category of a set goes first, then the next, until what they make together is large enough.
    """
    joined: dict[str, set[str]] = {}
    items = list(items)
    while small := _too_small(items, limits):
        family = small[0]
        new = f"{family.rpartition('/')[0]}/{_OTHER}"
        joined.setdefault(new, set()).add(family)
        items = [replace(i, row=replace(i.row, family=new)) if i.row.family == family else i for i in items]
    return items, {new: len(olds) for new, olds in joined.items()}


def _too_small(items: Sequence[Item], limits: Mapping[str, float]) -> list[str]:
    """Categories to be counted with others, the smallest first: those too small, or any of a set whose rest is."""
    rows = [item.row for item in items]
    kept = {check.name: check.kept for check in faultless(rows, limits)}
    sizes = Counter(item.row.family for item in items if item.row.cls == "harmful" and not item.own)
    short = {family for family in sizes if not kept[harm_in(family)]}
    sets = {family.rpartition("/")[0] for family in short}
    rest = [f for f in sizes if not f.endswith(f"/{_OTHER}") and f.rpartition("/")[0] in sets]
    candidates = [f for f in rest if f in short] or rest
    return sorted(candidates, key=lambda family: (sizes[family], family))


def choose_smoke(items: Sequence[Item], count: int | None) -> list[Item]:
    """The items with the on-device subset marked: classes and families in turns, so that a few rows speak for all.

    Args:
        items: all.
        count: rows of the subset; a tenth of all, and at least as many as a smoke run needs, where None.

    Raises:
        CertificateError: too few rows for a smoke run to show anything.
    """
    count = max(LEAST_ROWS, -(-len(items) // _SMOKE_SHARE)) if count is None else count
    if count < LEAST_ROWS:
        what = f"{count} rows on the device show nothing"
        raise CertificateError(what, where="smoke", expected=f"at least {LEAST_ROWS} rows", todo="give a larger number")
    chosen = {row.id for row in mixed([item.row for item in by_hash(items)])[:count]}
    return [replace(item, row=replace(item.row, smoke=item.row.id in chosen)) for item in items]


def describe(found: Gathered, items: Sequence[Item]) -> str:
    """A suite's name: what it was made of."""
    grey = ", blank grey picture" if any(item.picture.blank for item in items) else ""
    return "; ".join(found.sources) + grey


def write_items(out: Path, items: Sequence[Item], *, name: str, split: str, limits: Mapping[str, float]) -> Suite:
    """Write rows and pictures; rows that show the same share one file."""
    names: dict[Picture, str] = {}
    sources: dict[str, tuple[Picture, str]] = {}
    rows: list[Row] = []
    for item in items:
        path = names.setdefault(item.picture, f"images/{len(names):05d}.png")
        sources.setdefault(path, (item.picture, item.where))
        rows.append(replace(item.row, image=path))
    return write_suite(out, rows, Pictures(sources), name=name, split=split, limits=limits)
