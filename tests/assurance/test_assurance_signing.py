"""The tamper table: each way to pass off another bundle as the signed one is refused, and the error names the file.

That a signature holds is not the product's word alone: `model_signing`'s command line verifies ours, and ours one that it made.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from signed_bundles import PASSWORD, add_record, write_key

import mutations
from edgesafe import cli, sign, verify
from edgesafe.errors import (
    BundleError,
    CertificateError,
    CertificateMismatchError,
    ConfigError,
    InputError,
    IntegrityError,
    SignatureError,
)
from edgesafe.format.bundle import CERTIFICATE, LATENCY, MANIFEST, SEALED, Bundle, is_bundle
from edgesafe.format.exits import Exit
from edgesafe.format.seal import seal, unseal
from edgesafe.runtime import Session
from handmade import make_bundle

SIGNATURES = [f"{name}.sig" for name in SEALED]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x20
    path.write_bytes(bytes(data))


def files(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


@pytest.fixture(scope="session")
def other(keys, tmp_path_factory) -> Path:
    """Another bundle that the same people signed."""
    bundle = make_bundle(tmp_path_factory.mktemp("other") / "bundle", seed=7)
    add_record(bundle)
    sign(bundle.root, keys / "ours.pem")
    return bundle.root


def test_the_signed_bundle_is_as_its_makers_left_it(signed, keys):
    verified = verify(signed, keys / "ours.pub")
    assert verified.signed == SEALED and verified.certified == (Exit(1), Exit(2))
    assert verified.digest == Bundle.open(signed).digest and verified.files == len(files(signed)) - 6
    assert not any("who made" in what for what in verified.not_checked)
    with Session.open(signed) as session:  # a signed bundle answers as before
        assert session.certified == (Exit(1), Exit(2))


def test_without_a_key_nobody_vouches_and_that_is_said(signed, handmade):
    verified = verify(signed)
    assert verified.signed == () and "manifest.json.sig, certificate.json.sig, latency.json.sig were not read" in str(verified)
    assert "who made the bundle and its certificate" in verified.not_checked[0]
    assert "nothing here is signed" in verify(handmade).not_checked[0]


@pytest.mark.parametrize("where", [0, 0.5, 1])
def test_a_flipped_byte_in_any_file(signed, change, keys, where):
    root = change()
    for name in files(signed):
        flip(root / name, round(where * ((root / name).stat().st_size - 1)))
        with pytest.raises(IntegrityError if name not in SIGNATURES else SignatureError) as caught:
            verify(root, keys / "ours.pub")
        assert Path(name).name in str(caught.value)
        shutil.copyfile(signed / name, root / name)
    assert verify(root, keys / "ours.pub").signed == SEALED


def test_a_file_removed(signed, change, keys):
    root = change()
    for name in files(signed):
        (root / name).unlink()
        with pytest.raises(BundleError) as caught:
            verify(root, keys / "ours.pub")
        assert name in str(caught.value) and caught.value.exit_code in (40, 43, 44)
        shutil.copyfile(signed / name, root / name)


def test_the_certificate_removed_with_its_signature(change, keys):
    root = change()
    (root / CERTIFICATE).unlink()
    with pytest.raises(SignatureError, match=r"certificate\.json is missing"):
        verify(root)
    (root / f"{CERTIFICATE}.sig").unlink()
    with pytest.raises(SignatureError, match=r"certificate\.json is missing"):
        verify(root, keys / "ours.pub")


@pytest.mark.parametrize(
    "name", ["x.onnx", "vision/x.sig", "manifest.sig", "tokenizer.json.sig", "manifest.json.partial", ".x"]
)
def test_a_file_added(change, keys, name):
    root = change()
    (root / name).write_bytes(b"{}")
    for key in (None, keys / "ours.pub"):
        with pytest.raises(IntegrityError) as caught:
            verify(root, key)
        assert name in str(caught.value)


def test_a_record_added_by_somebody_else(handmade, copy_of, keys):
    root = copy_of(handmade)
    sign(root, keys / "ours.pem")
    add_record(Bundle.open(root))
    with pytest.raises(SignatureError, match=r"latency\.json has no signature"):
        verify(root, keys / "ours.pub")
    sign(root, keys / "ours.pem")
    assert verify(root, keys / "ours.pub").signed == SEALED


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("vision/blocks_00-01.onnx", "vision/head.onnx"),
        ("tokenizer.json", "suite/suite.json"),
        (CERTIFICATE, LATENCY),
        (MANIFEST, CERTIFICATE),
        ("manifest.json.sig", "certificate.json.sig"),
        (MANIFEST, "manifest.json.sig"),
    ],
)
def test_two_files_swapped(change, keys, one, two):
    root = change()
    first = (root / one).read_bytes()
    (root / one).write_bytes((root / two).read_bytes())
    (root / two).write_bytes(first)
    with pytest.raises((BundleError, CertificateError)) as caught:
        verify(root, keys / "ours.pub")
    assert one in str(caught.value) or two in str(caught.value)


@pytest.mark.parametrize("resigned", [False, True])
def test_the_bundle_resealed_by_somebody_else(change, keys, resigned):
    root = change()
    (root / "tokenizer.json").write_bytes(b"{}")
    (root / LATENCY).unlink()
    (root / f"{LATENCY}.sig").unlink()
    mutations.reseal(root, forge=True)
    assert verify(root).certified == (Exit(1), Exit(2))  # nothing but a key tells it from the real one
    if resigned:
        sign(root, keys / "theirs.pem")
        assert verify(root, keys / "theirs.pub").signed == (MANIFEST, CERTIFICATE)
    with pytest.raises(SignatureError, match=r"manifest\.json"):
        verify(root, keys / "ours.pub")


@pytest.mark.parametrize("name", [CERTIFICATE, LATENCY])
def test_a_sealed_file_made_anew(change, keys, name):
    """A better verdict, or other times, for the very same bytes."""
    root = change()
    (root / name).write_bytes(seal({**unseal((root / name).read_bytes(), name), "environment": {"machine": "better"}}))
    with pytest.raises(SignatureError, match=name):
        verify(root, keys / "ours.pub")


@pytest.mark.parametrize("signature_too", [False, True])
@pytest.mark.parametrize(("name", "error"), [(CERTIFICATE, CertificateMismatchError), (LATENCY, IntegrityError)])
def test_a_sealed_file_of_another_bundle(change, other, keys, name, error, signature_too):
    root = change()
    for one in (name, f"{name}.sig") if signature_too else (name,):
        shutil.copyfile(other / one, root / one)
    for key in (None, keys / "ours.pub"):
        with pytest.raises(error, match="of another") as caught:
            verify(root, key)
        assert str(root / name) in str(caught.value)


def test_the_suite_of_the_certificate_is_not_the_one_inside(handmade, copy_of):
    root = copy_of(handmade)
    (root / "suite" / "suite.json").write_bytes(seal({"name": "easier", "rows": 0}))
    mutations.reseal(root, forge=True)
    with pytest.raises(IntegrityError, match=r"suite\.json"):
        verify(root)


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_signature_of_another_key(change, keys, tmp_path, name):
    root, theirs = change(), tmp_path / "theirs"
    shutil.copytree(root, theirs)
    sign(theirs, keys / "theirs.pem")
    shutil.copyfile(theirs / name, root / name)
    with pytest.raises(SignatureError) as caught:
        verify(root, keys / "ours.pub")
    assert f"{name} is no signature of" in str(caught.value) and "Key mismatch" in str(caught.value)
    # The note of whose key it was is the signature's own word, so it is not what decides.
    obj, mine = (
        json.loads((root / name).read_text()),
        json.loads((root / SIGNATURES[(SIGNATURES.index(name) + 1) % 3]).read_text()),
    )
    (root / name).write_text(json.dumps({**obj, "verificationMaterial": mine["verificationMaterial"]}))
    with pytest.raises(SignatureError, match="is no signature of"):
        verify(root, keys / "ours.pub")


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"verificationMaterial": {}}', "[" * 100_000, "\0", '{"a": NaN}'])
def test_a_signature_of_nonsense(change, keys, text, capsys):
    root = change()
    (root / "manifest.json.sig").write_text(text)
    with pytest.raises(SignatureError, match=r"manifest\.json\.sig is no signature"):
        verify(root, keys / "ours.pub")
    assert capsys.readouterr().out == ""


def test_an_old_signature_without_the_key_s_note_does_not_print_into_the_answer(change, keys, capsys):
    root = change()
    obj = json.loads((root / "manifest.json.sig").read_text())
    obj["verificationMaterial"]["publicKey"] = {"hint": ""}
    (root / "manifest.json.sig").write_text(json.dumps(obj))
    assert cli.main(["verify", str(root), "--public-key", str(keys / "ours.pub"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["signed"] == list(SEALED)


def test_forged_bundles_by_the_dozen(signed, keys, tmp_path):
    """The forgeries of `make fuzz`: those that pass as other content are refused with a key."""
    passed = 0
    for number in range(60):
        rng, root = random.Random(f"signed {number}"), tmp_path / "forged"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(signed, root)
        _, mutate = rng.choice(mutations.RESEALED)
        mutate(root, rng)
        for record in (LATENCY, f"{LATENCY}.sig"):
            (root / record).unlink(missing_ok=True)
        mutations.reseal(root, forge=True)
        if (root / MANIFEST).read_bytes() == (signed / MANIFEST).read_bytes():
            continue
        try:
            verify(root)
        except (BundleError, CertificateError):
            continue
        passed += 1
        with pytest.raises(SignatureError, match=r"manifest\.json"):
            verify(root, keys / "ours.pub")
    assert passed >= 6, "the forgeries were too crude to need a key"


@pytest.mark.parametrize("key", ["ours", "theirs"])
def test_the_package_s_own_command_line_agrees(change, keys, tmp_path, key):
    root, tool = change(), [sys.executable, "-m", "model_signing"]
    words = ["--signature", str(root / "manifest.json.sig"), "--public_key", str(keys / f"{key}.pub")]
    done = subprocess.run([*tool, "verify", "key", str(root / MANIFEST), *words], capture_output=True, check=False)
    assert (done.returncode == 0) == (key == "ours"), done.stderr
    words = ["--signature", str(root / "certificate.json.sig"), "--private_key", str(keys / f"{key}.pem")]
    subprocess.run([*tool, "sign", "key", str(root / CERTIFICATE), *words], capture_output=True, check=True)
    if key == "ours":
        assert verify(root, keys / "ours.pub").signed == SEALED
    else:
        with pytest.raises(SignatureError, match=r"certificate\.json\.sig"):
            verify(root, keys / "ours.pub")


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP521R1()])
def test_the_other_curves(change, tmp_path, curve):
    root, key = change(), write_key(tmp_path, "long", ec.generate_private_key(curve))
    sign(root, f"{key}.pem")
    assert verify(root, f"{key}.pub").signed == SEALED


def test_a_key_with_a_password(change, keys, tmp_path, capsys):
    root = change()
    (tmp_path / "right").write_text(f"{PASSWORD}\nsecond line\n", encoding="utf-8")
    (tmp_path / "wrong").write_text("x")
    (tmp_path / "latin").write_bytes(PASSWORD.encode("latin-1"))
    words = ["sign", str(root), "--key", str(keys / "locked.pem")]
    for more in ([], ["--password-file", str(tmp_path / "wrong")]):
        assert cli.main([*words, *more]) == ConfigError.exit_code
        assert "--password-file FILE" in capsys.readouterr().err
    assert cli.main([*words, "--password-file", str(tmp_path / "latin")]) == ConfigError.exit_code
    assert cli.main([*words, "--password-file", str(tmp_path / "right")]) == 0
    assert verify(root, keys / "locked.pub").signed == SEALED


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: write_key(folder, "key", rsa.generate_private_key(65537, 2048)),
        lambda folder: write_key(folder, "key", ed25519.Ed25519PrivateKey.generate()),
        lambda folder: write_key(folder, "key", ec.generate_private_key(ec.SECP256K1())),
        lambda folder: [(folder / f"key.{end}").write_text("not a key") for end in ("pem", "pub")],
        lambda folder: [(folder / f"key.{end}").mkdir() for end in ("pem", "pub")],
        lambda folder: None,
    ],
)
def test_a_wrong_key_is_refused_before_anything_is_written(handmade, copy_of, tmp_path, make):
    root = copy_of(handmade)
    before = files(root)
    make(tmp_path)
    for call in (lambda: sign(root, tmp_path / "key.pem"), lambda: verify(root, tmp_path / "key.pub")):
        with pytest.raises(ConfigError, match=r"P-256, P-384 or P-521.*") as caught:
            call()
        assert str(tmp_path / "key.p") in str(caught.value) and "attribute" not in str(caught.value)
    assert files(root) == before


def test_public_and_private_mixed_up(signed, keys):
    with pytest.raises(ConfigError, match="a public key"):
        verify(signed, keys / "ours.pem")


def test_what_does_not_verify_is_not_signed(handmade, copy_of, other, keys):
    root = copy_of(handmade)
    flip(root / "vision" / "head.onnx", 40)
    with pytest.raises(IntegrityError, match=r"head\.onnx"):
        sign(root, keys / "ours.pem")
    flip(root / "vision" / "head.onnx", 40)
    shutil.copyfile(other / CERTIFICATE, root / CERTIFICATE)
    with pytest.raises(CertificateMismatchError):
        sign(root, keys / "ours.pem")
    (root / CERTIFICATE).unlink()
    with pytest.raises(CertificateError, match="edgesafe certify"):
        sign(root, keys / "ours.pem")
    assert not set(SIGNATURES) & set(files(root))


def test_a_bundle_that_cannot_be_written(signed, handmade, copy_of, keys, read_only):
    with pytest.raises(InputError, match="sign a copy that can be written"):
        sign(read_only(copy_of(handmade)), keys / "ours.pem")


def test_signatures_go_where_the_bundle_goes_and_do_not_lock_its_place(change, keys, tmp_path):
    root = change()
    subprocess.run(["cp", "-r", str(root), str(tmp_path / "device")], check=True)
    assert verify(tmp_path / "device", keys / "ours.pub").signed == SEALED
    assert is_bundle(root)  # so a new export may replace it
    os.replace(root / "manifest.json.sig", root / "manifest.json.sig.partial")
    assert Bundle.open(root) and is_bundle(root)


def test_the_command_says_what_was_checked_and_what_was_not(signed, keys, capsys):
    assert cli.main(["verify", str(signed), "--public-key", str(keys / "ours.pub")]) == 0
    out = capsys.readouterr().out
    assert "certified exits: 1, 2" in out and "signed with this key: manifest.json, certificate.json, latency.json" in out
    assert cli.main(["verify", str(signed), "--public-key", str(keys / "theirs.pub")]) == 44
    assert "manifest.json.sig" in capsys.readouterr().err
    assert cli.main(["verify", str(signed), "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert list(got) == ["digest", "files", "certified", "statement", "signed", "not_checked", "source"]
    assert got["certified"] == ["1", "2"]


def test_without_the_extra_only_a_key_needs_it(signed, keys, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "model_signing", None)
    assert verify(signed).files
    monkeypatch.delitem(sys.modules, "model_signing")

    def missing(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'model_signing'", name="model_signing")

    monkeypatch.setattr("edgesafe.assurance.signing.load_verifier", missing)
    assert cli.main(["verify", str(signed), "--public-key", str(keys / "ours.pub")]) == ConfigError.exit_code
    assert "pip install 'edgesafe[sign]'" in capsys.readouterr().err
