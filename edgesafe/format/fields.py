"""Typed reading of decoded JSON and TOML: where a wrong, missing or unknown key becomes an error."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

from edgesafe.errors import EdgesafeError


class Fields:
    """The keys of one decoded object, each read with its type; then ``done()`` refuses the rest.

    Args:
        obj: What the decoder returned.
        where: The file and the place in it, for messages.
        error: The exception class to raise.
    """

    def __init__(self, obj: object, where: str, error: type[EdgesafeError]) -> None:
        self.where = where
        self.error = error
        if not isinstance(obj, Mapping) or not all(isinstance(key, str) for key in obj):
            raise error(f"got {_kind(obj)}", where=where, expected="a table of named fields")
        self.obj: Mapping[str, Any] = obj
        self.known: set[str] = set()

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        self.known.add(key)
        return self.obj.get(key) is not None

    def text(self, key: str) -> str:
        """A text."""
        value = self._get(key, "a text")
        return value if isinstance(value, str) else self._wrong(key, value, "a text")

    def choice(self, key: str, allowed: tuple[str, ...]) -> str:
        """One of the allowed texts."""
        value = self.text(key)
        return value if value in allowed else self._wrong(key, value, " or ".join(map(repr, allowed)))

    def integer(self, key: str, low: int = 0, high: int = 2**63 - 1) -> int:
        """A whole number from ``low`` to ``high``; True and 1.0 are none."""
        expected = f"a whole number of at least {low}" + (f" and at most {high}" if high < 2**63 - 1 else "")
        value = self._get(key, expected)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self._wrong(key, value, expected)
        return int(value)

    def number(self, key: str, low: float | None = None) -> float:
        """A finite number of at least ``low``."""
        expected = "a finite number" + (f" of at least {low:g}" if low is not None else "")
        value = self._get(key, expected)
        if not _is_number(value):
            self._wrong(key, value, expected)
        if low is not None and value < low:
            self._wrong(key, value, expected)
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false."""
        value = self._get(key, "true or false")
        return value if isinstance(value, bool) else self._wrong(key, value, "true or false")

    def items(self, key: str) -> list[Any]:
        """A list of anything."""
        value = self._get(key, "a list")
        return list(value) if isinstance(value, list | tuple) else self._wrong(key, value, "a list")

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts."""
        value = self.items(key)
        return tuple(value) if all(isinstance(v, str) for v in value) else self._wrong(key, value, "a list of texts")

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers."""
        value = self.items(key)
        fine = all(isinstance(v, int) and not isinstance(v, bool) and abs(v) < 2**63 for v in value)
        return tuple(value) if fine else self._wrong(key, value, "a list of whole numbers")

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of finite numbers."""
        value = self.items(key)
        return tuple(map(float, value)) if all(map(_is_number, value)) else self._wrong(key, value, "a list of finite numbers")

    def table(self, key: str) -> dict[str, Any]:
        """A table of anything."""
        value = self._get(key, "a table")
        fine = isinstance(value, Mapping) and all(isinstance(k, str) for k in value)
        return dict(value) if fine else self._wrong(key, value, "a table")

    def child(self, key: str) -> Fields:
        """A table, ready to be read field by field."""
        return Fields(self.table(key), f"{self.where}: {key}", self.error)

    def children(self, key: str) -> list[Fields]:
        """A list of tables, ready to be read field by field."""
        return [Fields(v, f"{self.where}: {key}[{i}]", self.error) for i, v in enumerate(self.items(key))]

    def done(self) -> None:
        """Refuse every key that was not read, with the nearest known key as a suggestion."""
        for key in self.obj:
            if key in self.known:
                continue
            near = difflib.get_close_matches(key, sorted(self.known), n=1)
            raise self.error(
                f"unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else ""),
                where=self.where,
                expected="one of " + ", ".join(sorted(self.known)),
                todo=f"rename or remove {key!r}",
            )

    def _get(self, key: str, expected: str) -> Any:
        self.known.add(key)
        if key not in self.obj:
            near = difflib.get_close_matches(key, sorted(set(self.obj) - self.known), n=1)
            raise self.error(
                f"the key {key!r} is missing" + (f", did you mean it by {near[0]!r}?" if near else ""),
                where=self.where,
                expected=f"{key} = {expected}",
            )
        return self.obj[key]

    def _wrong(self, key: str, value: object, expected: str) -> Any:
        shown = repr(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise self.error(f"{key} is {_kind(value)} {shown}", where=self.where, expected=f"{key} = {expected}")


def _is_number(value: object) -> bool:
    """Whether it is a finite number that a float can hold; True is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 2**63


def _kind(value: object) -> str:
    names = {dict: "a table", list: "a list", str: "the text", bool: "the flag", type(None): "nothing"}
    return names.get(type(value), f"the {type(value).__name__}")
