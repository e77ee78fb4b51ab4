"""A certificate counts where the kernels run that made it, or where smoke has passed; and no longer where smoke has failed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgesafe import Session
from edgesafe.certify.smoke import smoke
from edgesafe.cli import main
from edgesafe.errors import CertificateError, CertificateMismatchError, DeviceError, UncertifiedExitError
from edgesafe.format.bundle import CERTIFICATE, Bundle
from edgesafe.format.certificate import read_certificate, write_certificate
from edgesafe.format.exits import Exit
from edgesafe.format.seal import seal
from edgesafe.runtime import OnnxRuntime, RunnableGraph, kernels, opened, smoke_record
from edgesafe.runtime.answer import describe
from edgesafe.runtime.standing import standing
from edgesafe.serve.page import facts
from mutants import wrong

BLACK = np.zeros((8, 8, 3), np.uint8)


class Same:
    """onnxruntime by its name, version and bytes; ``say`` changes the logits of the decoder."""

    name, providers = "onnxruntime", ("CPUExecutionProvider",)

    def __init__(self, say=lambda logits: logits, **told: str) -> None:
        self.say = say
        self.version = told.get("version", OnnxRuntime().version)
        self.build = told.get("build", OnnxRuntime().build)

    def open(self, path, spec, threads):
        graph = OnnxRuntime().open(path, spec, threads)

        def run(feeds):
            out = graph.run(feeds)
            return {name: self.say(array) if name == "logits" else array for name, array in out.items()}

        return RunnableGraph(spec, run, path)


def shifted(logits):
    """A kernel that is wrong: every token is the next one."""
    return np.roll(logits, 1, axis=-1)


def ask(root: Path, **options):
    with Session.open(root, **options) as session:
        return session.ask(BLACK, "what?")


def elsewhere(root: Path, **changes: str) -> None:
    """Rewrite the certificate as if it had been made with other kernels."""
    bundle = Bundle.open(root)
    certificate = read_certificate(bundle)
    write_certificate(bundle, replace(certificate, environment={**certificate.environment, **changes}))


def test_where_it_was_made_nothing_is_to_be_run_first(suited_copy):
    assert ask(suited_copy).certified and ask(suited_copy, engine=Same()).certified
    assert [path.name for path in suited_copy.parent.iterdir()] == ["bundle"]


OTHER = {
    "another version": (
        {"version": "1.99.0"},
        "onnxruntime 1.99.0 instead of onnxruntime 1.32.0".replace("1.32.0", OnnxRuntime().version),
    ),
    "patched kernels": ({"build": "f00d"}, f"build f00d instead of {OnnxRuntime().build}"),
    "another processor": ({}, "instruction sets aarch64 asimddp sme instead of"),
}


@pytest.fixture(params=OTHER)
def other(request, monkeypatch):
    """An engine or a processor that is not the certificate's, and how that is said."""
    told, said = OTHER[request.param]
    if not told:
        monkeypatch.setattr(kernels, "instruction_sets", lambda: "aarch64 asimddp sme")
    return Same(**told), said


def nothing_is_certified_until_smoke_has_passed(root: Path, engine, said: str) -> None:
    with Session.open(root, engine=engine) as session:
        assert said in session.standing.why and session.certified == ()
        assert not any(exit["certified"] for exit in facts(session)["exits"])
        for options in ({}, {"exit": 1}):
            with pytest.raises(
                UncertifiedExitError, match="made elsewhere and `edgesafe smoke` has not passed here"
            ) as refused:
                session.ask(BLACK, "what?", **options)
            assert said in str(refused.value) and refused.value.todo == f"run it: edgesafe smoke {root}"
        with pytest.raises(UncertifiedExitError, match="exit 3 has no passed verdict"):
            session.ask(BLACK, "what?", exit=3)
    answer = ask(root, engine=engine, allow_uncertified=True)
    assert not answer.certified and answer.exit == Exit(2) and "NOT CERTIFIED" in describe(answer) and said in answer.note
    report = smoke(root, engine=engine)
    assert report.passed and report.identical == report.answers == 12 and report.certified == ("1", "2")
    answer = ask(root, engine=engine)
    assert answer.certified and not answer.note.startswith("exit")


