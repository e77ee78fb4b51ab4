"""Sealed JSON: one form for each object, and no byte of it can change unseen."""

from __future__ import annotations

import hashlib

import pytest

from edgesafe.errors import IntegrityError
from edgesafe.format.files import digest_folder
from edgesafe.format.seal import seal, unseal

OBJECT = {"b": [1, 2.5, None, True], "a": "Zürich ✓", "c": {"z": 1e-7, "y": -3}}
# Written by hand from the rule in BUNDLE.md: keys sorted, one space an indent, a newline at the end.
BODY = """{
 "a": "Zürich ✓",
 "b": [
  1,
  2.5,
  null,
  true
 ],
 "c": {
  "y": -3,
  "z": 1e-07
 }
}
"""


def test_the_digest_is_the_sha256_of_the_body_as_written_by_hand():
    sealed = unseal(seal(OBJECT), "here")
    assert sealed["digest"] == hashlib.sha256(BODY.encode()).hexdigest()
    assert {k: v for k, v in sealed.items() if k != "digest"} == OBJECT


def test_sealing_again_is_the_same_and_key_order_does_not_matter():
    data = seal(OBJECT)
    assert seal(unseal(data, "here")) == data == seal(dict(reversed(OBJECT.items())))


def test_every_flipped_byte_is_refused():
    data = seal(OBJECT)
    for at in range(len(data)):
        for bit in (0, 5, 7):
            bad = data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]
            with pytest.raises(IntegrityError):
                unseal(bad, "here")


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data + b"\n",
        lambda data: data.replace(b"\n", b"\r\n"),
        lambda data: b"\xef\xbb\xbf" + data,
        lambda data: data.replace(b'"a"', b'"a": 1, "a"'),
        lambda data: b"[]\n",
        lambda data: b'{"digest": 3}\n',
        lambda data: b"\xff\xfe",
        lambda data: b"[" * 100_000,
        lambda data: b'{"a": NaN, "digest": "x"}\n',
        lambda data: b'{"a": "\\ud800", "digest": "x"}\n',
    ],
)
def test_other_spellings_and_garbage_are_refused(change):
    with pytest.raises(IntegrityError) as caught:
        unseal(change(seal(OBJECT)), "the file")
    assert "the file" in str(caught.value)


def test_what_json_cannot_say_cannot_be_sealed():
    with pytest.raises(ValueError, match="JSON"):
        seal({"a": float("nan")})


def test_digest_folder_sees_names_bytes_and_places(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "d" / "b").write_bytes(b"2")
    first = digest_folder(tmp_path)
    one, two = hashlib.sha256(b"1").hexdigest(), hashlib.sha256(b"2").hexdigest()
    assert first == hashlib.sha256(f"a\0{one}\nd/b\0{two}\n".encode()).hexdigest()
    (tmp_path / "a").rename(tmp_path / "c")
    assert digest_folder(tmp_path) != first
