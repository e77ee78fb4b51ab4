"""The bundle's folder: exactly the listed files with exactly their bytes, and a manifest that is read strictly."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path

import pytest

from edgesafe.errors import (
    BundleError,
    CertificateError,
    CertificateMismatchError,
    FormatVersionError,
    IntegrityError,
    UnsupportedModelError,
)
from edgesafe.format.bundle import CERTIFICATE, MANIFEST, Bundle
from edgesafe.format.certificate import Certificate, certified_exits, read_certificate, write_certificate
from edgesafe.format.exits import Exit
from edgesafe.format.files import write_atomically
from edgesafe.format.manifest import FORMAT_VERSION, Manifest
from edgesafe.format.seal import seal, unseal
from edgesafe.format.specs import ImageSpec
from edgesafe.runtime import Session
from handmade import make_bundle, make_certificate


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x20
    path.write_bytes(bytes(data))


def all_files(root: Path) -> list[str]:
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())


def test_a_flipped_byte_in_each_file_is_refused(handmade, copy_of):
    root = copy_of(handmade)
    files = all_files(root)
    assert {MANIFEST, CERTIFICATE, "tokenizer.json", "suite/suite.json", "vision/head.onnx"} <= set(files)
    for name in files:
        whole = (root / name).read_bytes()
        for at in {0, len(whole) // 2, len(whole) - 1}:
            flip(root / name, at)
            with pytest.raises(IntegrityError) as caught:
                Session.open(root)
            assert name in str(caught.value)
            (root / name).write_bytes(whole)
    assert Session.open(root).certified == (Exit(1), Exit(2))


def test_a_missing_file_a_cut_one_and_an_added_one_are_refused(handmade, copy_of):
    root = copy_of(handmade)
    (root / "extra.txt").write_text("x")
    with pytest.raises(IntegrityError, match=r"extra\.txt"):
        Bundle.open(root)
    (root / "extra.txt").unlink()
    data = (root / "tokenizer.json").read_bytes()
    (root / "tokenizer.json").write_bytes(data[:-1])
    with pytest.raises(IntegrityError, match=r"tokenizer\.json"):
        Bundle.open(root)
    (root / "tokenizer.json").unlink()
    with pytest.raises(IntegrityError, match="missing"):
        Bundle.open(root)


@pytest.mark.parametrize("name", ["tokenizer.json", MANIFEST, CERTIFICATE])
def test_links_are_refused_even_to_the_right_bytes(handmade, copy_of, tmp_path, name):
    root = copy_of(handmade)
    (root / name).rename(tmp_path / "elsewhere")
    (root / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IntegrityError):
        Bundle.open(root)


def test_a_linked_folder_and_a_pipe_are_refused(handmade, copy_of, tmp_path):
    root = copy_of(handmade)
    os.mkfifo(root / "pipe")
    with pytest.raises(IntegrityError, match="pipe"):
        Bundle.open(root)
    (root / "pipe").unlink()
    (root / "suite").rename(tmp_path / "suite")
    (root / "suite").symlink_to(tmp_path / "suite")
    with pytest.raises(IntegrityError, match="suite"):
        Bundle.open(root)


def test_what_an_interrupted_write_left_does_not_lock_the_bundle(handmade, copy_of):
    root = copy_of(handmade)
    (root / "certificate.json.partial").write_bytes(b"half")
    assert Bundle.open(root).manifest.ladder == (Exit(1), Exit(2), Exit(3))


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_text("x")])
def test_a_wrong_folder_is_a_bundle_error(tmp_path, make):
    make(tmp_path / "it")
    with pytest.raises(BundleError) as caught:
        Bundle.open(tmp_path / "it")
    assert caught.value.exit_code == 40


def test_a_newer_format_says_upgrade(handmade, copy_of):
    root = copy_of(handmade)
    obj = unseal((root / MANIFEST).read_bytes(), MANIFEST)
    (root / MANIFEST).write_bytes(seal({**obj, "format_version": FORMAT_VERSION + 1, "new_key": 1}))
    with pytest.raises(FormatVersionError, match="upgrade"):
        Bundle.open(root)


def test_manifest_reads_back_what_it_wrote(handmade):
    manifest = Bundle.open(handmade).manifest
    assert Manifest.from_dict(manifest.to_dict()) == manifest


def _set(*path: object):
    *way, key, value = path

    def change(obj: dict) -> None:
        for step in way:
            obj = obj[step]
        obj[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (_set("name", 3), "name"),
        (_set("seed", True), "seed"),
        (_set("seed", -1), "seed"),
        (_set("n_blocks", 12.0), "n_blocks"),
        (_set("layout", "ring"), "layout"),
        (_set("layuot", "chain"), "did you mean 'layout'"),
        (lambda o: o.pop("device"), "device"),
        (_set("exits", 0, "exit", 1), "exit"),
        (_set("exits", 0, "exit", "01"), "exit is '01'"),
        (_set("exits", 0, "exit_depth", 1), "exit_depth"),
        (_set("exits", 0, "exit", "2"), "ascending"),
        (_set("exits", 2, "exit", "5"), "ascending"),
        (_set("exits", 0, "graphs", []), "no graphs"),
        (_set("exits", 0, "graphs", ["vision/other.onnx"]), "vision/other.onnx"),
        (_set("exits", []), "ascending"),
        (_set("reference", "4"), "the reference 4"),
        (_set("reference", 3), "reference"),
        (_set("reference_depth", 3), "reference_depth"),
        (_set("files", "../outside", {"sha256": "0", "bytes": 0}), "leaves the bundle"),
        (_set("files", "/etc/passwd", {"sha256": "0", "bytes": 0}), "leaves the bundle"),
        (_set("files", "a\\b", {"sha256": "0", "bytes": 0}), "leaves the bundle"),
        (_set("tokenizer", "../tokenizer.json"), "tokenizer"),
        (_set("chat", "prefix", "no picture"), "image token"),
        (_set("chat", "suffix", "<image>"), "image token"),
        (_set("image", "std", [1, 1, 0]), "std"),
        (_set("image", "resample", "magic"), "resample"),
        (_set("graphs", "vision/head.onnx", "inputs", 0, "dtype", "float16"), "dtype"),
        (_set("graphs", "vision/head.onnx", "flops", -1), "flops"),
        (_set("text", "num_layers", 0), "num_layers"),
        (_set("parity", float("inf")), "parity"),
        (_set("suite", {"path": "suite"}), "digest"),
    ],
)
def test_a_wrong_manifest_is_a_bundle_error(handmade, change, shown):
    obj = copy.deepcopy(Bundle.open(handmade).manifest.to_dict())
    change(obj)
    with pytest.raises(BundleError) as caught:
        Manifest.from_dict(obj)
    assert shown in str(caught.value)


def test_writes_are_atomic(tmp_path, monkeypatch):
    target = tmp_path / "certificate.json"
    write_atomically(target, b"first")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(target, b"second")
    assert target.read_bytes() == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["certificate.json"]


def test_certificate_of_other_bytes_is_refused(handmade, copy_of, tmp_path):
    other = make_bundle(tmp_path / "other", seed=7)
    root = copy_of(handmade)
    (root / CERTIFICATE).write_bytes((other.root / CERTIFICATE).read_bytes())
    with pytest.raises(CertificateMismatchError, match="another manifest"):
        Session.open(root)
    with pytest.raises(CertificateMismatchError):
        write_certificate(Bundle.open(root), make_certificate(other, (1,)))
    assert Session.open(root, allow_uncertified=True).certified == ()


def test_certificate_with_another_suite_or_unknown_exits_is_refused(handmade, copy_of):
    root = copy_of(handmade)
    obj = unseal((root / CERTIFICATE).read_bytes(), CERTIFICATE)
    (root / CERTIFICATE).write_bytes(seal({**obj, "suite_digest": "0" * 64}))
    with pytest.raises(CertificateMismatchError, match="another suite"):
        Session.open(root)
    deeper = [{**obj["exits"][0], "exit": "4"}]
    (root / CERTIFICATE).write_bytes(seal({**obj, "exits": deeper}))
    with pytest.raises(CertificateMismatchError, match="exits 4 that"):
        Session.open(root)


@pytest.mark.parametrize(
    "change",
    [
        _set("exits", 0, "verdict", "fine"),
        _set("exits", 0, "harmful", "k", 300),
        _set("exits", 0, "harmful", "rate", "0"),
        _set("exits", 0, "reasons", "none"),
        lambda o: o.pop("judge"),
        _set("extra", 1),
    ],
)
def test_a_wrong_certificate_is_a_certificate_error(handmade, change):
    bundle = Bundle.open(handmade)
    obj = copy.deepcopy(make_certificate(bundle, (1,)).to_dict())
    change(obj)
    with pytest.raises(CertificateError):
        Certificate.from_dict(obj)


def test_certificate_reads_back_and_only_passed_exits_count(handmade):
    bundle = Bundle.open(handmade)
    certificate = read_certificate(bundle)
    assert certificate == make_certificate(bundle, (1, 2))
    assert certified_exits(certificate) == (Exit(1), Exit(2))
    assert certified_exits(None) == ()
    shown = certificate.to_dict()["exits"][0]
    assert set(shown) == {
        "exit",
        "verdict",
        "reasons",
        "harmful",
        "overrefusal",
        "incoherent",
        "accuracy",
        "families",
        "kinds",
        "checks",
    }
    assert set(shown["harmful"]) == {"k", "n", "rate", "lower_95", "upper_95"}


def test_image_spec_from_a_processor_config():
    base = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3], "resample": 3}
    clip = ImageSpec.from_hf({**base, "size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 36}})
    assert (clip.height, clip.width, clip.resize, clip.resize_to, clip.center_crop) == (32, 36, "shortest_edge", (40, 40), True)
    siglip = ImageSpec.from_hf({**base, "size": {"height": 20, "width": 30}, "do_normalize": False, "do_rescale": False})
    assert (siglip.height, siglip.width, siglip.resize, siglip.center_crop) == (20, 30, "exact", False)
    assert (siglip.mean, siglip.std, siglip.rescale_factor) == ((0, 0, 0), (1, 1, 1), 1)
    for free in ({"size": {"shortest_edge": 40}, "do_center_crop": False}, {"size": {"height": 4, "width": 4}, "do_pad": True}):
        with pytest.raises(UnsupportedModelError):
            ImageSpec.from_hf({**base, **free})


@pytest.mark.parametrize(
    "name", ["README.md", "README.md.sh", ".gitattributes", ".gitattributes.onnx", ".cache/x", "a/README.md"]
)
def test_what_the_hub_adds_is_refused_beside_a_bundle_that_never_was_there(handmade, tmp_path, name):
    root = tmp_path / "b"
    shutil.copytree(handmade, root)
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_text("All exits are certified.")
    with pytest.raises(IntegrityError, match="not in the manifest") as refused:
        Bundle.open(root)
    assert str(root / name) in str(refused.value)
    (root / ".cache/huggingface").mkdir(parents=True)  # as `hf download --local-dir` leaves it
    if name in ("README.md", ".gitattributes"):
        Bundle.open(root)
    else:
        with pytest.raises(IntegrityError, match="not in the manifest"):
            Bundle.open(root)


@pytest.mark.parametrize("repo", ["models--org--name", "a cache"])
def test_a_snapshot_in_the_hub_s_cache_is_a_bundle_and_links_elsewhere_are_not(handmade, tmp_path, repo):
    snapshot, blobs = tmp_path / repo / "snapshots" / ("c0ffee" + "0" * 34), tmp_path / repo / "blobs"
    blobs.mkdir(parents=True)
    shutil.copytree(handmade, snapshot)
    (snapshot / ".gitattributes").write_text("*.onnx filter=lfs")  # every repository has one
    for i, name in enumerate(all_files(snapshot)):
        (snapshot / name).rename(blobs / f"{i:040d}")
        (snapshot / name).symlink_to(os.path.relpath(blobs / f"{i:040d}", (snapshot / name).parent))
    if repo == "a cache":
        with pytest.raises(IntegrityError, match="plain files"):
            Bundle.open(snapshot)
        return
    assert Bundle.open(snapshot).digest == Bundle.open(handmade).digest
    assert Bundle.open(snapshot).source == f"hub:org/name@{snapshot.name}"
