"""The one read before an export: its digest is the folder's, and a number that is none is found by its bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from edgesafe.checkpoint import scan
from edgesafe.checkpoint.shards import Stored, count_bad, read_headers, read_tensor
from edgesafe.errors import InputError
from edgesafe.format.files import digest_folder
from mutants import wrong

KINDS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SIZE = 23


@pytest.fixture
def folder(tmp_path) -> Path:
    """A weight of each kind, and one of whole numbers between them that no model uses."""
    weights = {kind: torch.arange(SIZE, dtype=dtype) - 7 for kind, dtype in KINDS.items()}
    return _save(tmp_path / "checkpoint", {**weights, "G": torch.arange(5)})


def _save(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def _scan(folder: Path) -> str:
    return scan.scan_checkpoint(folder, {n: s for n, s in read_headers(folder).items() if n in KINDS})


@pytest.mark.parametrize("chunk", [8, 24, 2**20])
def test_the_digest_is_the_folders(folder, monkeypatch, chunk):
    monkeypatch.setattr(scan, "_CHUNK", chunk)
    assert _scan(folder) == digest_folder(folder)


@pytest.mark.parametrize("chunk", [8, 2**20])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [[0], [SIZE - 1], [3, 4, 17]])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_none_is_named(tmp_path, monkeypatch, chunk, kind, at, value):
    monkeypatch.setattr(scan, "_CHUNK", chunk)
    weights = {k: torch.ones(SIZE, dtype=dtype) for k, dtype in KINDS.items()}
    weights[kind][at] = value
    folder = _save(tmp_path / "checkpoint", weights)
    with pytest.raises(InputError, match=rf"weight {kind} is not finite: {len(at)} of its {SIZE} numbers.*model.safetensors"):
        _scan(folder)
    with pytest.raises(InputError, match=f"weight {kind} is not finite"):
        read_tensor(read_headers(folder)[kind], kind)


def test_what_no_model_uses_may_hold_anything(tmp_path):
    bad = torch.full((3,), float("nan"))
    folder = _save(tmp_path / "checkpoint", {"F32": torch.ones(3), "another": bad})
    assert _scan(folder) == digest_folder(folder)


def _by_numpy(numbers: np.ndarray) -> int:
    with np.errstate(over="ignore"):
        return int((~np.isfinite(numbers.astype(np.float32))).sum())


def _misjudged(count) -> list[str]:
    """Bits that are not judged as numpy judges the float32 that they are read as."""
    all16 = np.arange(2**16, dtype=np.uint32).astype("<u2")
    edge32 = np.array([0x7F7FFFFF, 0x7F800000, 0x7F800001, 0xFF7FFFFF, 0xFF800000, 0xFFC00000, 0, 1, 0x80000000], "<u4")
    top = (2 - 2.0**-24) * 2.0**127  # halfway between the largest float32 and the next: rounds to infinity
    edge64 = np.array([top, np.nextafter(top, 0), -top, -np.nextafter(top, 0), np.nan, np.inf, 1e300, 0, -1], "<f8")
    cases = [("F16", all16.view("<f2")), ("BF16", (all16.astype("<u4") << 16).view("<f4")), ("F32", edge32.view("<f4"))]
    raw = {"F16": all16, "BF16": all16, "F32": edge32, "F64": edge64}
    return [
        f"{kind} {i}"
        for kind, numbers in [*cases, ("F64", edge64)]
        for i in range(len(numbers))
        if count(raw[kind][i : i + 1].tobytes(), kind) != _by_numpy(numbers[i : i + 1])
    ]


def test_every_sixteen_bits_are_judged_as_numpy_judges_them():
    assert _misjudged(count_bad) == []


WRONG = [(">= least", "> least"), (">= least", "== least"), ("(8 * each - 1)", "(8 * each)")]


@pytest.mark.parametrize("edit", WRONG, ids=["no infinity", "infinity alone", "with the sign"])
def test_that_test_fails_on_wrong_versions(edit):
    assert _misjudged(wrong(count_bad, edit))


def test_weights_that_share_bytes(folder):
    one = read_headers(folder)["F32"]
    again = Stored(one.file, "F32", (2,), one.start + 4)
    with pytest.raises(InputError, match="shares bytes"):
        scan.scan_checkpoint(folder, {"a": one, "b": again})


def test_a_file_that_was_cut_since_its_header_was_read(folder):
    stored = {n: s for n, s in read_headers(folder).items() if n in KINDS}
    path = folder / "model.safetensors"
    last = max(s.stop for s in stored.values())
    path.write_bytes(path.read_bytes()[: last - 3])
    with pytest.raises(InputError, match="F.. ends early|cut short"):
        scan.scan_checkpoint(folder, stored)
