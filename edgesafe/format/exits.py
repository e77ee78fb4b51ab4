"""Exits and ladders. An exit's depth is the number of blocks run (1..n), never an index."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import total_ordering

from edgesafe.errors import ConfigError, InputError
from edgesafe.format.fields import Fields

_FULL_LADDER_UP_TO = 12
_SPREAD = 8
# Exits with fewer visual tokens or tiles that one ladder may have: each is certified with the whole suite.
MOST_RUNGS = 12
# Few enough digits that no spelling of a number costs time; [0-9] because \d takes other scripts' digits too.
_MOST = 999_999
_SPELLED = re.compile(r"([1-9][0-9]{0,5})(?:@([1-9][0-9]{0,5})|x([1-9][0-9]{0,5}))?")
_FEWER = "DEPTH@TOKENS or DEPTHxTILES"


@total_ordering
@dataclass(frozen=True)
class Exit:
    """Where an answer leaves the vision encoder: the key of every table and file that speaks of exits.

    Exits are ordered by depth, then by visual tokens or tiles; all of them come last, as they cost the most.

    Attributes:
        depth: Blocks of the vision tower that are run, 1 to 999999.
        visual_tokens: Tokens that a picture becomes, 1 to 999999; None for all that the tower gives.
        tiles: How often the tower runs for a picture at most, 1 to 999999: for its tiles and for the whole of it. None for as
            often as its family cuts it. An exit has this or fewer visual tokens, not both.

    >>> str(Exit(6)), str(Exit(6, 9)), str(Exit(6, tiles=1)), str(sorted([Exit(8), Exit(6), Exit(6, 9)])[0])
    ('6', '6@9', '6x1', '6@9')
    """

    depth: int
    visual_tokens: int | None = None
    tiles: int | None = None

    def __post_init__(self) -> None:
        if self.visual_tokens is not None and self.tiles is not None:
            raise InputError("an exit has fewer visual tokens and fewer tiles", where="exit", expected="one of the two")
        for name in ("depth", "visual_tokens", "tiles"):
            value = getattr(self, name)
            if value is None and name != "depth":
                continue
            # A bool is an int to Python and a mistake here.
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST:
                raise InputError(f"an exit's {name} is {value!r}", where="exit", expected=f"a whole number from 1 to {_MOST}")

    def __str__(self) -> str:
        if self.tiles is not None:
            return f"{self.depth}x{self.tiles}"
        return str(self.depth) if self.visual_tokens is None else f"{self.depth}@{self.visual_tokens}"

    @property
    def fewer(self) -> int | None:
        """Its number of visual tokens, or of tiles: a bundle has exits of one kind. None of an exit that is a depth alone."""
        return self.visual_tokens or self.tiles

    @property
    def whole(self) -> bool:
        """Whether it sees all of a picture: it is a depth alone."""
        return self.fewer is None

    def __lt__(self, other: object) -> bool:
        return self._rank() < other._rank() if isinstance(other, Exit) else NotImplemented

    def _rank(self) -> tuple[int, float, float]:
        return self.depth, self.visual_tokens or math.inf, self.tiles or math.inf

    @staticmethod
    def parse(text: str) -> Exit:
        """The exit that a text names.

        Args:
            text: ``DEPTH``, ``DEPTH@TOKENS`` or ``DEPTHxTILES``, as ``str`` writes it.

        Raises:
            InputError: The text is none of them.

        >>> Exit.parse("6@9") == Exit(6, 9), Exit.parse("6x1") == Exit(6, tiles=1)
        (True, True)
        """
        match = _SPELLED.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise InputError(f"{text!r} is not an exit", where="exit", expected=f"a depth such as 6, or {_FEWER}")
        return Exit(int(match[1]), *(int(count) if count else None for count in match.groups()[1:]))

    @staticmethod
    def of(value: Exit | int | str) -> Exit:
        """An exit as people write it: itself, a depth, or its text.

        Raises:
            InputError: It is none of these.

        >>> Exit.of(6) == Exit.of("6") == Exit(6)
        True
        """
        if isinstance(value, Exit):
            return value
        return Exit.parse(value) if isinstance(value, str) else Exit(value)


def read_exit(fields: Fields, key: str = "exit", *, by_depth: bool = False) -> Exit:
    """The exit that a table of a file names under ``key``.

    Args:
        fields: The table.
        key: Its key.
        by_depth: The file is of an earlier format, which has the depth alone, a number, under ``<key>_depth``.

    Raises:
        EdgesafeError: Of the class that ``fields`` raises; it is not an exit, or not spelled as ``str`` does.
    """
    if by_depth:
        return Exit(fields.integer(f"{key}_depth", 1, _MOST))
    text = fields.text(key)
    if not _SPELLED.fullmatch(text):
        raise fields.error(f"{key} is {text!r}", where=fields.where, expected=f"an exit: a depth, or {_FEWER}")
    return Exit.parse(text)


def parse_exits(spec: str, n_blocks: int, most: int | None = MOST_RUNGS) -> tuple[Exit, ...]:
    """The exits that a text names, ascending.

    Args:
        spec: A list of ``all``, ranges ``1-11``, depths ``6`` and ``every:2``, each with ``@`` and a number of visual tokens
            where the exits have fewer of them than the tower gives: ``1-12,6-12@9``, or with ``x`` and how many tiles a
            picture has at most: ``12,6-12x1``.
        n_blocks: Blocks of the vision tower, the largest depth allowed.
        most: How many may have fewer tokens or tiles; None for any number, as where they are not certified.

    Raises:
        ConfigError: The text is none of these, names a depth outside 1..n_blocks, or too many exits with fewer tokens or tiles.

    >>> [" ".join(map(str, parse_exits(spec, 5))) for spec in ("all", "2,4", "1-3", "every:2", "5,4-5@9", "5,every:2x1")]
    ['1 2 3 4 5', '2 4', '1 2 3', '2 4', '4@9 5@9 5', '2x1 4x1 5']
    """
    exits: set[Exit] = set()
    for part in spec.strip().lower().split(","):
        name = "tiles" if "x" in part else "visual_tokens"
        depths, sign, fewer = part.strip().partition("x" if name == "tiles" else "@")
        count = _number(fewer, spec) if sign else None
        if count == 0:
            raise _bad(spec, "an exit has at least 1 visual token or tile")
        exits.update(Exit(depth, **{name: count}) for depth in _depths(depths, spec, n_blocks))
    rungs = sum(not exit.whole for exit in exits)
    if most is not None and rungs > most:
        raise _bad(spec, f"{rungs} exits with fewer visual tokens or tiles, at most {most}")
    return tuple(sorted(exits))


def _depths(text: str, spec: str, n_blocks: int) -> Iterable[int]:
    """The depths of one part of a spec, without its tokens."""
    if text == "all":
        return range(1, n_blocks + 1)
    if text.startswith("every:"):
        step = _number(text[len("every:") :], spec)
        low, depths = step, range(step, n_blocks + 1, step) if step > 0 else range(0)
    else:
        first, dash, last = text.partition("-")
        low = _number(first, spec)
        high = _number(last, spec) if dash else low
        if high < low:
            raise _bad(spec, f"the range {text.strip()} runs backwards")
        if high > n_blocks:  # refused by its ends alone, without being spelled out
            raise _bad(spec, f"depths must lie within 1..{n_blocks}, got {high}")
        depths = range(low, high + 1)
    if not depths or low < 1:
        raise _bad(spec, f"depths must lie within 1..{n_blocks}" + (f", got {low}" if low < 1 else ""))
    return depths


def pool_windows(image_tokens: int, visual_tokens: int) -> list[tuple[int, int]]:
    """What an exit with fewer visual tokens averages of each side of a square picture: from and up to which row, or column.

    A side of s tokens becomes one of t: the i-th is the mean of those from i s // t up to the next whole number from
    (i + 1) s / t. Where t does not divide s, neighbours share a row.

    Args:
        image_tokens: What the tower gives, s x s.
        visual_tokens: What becomes of them, t x t.

    Raises:
        ConfigError: One of them is not a square, or there would be as many or more.

    Source: torch.nn.functional.adaptive_avg_pool2d.

    >>> pool_windows(36, 9), pool_windows(9, 4)
    ([(0, 2), (2, 4), (4, 6)], [(0, 2), (1, 3)])
    """
    side, fewer = math.isqrt(image_tokens), math.isqrt(visual_tokens)
    if side * side != image_tokens or fewer * fewer != visual_tokens or not 0 < fewer < side:
        squares = ", ".join(str(n * n) for n in range(side - 1, max(side - 7, 0), -1))
        raise ConfigError(
            f"{image_tokens} visual tokens can't become {visual_tokens}",
            where="exits",
            expected=f"a smaller square, such as {squares or 'none'}" if side * side == image_tokens else "a square of tokens",
            todo="choose another number of visual tokens",
        )
    return [(i * side // fewer, -(-(i + 1) * side // fewer)) for i in range(fewer)]


def prompt_at(ids: Sequence[int], exit: Exit, image_token_id: int, image_tokens: int) -> list[int]:
    """A prompt as an exit reads it: where it has fewer visual tokens, with as many image tokens.

    Args:
        ids: The prompt with all of a picture's image tokens, in one run.
        exit: Which one.
        image_token_id: The image token.
        image_tokens: How many of them a whole picture has.

    >>> prompt_at([1, 9, 9, 9, 9, 2], Exit(6, 1), 9, 4), prompt_at([1, 9, 9, 9, 9, 2], Exit(6), 9, 4)
    ([1, 9, 2], [1, 9, 9, 9, 9, 2])
    """
    if exit.visual_tokens is None:
        return list(ids)
    first = list(ids).index(image_token_id)
    return [*ids[: first + exit.visual_tokens], *ids[first + image_tokens :]]


def reference_depth(n_blocks: int, vision_feature_layer: int) -> int:
    """The number of blocks that the model was trained to use.

    Args:
        n_blocks: Blocks of the vision tower.
        vision_feature_layer: transformers' index into its n_blocks + 1 ``hidden_states`` (0 = embeddings).

    Raises:
        ConfigError: The index names the embeddings or no block at all.

    Source: transformers ``LlavaModel.get_image_features``, which indexes ``hidden_states`` with it.

    >>> reference_depth(24, -2), reference_depth(12, -1), reference_depth(12, 6)
    (23, 12, 6)
    """
    depth = vision_feature_layer if vision_feature_layer >= 0 else n_blocks + 1 + vision_feature_layer
    if not 1 <= depth <= n_blocks:
        raise ConfigError(
            f"vision_feature_layer {vision_feature_layer} isn't a block of a tower with {n_blocks}",
            where="config.json",
            expected=f"an index that names one of blocks 1..{n_blocks}",
            todo="use a checkpoint whose projector reads one vision layer",
        )
    return depth


def default_ladder(n_blocks: int, reference_depth: int) -> tuple[Exit, ...]:
    """Every depth up to the reference depth of a small tower, eight evenly spread ones of a large tower.

    >>> " ".join(map(str, default_ladder(12, 11))), " ".join(map(str, default_ladder(24, 23)))
    ('1 2 3 4 5 6 7 8 9 10 11', '3 6 9 12 14 17 20 23')
    """
    if not 1 <= reference_depth <= n_blocks:
        raise ConfigError(f"reference depth {reference_depth} lies outside 1..{n_blocks}")
    if reference_depth <= _FULL_LADDER_UP_TO:
        return tuple(Exit(depth) for depth in range(1, reference_depth + 1))
    # Half up in integers: Python's round() goes to even and would make the ladder depend on float luck.
    return tuple(Exit((2 * reference_depth * i + _SPREAD) // (2 * _SPREAD)) for i in range(1, _SPREAD + 1))


def depths_of(ladder: Iterable[Exit]) -> list[int]:
    """The depths of a ladder, ascending, each once."""
    return sorted({exit.depth for exit in ladder})


def segments(ladder: tuple[Exit, ...]) -> list[tuple[int, int]]:
    """The blocks between one depth of a ladder and the next, as (blocks before, blocks after).

    >>> segments((Exit(3), Exit(6), Exit(9)))
    [(0, 3), (3, 6), (6, 9)]
    """
    depths = depths_of(ladder)
    return list(zip((0, *depths), depths, strict=False))


def _number(text: str, spec: str) -> int:
    # isdecimal() alone accepts other scripts' digits, which int() reads but nobody means here; thousands of digits it refuses.
    digits = text.strip()
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= len(str(_MOST))):
        raise _bad(spec, f"{digits!r} is not a depth")
    return int(digits)


def _bad(spec: str, why: str) -> ConfigError:
    expected = "'all', '1-11', '2,4,6', 'every:2', '6-12@9' or '6-12x1'"
    return ConfigError(f"can't read the exits {spec!r}: {why}", where="exits", expected=expected)
