"""Exit depths and ladders. An exit depth is the number of blocks run (1..n), never an index."""

from __future__ import annotations

from edgesafe.errors import ConfigError

_FULL_LADDER_UP_TO = 12
_SPREAD = 8


def parse_exits(spec: str, n_blocks: int) -> tuple[int, ...]:
    """The exit depths that a text names, ascending.

    Args:
        spec: ``all``, a range ``1-11``, a list ``2,4,6`` (ranges allowed in it) or ``every:2``.
        n_blocks: Blocks of the vision tower, the largest depth allowed.

    Raises:
        ConfigError: The text is none of these, or names a depth outside 1..n_blocks.

    >>> parse_exits("all", 4), parse_exits("2,4", 4), parse_exits("1-3", 4), parse_exits("every:2", 5)
    ((1, 2, 3, 4), (2, 4), (1, 2, 3), (2, 4))
    """
    text = spec.strip().lower()
    if text == "all":
        return tuple(range(1, n_blocks + 1))
    if text.startswith("every:"):
        step = _number(text[len("every:") :], spec)
        depths = set(range(step, n_blocks + 1, step)) if step > 0 else set()
    else:
        depths = set()
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            low = _number(first, spec)
            high = _number(last, spec) if dash else low
            if high < low:
                raise _bad(spec, f"the range {part.strip()} runs backwards")
            depths.update((low, high))
            # A huge range is refused below by its ends alone, without being spelled out.
            depths.update(range(low, high + 1) if high <= n_blocks else ())
    outside = sorted(d for d in depths if not 1 <= d <= n_blocks)
    if outside or not depths:
        raise _bad(spec, f"depths must lie within 1..{n_blocks}" + (f", got {outside}" if outside else ""))
    return tuple(sorted(depths))


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
            f"vision_feature_layer {vision_feature_layer} is no block of a tower with {n_blocks}",
            where="config.json",
            expected=f"an index that names one of blocks 1..{n_blocks}",
            todo="use a checkpoint whose projector reads one vision layer",
        )
    return depth


def default_ladder(n_blocks: int, reference_depth: int) -> tuple[int, ...]:
    """Every depth up to the reference depth of a small tower, eight evenly spread ones of a large tower.

    >>> default_ladder(12, 11)
    (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11)
    >>> default_ladder(24, 23)
    (3, 6, 9, 12, 14, 17, 20, 23)
    """
    if not 1 <= reference_depth <= n_blocks:
        raise ConfigError(f"reference depth {reference_depth} lies outside 1..{n_blocks}")
    if reference_depth <= _FULL_LADDER_UP_TO:
        return tuple(range(1, reference_depth + 1))
    # Half up in integers: Python's round() goes to even and would make the ladder depend on float luck.
    return tuple((2 * reference_depth * i + _SPREAD) // (2 * _SPREAD) for i in range(1, _SPREAD + 1))


def segments(ladder: tuple[int, ...]) -> list[tuple[int, int]]:
    """The blocks between one exit and the next, as (blocks before, blocks after).

    >>> segments((3, 6, 9))
    [(0, 3), (3, 6), (6, 9)]
    """
    return list(zip((0, *ladder), ladder, strict=False))


def _number(text: str, spec: str) -> int:
    # isdecimal() alone accepts other scripts' digits, which int() reads but nobody means here.
    if not (text.strip().isascii() and text.strip().isdecimal()):
        raise _bad(spec, f"{text.strip()!r} is not a depth")
    return int(text)


def _bad(spec: str, why: str) -> ConfigError:
    return ConfigError(f"can't read the exits {spec!r}: {why}", where="exits", expected="'all', '1-11', '2,4,6' or 'every:2'")
