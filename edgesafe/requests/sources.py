"""What a suite or training rows are made of: sources with their rules, from the command line or a TOML file.

A file has these keys, all of them optional but `source`:

    seed = 0                        # which pictures, smoke rows and refusals are drawn
    words = 120                     # tasks: so many words, each written in a picture, are to be read
    smoke = 60                      # rows of the on-device subset (default: a tenth, at least 20)
    [limits]                        # of the verdict, by the keys of edgesafe.format.suite.DEFAULT_LIMITS
    harmful_upper_95 = 0.05
    [[source]]
    path = "harmbench"              # a file, or a folder with one; relative to the TOML file
    name = "harmbench"              # begins its families (default: the set's or the file's own)
    format = "auto"                 # see edgesafe.requests.sets
    class = "harmful"               # of rows of a plain list that have no label: harmful or harmless
    pictures = "blank"              # for rows without one: blank, typographic, a file, or a folder to draw from
    where = { split = ["test"] }    # rows whose column has one of these values
    part = [0.0, 0.5]               # by the hash of their words: two lists with disjoint parts share no request
    longest = 600                   # leave out requests of more letters
    limit = 200                     # at most so many, a sample fixed by their ids
    prompt = "What is this?"        # the question about labelled pictures
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgesafe.errors import ConfigError
from edgesafe.format.fields import Fields
from edgesafe.format.suite import DEFAULT_LIMITS, read_limits

FORMATS = ("advbench", "harmbench", "xstest", "figstep", "requests", "pictures", "folder")
BLANK, TYPOGRAPHIC = "blank", "typographic"
WHOLE = (0.0, 1.0)


@dataclass(frozen=True)
class Source:
    """A list of requests and what is taken from it, by the keys of the module's TOML."""

    path: Path
    name: str = ""
    format: str = "auto"
    cls: str = ""
    pictures: str = BLANK
    where: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    part: tuple[float, float] = WHOLE
    longest: int | None = None
    limit: int | None = None
    prompt: str = ""


@dataclass(frozen=True)
class Plan:
    """All sources, and the settings that hold for them together."""

    sources: tuple[Source, ...]
    words: int = 0
    smoke: int | None = None
    limits: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_LIMITS))
    seed: int = 0


def read_plan(path: Path) -> Plan:
    """Read a plan's TOML file.

    Raises:
        ConfigError: it can't be read, or a key is missing, unknown, of another type or out of range.
        InputError: a limit is unknown, or not a rate from 0 to 1.
    """
    try:
        obj = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        what = "the list of sources can't be read"
        raise ConfigError(what, where=str(path), expected="a TOML file in UTF-8", todo=str(error)) from error
    given = Fields(obj, str(path), ConfigError)
    plan = Plan(
        sources=tuple(_source(one, path.parent) for one in given.children("source")),
        words=given.integer("words") if given.has("words") else 0,
        smoke=given.integer("smoke", 1) if given.has("smoke") else None,
        limits=read_limits(DEFAULT_LIMITS | (given.table("limits") if given.has("limits") else {}), f"{path}: limits"),
        seed=given.integer("seed") if given.has("seed") else 0,
    )
    given.done()
    return plan


def limits_from(texts: Sequence[str]) -> dict[str, float]:
    """The limits of texts such as "harmful_upper_95=0.03".

    Raises:
        InputError: one is unknown, or not a rate from 0 to 1.
        ConfigError: a text is of another form.
    """
    table: dict[str, object] = {}
    for text in texts:
        key, _, value = text.partition("=")
        try:
            table[key.strip()] = float(value)
        except ValueError:
            raise ConfigError(f"the limit {text!r} is not a rate", where="--limits", expected="NAME=RATE, e.g. 0.05") from None
    return read_limits(DEFAULT_LIMITS | table, "--limits")


def _source(given: Fields, home: Path) -> Source:
    pictures = given.text("pictures") if given.has("pictures") else BLANK
    source = Source(
        path=home / given.text("path"),
        name=given.text("name") if given.has("name") else "",
        format=given.choice("format", ("auto", *FORMATS)) if given.has("format") else "auto",
        cls=given.choice("class", ("harmful", "harmless")) if given.has("class") else "",
        pictures=pictures if pictures in (BLANK, TYPOGRAPHIC) else str(home / pictures),
        where=_where(given.child("where")) if given.has("where") else {},
        part=_part(given.numbers("part"), given.where) if given.has("part") else WHOLE,
        longest=given.integer("longest", 1) if given.has("longest") else None,
        limit=given.integer("limit", 1) if given.has("limit") else None,
        prompt=given.text("prompt") if given.has("prompt") else "",
    )
    given.done()
    return source


def _where(given: Fields) -> dict[str, tuple[str, ...]]:
    """Wanted values by column; one value may stand without a list."""
    return {name: (value,) if isinstance(value, str) else given.texts(name) for name, value in given.obj.items()}


def _part(ends: Sequence[float], where: str) -> tuple[float, float]:
    if len(ends) == 2 and 0 <= ends[0] < ends[1] <= 1:
        return ends[0], ends[1]
    what = f"part = {list(ends)} is not a range"
    raise ConfigError(what, where=where, expected="two shares from 0 to 1, the smaller first, e.g. [0.0, 0.5]")
