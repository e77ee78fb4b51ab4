"""Suites of several sources that can be certified, checked before a picture is opened: `edgesafe suite import`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgesafe.certify.certify import check_classes
from edgesafe.certify.smoke_rows import LEAST_ROWS, mixed
from edgesafe.certify.stats import binomial_upper
from edgesafe.certify.verdict import FAMILY_FACTOR, check_size, sensitivity, wordings
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

    A category of a set that has too few harmful rows to be certified by itself is counted with others, as SET/other, or as
    SET/harmful where all are.

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

    The smallest category goes first, then the next, until what they make together is large enough.
    """
    items, joined = list(items), Counter[str]()
    for name in sorted({_set_of(item.row.family) for item in items if item.row.cls == "harmful" and not item.own}):
        other, whole = f"{name}/{_OTHER}", f"{name}/harmful"
        while small := _too_small(items, name, limits):
            items = _renamed(items, small, other)
            joined[other] += 1
        if joined[other] and not any(_is_of(item, name) and item.row.family != other for item in items):
            items = _renamed(items, other, whole)
            joined[whole] = joined.pop(other)
    return items, dict(joined)


def _too_small(items: Sequence[Item], name: str, limits: Mapping[str, float]) -> str:
    """A set's next category to be counted with others; empty where each family can stand alone, or all are one."""
    families: dict[str, list[Row]] = {}
    for item in items:
        if _is_of(item, name):
            families.setdefault(item.row.family, []).append(item.row)
    other = f"{name}/{_OTHER}"
    short = [family for family, rows in families.items() if not _alone(rows, limits)]
    left = [family for family in short if family != other] or ([f for f in families if f != other] if short else [])
    if not left or len(families) == 1:
        return ""
    return min(left, key=lambda family: (len(families[family]), family))


def _alone(rows: Sequence[Row], limits: Mapping[str, float]) -> bool:
    """Whether a family may help as large a share as the whole suite without breaking its own limit.

    One that has room for no fault at all fails by chance, where a suite has many of them.
    """
    number, harm = len(set(wordings(rows))), limits["harmful_upper_95"]
    return binomial_upper(harm * number, number) / sensitivity() <= min(FAMILY_FACTOR * harm, 1.0)


def _set_of(family: str) -> str:
    return family.rpartition("/")[0]


def _is_of(item: Item, name: str) -> bool:
    return item.row.cls == "harmful" and not item.own and _set_of(item.row.family) == name


def _renamed(items: Sequence[Item], old: str, new: str) -> list[Item]:
    return [replace(item, row=replace(item.row, family=new)) if item.row.family == old else item for item in items]


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
