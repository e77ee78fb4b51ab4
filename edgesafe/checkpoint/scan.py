"""The one read of a checkpoint's bytes before an export begins: its digest is taken, and every weight found finite.

Otherwise a number that is none would be found when its piece is reached, minutes into a large model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgesafe.checkpoint.shards import Stored, count_bad, damaged, not_finite
from edgesafe.format.files import digest_folder
from edgesafe.progress import bar, step

_CHUNK = 2**20  # bytes that are read, hashed and checked together: they stay in the processor's cache


@dataclass(frozen=True)
class Part:
    """A run of a file's bytes: a weight's, or what lies between weights (`name` is empty)."""

    file: Path
    start: int
    stop: int
    name: str = ""
    kind: str = ""


def scan_checkpoint(folder: Path, stored: Mapping[str, Stored]) -> str:
    """The digest of a checkpoint folder, every weight of it finite.

    Args:
        folder: the checkpoint.
        stored: where the model's weights lie; other tensors of the files are hashed and not checked.

    Returns:
        What `edgesafe.format.bundle.digest_folder` returns.

    Raises:
        InputError: a weight holds a number that is not finite, or a file changed since its header was read.
    """
    by_file: dict[Path, dict[str, Stored]] = {}
    for name, one in stored.items():
        by_file.setdefault(one.file, {})[name] = one
    parts = [part for file, weights in sorted(by_file.items()) for part in split(file, file.stat().st_size, weights)]
    hashes = {file: hashlib.sha256() for file in by_file}
    sizes = [part.stop - part.start for part in parts]
    with step(f"check that {sum(sizes) / 1e9:.3g} GB of weights are finite, and take their digest"):
        for part in bar(parts, label="tensors", sizes=sizes):
            bad = 0
            for chunk in _chunks(part):
                hashes[part.file].update(chunk)
                bad += count_bad(chunk, part.kind) if part.name else 0
            if bad:
                raise not_finite(part.name, stored[part.name], bad)
    return digest_folder(folder, {file: digest.hexdigest() for file, digest in hashes.items()})


def split(file: Path, size: int, weights: Mapping[str, Stored]) -> Iterator[Part]:
    """A file of `size` bytes in parts that follow each other, one per weight.

    >>> a, b = Stored(Path("f"), "F16", (2,), 20), Stored(Path("f"), "F32", (), 10)
    >>> [(part.start, part.stop, part.name) for part in split(Path("f"), 24, {"a": a, "b": b})]
    [(0, 10, ''), (10, 14, 'b'), (14, 20, ''), (20, 24, 'a')]

    Raises:
        InputError: two weights share bytes.
    """
    at = 0
    for name, one in sorted(weights.items(), key=lambda item: (item[1].start, item[1].stop)):
        if one.start < at:
            raise damaged(file, f"{name} shares bytes with another weight")
        if one.start > at:
            yield Part(file, at, one.start)
        yield Part(file, one.start, one.stop, name, one.kind)
        at = one.stop
    if size > at:
        yield Part(file, at, size)


def _chunks(part: Part) -> Iterator[memoryview]:
    """A part's bytes, some at a time; the memory is used again for the next ones."""
    buffer = memoryview(bytearray(min(_CHUNK, part.stop - part.start)))
    left = part.stop - part.start
    with part.file.open("rb") as file:
        file.seek(part.start)
        while left:
            count = file.readinto(buffer[:left])
            if count < min(left, len(buffer)):
                raise damaged(part.file, f"it ends {left - count} bytes early")
            yield buffer[:count]
            left -= count
