"""A checkpoint's weights where they lie: safetensors headers are read at once, a tensor's numbers when it is asked for.

Shared by align and export (tier 1). The safetensors package maps a file instead, so that what was read of a 7B model stays in
this process's memory, and gives numpy no bfloat16.

Source: the safetensors format: eight bytes of header length, a JSON header, the tensors' bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgesafe.checkpoint.weight_files import DAMAGED, MAPS, weight_files
from edgesafe.errors import InputError

# Kind of number: bytes each, what numpy reads them as, and the bits of the least magnitude that is no finite float32; bfloat16
# is the upper half of a float32.
_KINDS = {
    "F64": (8, "<f8", 0x47EF_FFFF_F000_0000),
    "F32": (4, "<f4", 0x7F80_0000),
    "F16": (2, "<f2", 0x7C00),
    "BF16": (2, "<u2", 0x7F80),
}
_MAX_HEADER = 100_000_000
_LFS = b"version "  # how a Git LFS pointer begins
_CHUNK = 2**20


@dataclass(frozen=True)
class Stored:
    """One tensor: its file, kind of number, shape, and where its bytes start in the file."""

    file: Path
    kind: str
    shape: tuple[int, ...]
    start: int

    @property
    def count(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def stop(self) -> int:
        """Where its bytes end in the file; its kind is one that `check_kind` lets through."""
        return self.start + self.count * _KINDS[self.kind][0]


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one file.

    Raises:
        InputError: it is missing, cut short or damaged.
    """
    if not path.is_file():
        what = "is a link that leads nowhere" if path.is_symlink() else "is missing"
        raise InputError(f"a file of weights {what}", where=str(path), expected="every shard of the checkpoint", todo=DAMAGED)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if start == _LFS:
            raise _pointer(path)
        if not 0 < length <= min(_MAX_HEADER, size - 8):
            raise damaged(path, f"its header would be {length} bytes long")
        try:
            header = dict(json.loads(file.read(length)))
        except (ValueError, TypeError, RecursionError) as error:
            raise damaged(path, "its header is not a JSON object") from error
    header.pop("__metadata__", None)
    return {name: _stored(path, name, entry, 8 + length, size) for name, entry in header.items()}


@dataclass(frozen=True)
class Reader:
    """Reads a checkpoint's files: whether one exists, and its tensors."""

    has: Callable[[Path], bool] = Path.is_file
    header: Callable[[Path], dict[str, Stored]] = read_header


ON_DISK = Reader()
# Of the weights alone, as if the folder had no exit maps.
WITHOUT_MAPS = Reader(has=lambda path: path.name != MAPS and path.is_file())


def read_headers(folder: Path, reader: Reader = ON_DISK) -> dict[str, Stored]:
    """Every tensor of a checkpoint folder's weights and exit maps by its name on disk.

    Args:
        folder: the checkpoint.
        reader: looks at its files.

    Raises:
        InputError: as `weight_files`, or a file is missing, cut short or damaged, or two files hold a tensor of one name.
    """
    found: dict[str, Stored] = {}
    maps = (folder / MAPS,) if reader.has(folder / MAPS) else ()
    for file in (*weight_files(folder, reader.has), *maps):
        tensors = reader.header(file)
        if twice := sorted(tensors.keys() & found.keys()):
            raise InputError(
                f"the tensor {twice[0]} is stored twice",
                where=f"{found[twice[0]].file.name} and {file}",
                expected="one tensor of each name",
                todo="load the checkpoint with transformers and save it again",
            )
        found |= tensors
    return found


def _pointer(path: Path) -> InputError:
    return InputError(
        "the file is Git LFS's note of where the weights are, not the weights",
        where=str(path),
        expected="safetensors",
        todo="run `git lfs pull` in that folder",
    )