def test_elsewhere_nothing_is_certified_until_smoke_has_passed(suited_copy, other):
    engine, said = other
    nothing_is_certified_until_smoke_has_passed(suited_copy, engine, said)
    # What passed there says nothing of a third one, nor of another copy of the bundle at another place.
    with pytest.raises(UncertifiedExitError, match=r"0\.1 instead of"):
        ask(suited_copy, engine=Same(version="0.1"))
    copy = Path(shutil.copytree(suited_copy, suited_copy.parent / "copy"))
    with pytest.raises(UncertifiedExitError):
        ask(copy, engine=engine)


@pytest.mark.parametrize(
    "edit",
    [("made == here", "made is not None"), ("made == here", "True"), ("Ran(bundle.digest, certificate.digest, here)", "ANY")],
)
def test_that_check_fails_where_they_are_not_compared(suited_copy, monkeypatch, edit):
    smoke(suited_copy)
    monkeypatch.setattr(opened, "standing", wrong(standing, edit, ANY=smoke_record.Ran("", "", kernels.kernels_here(Same()))))
    if edit[1] == "ANY":  # a record of whatever run would do
        monkeypatch.setattr(smoke_record, "_read", lambda path, ran: next(iter(json_records(suited_copy)), None))
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        nothing_is_certified_until_smoke_has_passed(suited_copy, Same(version="1.99.0"), "1.99.0")


def json_records(root: Path):
    for path in root.with_name(f"{root.name}.smoke").glob("*.json"):
        obj = json.loads(path.read_text(encoding="utf-8"))
        obj.pop("digest")
        yield smoke_record.SmokeRecord.from_dict(obj, where=str(path))


def wrong_kernels_are_found_and_take_the_certificate_away(root: Path) -> None:
    assert ask(root, engine=Same(shifted)).certified  # nobody has looked yet
    report = smoke(root, engine=Same(shifted))
    assert not report.passed and (report.identical, report.answers, report.certified) == (0, 12, ())
    assert "identical answers on 0 of 12" in report.text()
    assert "6 of 6 answers are not the certified ones" in " ".join(report.exits[0].reasons)
    for engine in (Same(shifted), None):
        with pytest.raises(UncertifiedExitError, match="`edgesafe smoke` failed here: exit 1: .* answers"):
            ask(root, engine=engine)
    assert not ask(root, allow_uncertified=True).certified
    assert smoke(root).passed and ask(root).certified


def test_wrong_kernels_are_found_and_take_the_certificate_away(suited_copy):
    wrong_kernels_are_found_and_take_the_certificate_away(suited_copy)


def test_that_check_fails_where_a_failure_does_not_count(suited_copy, monkeypatch):
    monkeypatch.setattr(opened, "standing", wrong(standing, ("    if failed:", "    if failed and made != here:")))
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        wrong_kernels_are_found_and_take_the_certificate_away(suited_copy)


