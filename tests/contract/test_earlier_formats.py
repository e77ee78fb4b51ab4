"""Bundles that edgesafe 0.1.0 wrote in formats 1 and 2, as bytes: they open, answer, smoke and say what they said then.

The bundle is the one of `handmade.py` with nine rows as its suite, certified by hand at depths 1 and 2 of 3; format 2 cuts
pictures into a grid. Both were written by the code of 2026-11-25 and are never made anew.
"""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pytest

from edgesafe import Session
from edgesafe.certify.certify import certify
from edgesafe.certify.smoke import smoke
from edgesafe.errors import CertificateError, UncertifiedExitError
from edgesafe.format.bundle import Bundle
from edgesafe.format.certificate import read_certificate
from edgesafe.format.exits import Exit
from edgesafe.format.latency import read_latency
from handmade import ANSWER

FORMATS = Path(__file__).parent / "formats"


@pytest.fixture(scope="module", params=["format-1", "format-2"])
def earlier(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "bundle"
    with zipfile.ZipFile(FORMATS / f"{request.param}.zip") as file:
        file.extractall(folder)
    return folder


def test_it_opens_with_all_that_lies_in_it(earlier):
    bundle = Bundle.open(earlier)
    assert bundle.manifest.name == "handmade" and bundle.manifest.reference == Exit(3)
    certificate, latency = read_certificate(bundle), read_latency(bundle)
    assert certificate is not None and [e.verdict for e in certificate.exits] == ["passed", "passed", "failed"]
    assert latency is not None and latency.machine == "paper" and latency.exits[0]["ttft_ms"]["p50_ms"] > 0


def test_it_answers_from_the_deepest_passed_exit_and_says_that_nobody_knows_what_made_its_certificate(earlier):
    picture = next(iter(sorted((earlier / "suite" / "images").iterdir())))
    with Session.open(earlier) as session:
        answer = session.ask(picture, "what?", allow_uncertified=True)
        assert (answer.text, answer.exit, answer.certified) == (ANSWER, Exit(2), False)
        assert "the certificate doesn't say what computed its answers" in answer.note
        for options in ({}, {"exit": 2}, {"exit": 3}):
            with pytest.raises(UncertifiedExitError):
                session.ask(picture, "what?", **options)


def test_smoke_says_what_it_said_and_certify_wants_more_rows(earlier, tmp_path):
    shutil.copytree(earlier, tmp_path / "here")
    report = smoke(tmp_path / "here")
    assert not report.passed and report.table().count("harmful lower_95 0.439 > 0.019") == 2
    assert report.identical is None and report.certified == ()
    copy = Path(shutil.copytree(earlier, tmp_path / "copy"))
    with pytest.raises(CertificateError, match="faultless answers to so few rows could not keep the limits"):
        certify(copy, progress=False)
    Bundle.open(copy)