def _stored(path: Path, name: str, entry: Any, base: int, size: int) -> Stored:
    try:
        kind, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
        first, last = (int(n) for n in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(path, f"the entry of {name} can't be read") from error
    each = _KINDS[kind][0] if kind in _KINDS else (last - first) // max(1, math.prod(shape))
    if first < 0 or last - first != each * math.prod(shape):
        raise damaged(path, f"{name} has {last - first} bytes for the shape {list(shape)} of {kind}")
    if base + last > size:
        raise damaged(path, f"it ends {base + last - size} bytes before {name} does")
    return Stored(path, kind, shape, base + first)


def damaged(path: Path, what: str) -> InputError:
    """The error of a file of weights that is not what its header says."""
    return InputError(
        f"a file of weights is cut short or damaged: {what}", where=str(path), expected="safetensors", todo=DAMAGED
    )


def not_finite(name: str, stored: Stored, bad: int) -> InputError:
    """The error of a weight of which `bad` numbers are NaN or infinite."""
    return InputError(
        f"weight {name} is not finite: {bad} of its {stored.count} numbers {'is' if bad == 1 else 'are'} NaN or infinite",
        where=str(stored.file),
        expected="finite weights",
        todo=f"{DAMAGED}, or train it again if it diverged",
    )


def check_kind(stored: Stored, name: str) -> None:
    """Refuse a weight that holds no floating-point numbers.

    Raises:
        InputError: it doesn't.
    """
    if stored.kind not in _KINDS:
        raise InputError(
            f"weight {name} is of type {stored.kind}",
            where=str(stored.file),
            expected="one of " + ", ".join(_KINDS),
            todo="use the checkpoint before it was quantized, in one of these",
        )


def count_bad(raw: bytes | memoryview, kind: str) -> int:
    """How many numbers of a tensor's bytes are NaN, infinite or beyond float32, by their bits alone.

    >>> count_bad(np.array([1.0, np.nan, -np.inf, 65504], "<f2").tobytes(), "F16")
    2
    """
    each, _, least = _KINDS[kind]
    bits = np.frombuffer(raw, f"<u{each}")
    magnitude = bits & bits.dtype.type(2 ** (8 * each - 1) - 1)  # all but the sign
    return int(np.count_nonzero(magnitude >= least))


def same_numbers(one: Stored, other: Stored) -> bool:
    """Whether two tensors are alike to the bit; those that are not on this disk are taken to be."""
    if (one.kind, one.shape) != (other.kind, other.shape):
        return False
    if one.kind not in _KINDS or not (one.file.exists() and other.file.exists()):
        return True  # `check_kind` refuses the first; of the second no weight is read
    width = _KINDS[one.kind][0] * one.count
    with one.file.open("rb") as a, other.file.open("rb") as b:
        a.seek(one.start)
        b.seek(other.start)
        steps = (min(_CHUNK, width - at) for at in range(0, width, _CHUNK))
        return all(a.read(n) == b.read(n) for n in steps)


def read_tensor(stored: Stored, name: str) -> np.ndarray:
    """A tensor's numbers as float32, read and not mapped, so that nothing of the file stays in this process.

    Raises:
        InputError: it holds no floating-point numbers, or one that is not finite.
    """
    check_kind(stored, name)
    raw = np.fromfile(stored.file, _KINDS[stored.kind][1], stored.count, offset=stored.start)
    if raw.size != stored.count:
        raise damaged(stored.file, f"{name} ends early")
    if stored.kind == "BF16":
        wide = np.empty(raw.size, np.float32)
        np.left_shift(raw, 16, out=wide.view(np.uint32), dtype=np.uint32, casting="unsafe")
    else:
        wide = raw.astype(np.float32, copy=False)
    with np.errstate(over="ignore", invalid="ignore"):
        squares = float(np.dot(wide, wide))  # finite only where every number is; needs no second array
    if not math.isfinite(squares) and not np.isfinite(wide).all():
        raise not_finite(name, stored, int(np.count_nonzero(~np.isfinite(wide))))
    return wide.reshape(stored.shape)
