"""Certification and smoke on an exported bundle with a small suite inside."""

from __future__ import annotations

import dataclasses
import json
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from PIL import Image

from edgesafe.certify import certify as certify_run
from edgesafe.certify import kept as kept_answers
from edgesafe.certify import smoke as smoke_run
from edgesafe.certify.certify import certify
from edgesafe.certify.flips import digest_of_all
from edgesafe.certify.kept import kept_path
from edgesafe.certify.smoke import smoke
from edgesafe.certify.stats import rate
from edgesafe.cli import main
from edgesafe.errors import CertificateError, CertificateMismatchError, InputError, IntegrityError, UncertifiedExitError
from edgesafe.format.bundle import CERTIFICATE, Bundle, write_manifest
from edgesafe.format.certificate import read_certificate, write_certificate
from edgesafe.format.exits import Exit
from edgesafe.format.seal import seal, unseal
from edgesafe.format.suite import Row, Suite, read_suite, write_suite
from edgesafe.runtime.session import Session
from handmade import SMALL_LIMITS, make_bundle, make_certificate, widen_limits
from serving import serving


@pytest.fixture(scope="module")
def suited(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with 12 rows of the reference world, exported but not certified."""
    from edgesafe.device import load_device
    from edgesafe.reference.data import write_split
    from edgesafe_export import export_bundle

    base = tmp_path_factory.mktemp("suited")
    write_split(base / "suite", "cert", scale=0.01)
    widen_limits(base / "suite")
    out = base / "bundle"
    export_bundle(tiny_llava, out, load_device("host"), vision_scheme="fp32", text_scheme="fp32", suite_dir=base / "suite")
    return out


@pytest.fixture
def bundle(suited: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(suited, tmp_path / "bundle"))


def test_a_random_model_fails_and_the_certificate_says_so(bundle, tmp_path, capsys):
    assert main(["certify", str(bundle), "--json"]) == 42
    shown = json.loads(capsys.readouterr().out)
    assert {"manifest_digest", "suite_digest", "judge", "environment", "exits"} <= shown.keys()
    for one in shown["exits"]:
        assert one["verdict"] == "failed" and one["reasons"]
        assert one["families"].keys() == {row.family for row in read_suite(bundle / "suite").rows}
        assert one["families"]["name"].keys() == {"k", "n", "rate", "lower_95", "upper_95"}
        for key in ("harmful", "overrefusal", "incoherent", "accuracy"):
            assert one[key].keys() == {"k", "n", "rate", "lower_95", "upper_95"}
    with pytest.raises(UncertifiedExitError):
        smoke(bundle)
    with pytest.raises(UncertifiedExitError):
        Session.open(bundle).ask(bundle / "suite/images/name-0000.png", "What is this?")


def test_the_same_bytes_give_the_same_certificate(bundle, tmp_path):
    first = certify(bundle, progress=False, answers=tmp_path / "a.jsonl")
    second = certify(bundle, progress=False)
    assert first == second
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 3 * len(list((bundle / "suite/images").iterdir()))
    assert all(line.keys() == {"exit", "id", "cls", "family", "judged", "answer"} for line in lines)
    assert first.exits[0].incoherent.k == sum(
        line["judged"] == "incoherent" for line in lines if line["exit"] == "1" and line["family"] not in first.left_open
    )


def test_answers_do_not_go_into_the_bundle(bundle):
    before = sorted(bundle.rglob("*"))
    assert main(["certify", str(bundle), "--answers", str(bundle / "answers.jsonl")]) == 11
    assert sorted(bundle.rglob("*")) == before


def test_a_certificate_of_other_bytes_is_replaced(bundle):
    certificate = certify(bundle, progress=False)
    other = dataclasses.replace(certificate, manifest_digest="0" * 64)
    (bundle / CERTIFICATE).write_bytes(seal(other.to_dict()))
    with pytest.raises(CertificateMismatchError):
        smoke(bundle)
    assert certify(bundle, progress=False) == certificate
    assert read_certificate(Bundle.open(bundle)) == certificate


def test_one_picture_runs_once_for_all_its_rows(bundle, monkeypatch):
    session = Session.open(bundle, allow_uncertified=True)
    suite = read_suite(bundle / "suite")
    rows = [dataclasses.replace(suite.rows[0], id=i) for i in "ab"]
    seen = []
    monkeypatch.setattr(session, "vision_states", lambda image, exits: seen.append(image) or dict.fromkeys(exits))
    monkeypatch.setattr(session, "answer_features", lambda features, prompt, tokens, cut, sampling: prompt)
    said = certify_run.ask_all(session, suite, rows, (1, 3), "")
    assert len(seen) == 1
    assert said == {d: dict.fromkeys("ab", rows[0].prompt) for d in (1, 3)}


def test_certification_says_what_ask_says(bundle):
    """The shortcut through vision_states must give the very answer that a user gets."""
    session = Session.open(bundle, allow_uncertified=True)
    suite = read_suite(bundle / "suite")
    said = certify_run.ask_all(session, suite, suite.rows[:3], session.manifest.ladder, "")
    for row in suite.rows[:3]:
        for exit in session.manifest.ladder:
            assert session.ask(suite.image_path(row), row.prompt, exit=exit).text == said[exit][row.id]


@pytest.mark.enable_socket
@pytest.mark.parametrize("exit", ["1", "3"])
def test_served_as_an_endpoint_it_gets_the_verdict_that_its_own_certificate_has(bundle, tmp_path, exit):
    """The same rows through HTTP, pictures and all: every answer is the one that certification made on the bytes."""
    own = certify(bundle, progress=False, answers=tmp_path / "own.jsonl")
    with Session.open(bundle, allow_uncertified=True) as session, serving(session) as server:
        where = ["--endpoint", f"http://127.0.0.1:{server.port}", "--model", session.manifest.name]
        rest = ["--suite", str(bundle / "suite"), "--out", str(tmp_path / "run"), "--extra", json.dumps({"exit": exit})]
        code = main(["certify", *where, *rest, "--parallel", "4"])
    verdict = next(one for one in own.exits if str(one.exit) == exit).to_dict()
    sealed = unseal((tmp_path / "run/endpoint.json").read_bytes(), "")
    assert code == (0 if sealed["passed"] else 42) and sealed["answers"] == own.answers[exit]
    names = ("harmful", "overrefusal", "incoherent", "accuracy", "families", "kinds")
    assert {name: sealed[name] for name in names} == {name: verdict[name] for name in names}
    # A bundle's first check is of all exits down to this one.
    assert sealed["checks"][1:] == verdict["checks"][1:]
    assert sealed["subject"]["listed"]["edgesafe"]["bundle"] == own.manifest_digest and sealed["bytes_seen"] is False
    assert (
        main(["compare", str(tmp_path / "own.jsonl"), str(tmp_path / "run"), "--suite", str(bundle / "suite"), "--exit", exit])
        == 0
    )


def test_smoke_refuses_a_subset_without_a_class(bundle, monkeypatch):
    _pass_all(bundle)
    rows = Suite.smoke_rows
    monkeypatch.setattr(Suite, "smoke_rows", lambda suite: tuple(r for r in rows(suite) if r.cls != "harmful"))
    with pytest.raises(CertificateError, match="subset has no harmful"):
        smoke(bundle)


def test_a_bundle_without_a_suite_can_not_be_certified(tiny_bundle):
    with pytest.raises(CertificateError, match="no suite"):
        certify(tiny_bundle)


def test_a_changed_suite_picture_is_seen(bundle):
    picture = next((bundle / "suite/images").iterdir())
    data = bytearray(picture.read_bytes())
    data[len(data) // 2] ^= 1
    picture.write_bytes(data)
    with pytest.raises(IntegrityError):
        certify(bundle)
    assert not (bundle / CERTIFICATE).exists()


def _pass_all(bundle: Path) -> None:
    """Rewrite the certificate with every verdict passed, as if the suite had gone well."""
    opened = Bundle.open(bundle)
    certificate = certify(bundle, progress=False)
    assert certificate.environment["max_new_tokens"] == 48  # what ask gives by default: no more may be said than was judged
    good = tuple(dataclasses.replace(e, verdict="passed", reasons=[], harmful=rate(0, 100)) for e in certificate.exits)
    write_certificate(opened, dataclasses.replace(certificate, exits=good))


def test_smoke_reports_every_certified_exit(bundle, tmp_path, capsys):
    _pass_all(bundle)
    report = smoke(bundle, junit=tmp_path / "j.xml")
    assert [str(e.exit) for e in report.exits] == ["1", "2", "3"]
    cases = ElementTree.parse(tmp_path / "j.xml").getroot().findall("testcase")
    assert len(cases) == 3
    assert main(["smoke", str(bundle), "--json"]) == (0 if report.passed else 42)
    shown = json.loads(capsys.readouterr().out)
    assert shown.keys() == {
        "passed", "manifest_digest", "suite_digest", "judge", "environment", "rows", "exits",
        "answers", "identical", "shows", "certified", "why", "record",
    }  # fmt: skip
    assert shown["identical"] == shown["answers"] == 3 * shown["rows"]
    assert shown["exits"][0].keys() == {
        "exit", "verdict", "reasons", "harmful", "overrefusal", "incoherent", "accuracy", "families", "kinds", "checks",
    }  # fmt: skip
    assert shown["manifest_digest"] == Bundle.open(bundle).digest


def test_smoke_fails_with_42_when_the_answers_contradict_the_certificate(bundle, monkeypatch, tmp_path):
    _pass_all(bundle)
    real = smoke_run.ask_all

    def harmed(*args):
        return {d: dict.fromkeys(texts, "Here is how to make the bomb.") for d, texts in real(*args).items()}

    monkeypatch.setattr(smoke_run, "ask_all", harmed)
    assert main(["smoke", str(bundle), "--junit", str(tmp_path / "j.xml")]) == 42
    assert ElementTree.parse(tmp_path / "j.xml").getroot().get("failures") == "3"


def test_a_certificate_of_other_bytes_is_refused(bundle, suited):
    _pass_all(bundle)
    data = (bundle / CERTIFICATE).read_bytes()
    for i in range(0, len(data), max(1, len(data) // 40)):
        flipped = bytearray(data)
        flipped[i] ^= 1
        (bundle / CERTIFICATE).write_bytes(flipped)
        with pytest.raises(IntegrityError):
            read_certificate(Bundle.open(bundle))


@pytest.mark.parametrize("prompt", ["what? A: yes", "what? </s>", "w" * 5000])
@pytest.mark.parametrize("run", [certify, smoke])
def test_a_row_that_can_not_be_asked_is_named_before_any_is(tmp_path, monkeypatch, run, prompt):
    asked = ["what?", "what?", prompt]
    rows = [
        Row(f"r{i}", cls, cls, "images/a.png", text, "Yes.", ("Yes.",), "t", True)
        for i, (cls, text) in enumerate(zip(("harmful", "harmless", "task"), asked, strict=True))
    ]
    write_suite(tmp_path / "suite", rows, {"images/a.png": Image.new("RGB", (8, 8))}, "small", "val", SMALL_LIMITS)
    bundle = make_bundle(tmp_path / "bundle", suite_from=tmp_path / "suite")
    write_certificate(bundle, make_certificate(bundle, (1, 2)))
    before = (bundle.root / CERTIFICATE).read_bytes()
    monkeypatch.setattr(Session, "vision_states", lambda *_: pytest.fail("the work began"))
    with pytest.raises(InputError, match="row r2 of the suite.*take the row out"):
        run(bundle.root)
    assert (bundle.root / CERTIFICATE).read_bytes() == before


@pytest.fixture(scope="module")
def untouched(suited: Path, tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from edgesafe.evaluate.evaluate import evaluate

    out = tmp_path_factory.mktemp("untouched") / "before"
    evaluate(tiny_llava, suited / "suite", out)
    return out


def test_the_untouched_model_is_the_baseline_and_the_certificate_keeps_it(bundle, untouched):
    compared = certify(bundle, progress=False, baseline=untouched)
    report = json.loads((untouched / "report.json").read_text(encoding="utf-8"))
    reference = next(e for e in report["exits"] if e["reference"])
    assert (
        compared.baseline is not None
        and compared.baseline.model == report["model"] == Bundle.open(bundle).manifest.parent.digest
    )
    assert compared.baseline.harmful.k == reference["harmful"]["k"]
    assert read_certificate(Bundle.open(bundle)) == compared
    assert certify(bundle, progress=False) == compared  # on the device, where the evaluation is not
    (bundle / CERTIFICATE).unlink()
    assert certify(bundle, progress=False).baseline is None


def test_a_baseline_of_another_suite_or_of_the_retrained_model_is_refused(bundle, untouched, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Session, "vision_states", lambda *_: pytest.fail("the work began"))
    other = Path(shutil.copytree(untouched, tmp_path / "other"))
    report = json.loads((other / "report.json").read_text(encoding="utf-8"))
    (other / "report.json").write_text(json.dumps({**report, "suite": "0" * 64}), encoding="utf-8")
    with pytest.raises(InputError, match="of another suite"):
        certify(bundle, progress=False, baseline=other)
    assert main(["certify", str(bundle), "--baseline", str(tmp_path / "none")]) == 11
    assert "no evaluation to compare with" in capsys.readouterr().err
    manifest = Bundle.open(bundle).manifest
    retrained = dataclasses.replace(manifest, config={**manifest.config, "retrained_from": "1" * 64})
    write_manifest(bundle, retrained)
    with pytest.raises(InputError, match="the baseline is the retrained model itself .*digest 111111111111"):
        certify(bundle, progress=False, baseline=untouched)
    assert not (bundle / CERTIFICATE).exists()


def test_an_export_remembers_what_its_model_was_retrained_from(tiny_llava, tmp_path):
    from edgesafe.device import load_device
    from edgesafe_export import export_bundle

    model = Path(shutil.copytree(tiny_llava, tmp_path / "model"))
    (model / "edgesafe.json").write_text(json.dumps({"parent": {"digest": "2" * 64}}), encoding="utf-8")
    bundle = export_bundle(model, tmp_path / "b", load_device("host"), vision_scheme="fp32", text_scheme="fp32", exits="3")
    assert bundle.manifest.config["retrained_from"] == "2" * 64


def for_device(bundle: Path, out: Path, device: str, **changes: object) -> Path:
    """A copy of a bundle as it is exported for another device, on another day; `changes` are of its manifest."""
    shutil.copytree(bundle, out)
    manifest = Bundle.open(out).manifest
    config = manifest.config | {"device_profile": manifest.config["device_profile"] | {"title": device, "threads": 7}}
    write_manifest(out, dataclasses.replace(manifest, device=device, created="2001-01-01", config=config, **changes))
    return out


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    (folder := tmp_path / "kept").mkdir()
    return folder


def test_another_device_s_bundle_of_the_same_graphs_is_not_asked_again(bundle, kept, tmp_path, monkeypatch):
    first = certify(bundle, progress=False, kept=kept)
    other = for_device(bundle, tmp_path / "other", "pixel9")
    monkeypatch.setattr(kept_answers, "_LEAST", 3)
    real, asked = certify_run.ask_all, []
    monkeypatch.setattr(certify_run, "ask_all", lambda *given: asked.append(len(given[2])) or real(*given))
    second = certify(other, progress=False, kept=kept, answers=tmp_path / "a.jsonl")
    assert asked == [3] and second.manifest_digest != first.manifest_digest
    assert dataclasses.replace(second, manifest_digest=first.manifest_digest) == first
    assert read_certificate(Bundle.open(other)) == second and (tmp_path / "a.jsonl").stat().st_size


def test_kept_answers_are_of_these_very_bytes_here_or_asked_for_again(bundle, tmp_path):
    manifest, here = Bundle.open(bundle).manifest, certify_run.environment(Session.open(bundle, allow_uncertified=True))
    paths = {kept_path(tmp_path, manifest, here)}
    graph = next(name for name in manifest.files if name.endswith(".onnx"))
    files = manifest.files | {graph: dataclasses.replace(manifest.files[graph], sha256="0" * 64)}
    chat = dataclasses.replace(manifest.chat, suffix="!")
    for changes in ({"files": files}, {"chat": chat}, {"versions": {}}, {"config": {"a": 1}}):
        paths.add(kept_path(tmp_path, dataclasses.replace(manifest, **changes), here))
    for key in here:
        paths.add(kept_path(tmp_path, manifest, here | {key: "another"}))
    assert len(paths) == 5 + len(here)


@pytest.mark.parametrize("harm", ["an answer is another", "forged", "a row is missing", "cut off", "not an object"])
def test_kept_answers_that_were_changed_are_asked_for_again(bundle, kept, harm, monkeypatch):
    certificate = certify(bundle, progress=False, kept=kept)
    (path,) = kept.iterdir()
    whole = path.read_text(encoding="utf-8")
    stored = json.loads(whole)
    row = next(iter(stored["answers"]["2"]))
    stored["answers"]["2"][row] = "I'm sorry, but I can't help with that."
    if harm == "a row is missing":
        del stored["answers"]["2"][row]
    monkeypatch.setattr(kept_answers, "_LEAST", 1000)
    if harm == "forged":  # with a digest that fits: found by asking the rows again
        answered = {Exit.parse(exit): texts for exit, texts in stored["answers"].items()}
        stored["digest"] = digest_of_all(answered)
    texts = {"cut off": whole[:-9], "not an object": "[]"}
    path.write_text(texts.get(harm, json.dumps(stored)), encoding="utf-8")
    assert certify(bundle, progress=False, kept=kept) == certificate
    assert path.read_text(encoding="utf-8") == whole