def test_smoke_ends_with_42_and_says_how_many_answers_changed(suited_copy, tmp_path, monkeypatch, capsys):
    (tmp_path / "wrong_here.py").write_text("from test_runtime_standing import Same, shifted\nENGINE = Same(shifted)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    assert main(["smoke", str(suited_copy)]) == 0
    shown = capsys.readouterr().out
    assert "identical answers on 12 of 12 (6 rows)" in shown and "certified on this machine: 1, 2\n" in shown
    assert "they can't show what is rarer; every harmful row of the suite was asked here" in shown
    assert main(["smoke", str(suited_copy), "--engine", "wrong_here:ENGINE", "--json"]) == 42
    told = json.loads(capsys.readouterr().out)
    assert (told["identical"], told["certified"]) == (0, []) and Path(told["record"]).is_file()
    (tmp_path / "a.png").write_bytes(next((suited_copy / "suite/images").iterdir()).read_bytes())
    assert main(["ask", str(suited_copy), "--image", str(tmp_path / "a.png"), "--prompt", "what?"]) == 51
    assert f"edgesafe smoke {suited_copy}" in capsys.readouterr().err


@pytest.mark.parametrize("changed", [None, "bundle"])
def test_a_failure_goes_with_its_certificate(suited_copy, changed):
    """A new certificate, of answers that were all made here, owes nothing to what contradicted the earlier one."""
    smoke(suited_copy, engine=Same(shifted))
    if changed is None:
        with pytest.raises(UncertifiedExitError, match="failed here"):
            ask(suited_copy)
    else:
        elsewhere(suited_copy, python="another")
        assert ask(suited_copy).certified


def test_a_read_only_bundle_has_its_record_among_the_user_s_state(suited_copy, read_only, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    engine = Same(version="1.99.0")
    sealed = read_only(suited_copy)
    report = smoke(sealed, engine=engine)
    assert Path(report.record).parent == tmp_path / "state/edgesafe/smoke" and ask(sealed, engine=engine).certified
    assert not sealed.with_name("bundle.smoke").exists()
    with pytest.raises(UncertifiedExitError):
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other"))
        ask(sealed, engine=engine)


def test_without_a_place_for_the_record_no_work_is_begun(suited_copy, read_only, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(read_only(tmp_path / "state")))
    monkeypatch.setattr(Session, "vision_states", lambda *_: pytest.fail("the work began"))
    with pytest.raises(DeviceError, match="neither beside the bundle nor among the user's state.*XDG_STATE_HOME=FOLDER"):
        smoke(read_only(suited_copy))


def test_a_failure_in_either_place_counts_and_a_success_replaces_both(suited_copy, read_only, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with monkeypatch.context() as closed:
        real = smoke_record.check_writable
        closed.setattr(smoke_record, "check_writable", lambda path, **k: _refuse(path, suited_copy) or real(path, **k))
        assert Path(smoke(suited_copy, engine=Same(shifted)).record).is_relative_to(tmp_path / "state")
    with pytest.raises(UncertifiedExitError):
        ask(suited_copy)
    report = smoke(suited_copy)
    assert (
        Path(report.record).parent == suited_copy.with_name("bundle.smoke") and report.certified and ask(suited_copy).certified
    )
    assert not list((tmp_path / "state/edgesafe/smoke").iterdir())


def _refuse(path: Path, root: Path) -> None:
    if path.is_relative_to(root):
        raise DeviceError("closed")


DAMAGE = {
    "torn": lambda data: data[: len(data) // 2],
    "edited": lambda data: data.replace(b'"passed": false', b'"passed": true'),
    "resealed with a wrong key": lambda data: seal({**json.loads(data), "passsed": True}),
    "a failure that says passed": lambda data: seal({**json.loads(data), "passed": True}),
    "more identical than answers": lambda data: seal({**json.loads(data), "identical": 13}),
    "of a newer format": lambda data: seal({**json.loads(data), "format_version": 3}),
    "of another machine": lambda data: seal({**json.loads(data), "machine": "a Raspberry Pi"}),
    "of another bundle": lambda data: seal({**json.loads(data), "bundle": "0" * 64}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_record_that_can_not_be_trusted_certifies_nothing_and_is_named(suited_copy, damage):
    path = Path(smoke(suited_copy, engine=Same(shifted)).record)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(UncertifiedExitError, match="record of `edgesafe smoke` here can't be used") as refused:
        ask(suited_copy)
    assert str(path) in str(refused.value) and "edgesafe smoke" in refused.value.todo
    assert smoke(suited_copy).passed and ask(suited_copy).certified


def test_a_record_holds_the_conditions_and_one_of_the_first_format_counts(suited_copy):
    path = Path(smoke(suited_copy, engine=Same(version="2")).record)
    record = json.loads(path.read_bytes())
    assert record["format_version"] == 2 and set(record["conditions"]) == {"governor", "temperature_c", "slowed"}
    path.write_bytes(seal({key: value for key, value in record.items() if key != "conditions"} | {"format_version": 1}))
    assert ask(suited_copy, engine=Same(version="2")).certified


def test_a_record_that_is_no_file_certifies_nothing(suited_copy):
    path = Path(smoke(suited_copy, engine=Same(version="2")).record)
    kept = path.rename(path.with_suffix(".kept"))
    path.symlink_to(kept)
    with pytest.raises(UncertifiedExitError, match="plain files only"):
        ask(suited_copy, engine=Same(version="2"))


def test_an_earlier_certificate_says_nothing_of_kernels_and_smoke_counts_without_comparing(suited_copy):
    path = suited_copy / CERTIFICATE
    obj = json.loads(path.read_text(encoding="utf-8"))
    for key in ("answers", "answers_digest", "scope"):
        obj.pop(key)
    obj |= {"format_version": 3, "environment": {"engine": "onnxruntime", "engine_version": OnnxRuntime().version}}
    path.write_bytes(seal(obj))
    with pytest.raises(UncertifiedExitError, match="the certificate doesn't say what computed its answers"):
        ask(suited_copy)
    report = smoke(suited_copy)
    assert report.passed and report.identical is None and "an earlier format" in report.text() and ask(suited_copy).certified


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        ({"1": "0" * 48, "2": "0" * 40, "3": "0" * 48}, "unequal numbers"),
        ({"1": "0" * 47}, "are not digests"),
        ({"1": "X" * 48}, "are not digests"),
        ({"9": "0" * 48}, "names exits 9"),
        ({"1": 5}, "1 is the int 5"),
    ],
)
def test_answers_that_are_none_are_refused(suited_copy, answers, error):
    path = suited_copy / CERTIFICATE
    path.write_bytes(seal({**json.loads(path.read_text(encoding="utf-8")), "answers": answers}))
    with pytest.raises((CertificateError, CertificateMismatchError), match=error):
        Session.open(suited_copy)


def test_answers_of_another_number_of_rows_are_refused_by_smoke(suited_copy):
    path = suited_copy / CERTIFICATE
    path.write_bytes(seal({**json.loads(path.read_text(encoding="utf-8")), "answers": dict.fromkeys("123", "0" * 40)}))
    with pytest.raises(CertificateError, match="has 5 answers of an exit.*one for each of the suite's 6 rows"):
        smoke(suited_copy)


def test_of_another_architecture_the_build_is_not_told_as_well():
    ours = kernels.kernels_here(Same())
    assert "build" not in ours.unlike(replace(ours, engine_build="a", instruction_sets="riscv64"))
    assert "build a instead of" in ours.unlike(replace(ours, engine_build="a", instruction_sets=f"{ours.instruction_sets} x"))
    assert ours.unlike(replace(ours, providers=("X",))) == "providers X instead of CPUExecutionProvider"


def test_kernels_in_a_wrong_type_open_nothing(suited_copy):
    elsewhere(suited_copy, providers="CPU")  # a text where a list of texts belongs
    with pytest.raises(CertificateError, match="providers is the text 'CPU'"):
        Session.open(suited_copy)


def test_the_build_is_of_the_libraries_bytes(monkeypatch, tmp_path):
    from edgesafe.runtime import ort as ort_module

    ours = ort_module._build()
    assert len(ours) == 16 and ours == ort_module._build.__wrapped__()
    patched = tmp_path / "patched_onnxruntime.so"
    patched.write_bytes(b"other kernels")
    monkeypatch.setattr(ort_module.ort.capi.onnxruntime_pybind11_state, "__file__", str(patched))
    assert ort_module._build.__wrapped__() != ours
