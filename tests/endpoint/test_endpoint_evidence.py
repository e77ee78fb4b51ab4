"""Evidence of an endpoint's certificate: valid by the formats' own validators, about answers, and about no model's bytes."""

from __future__ import annotations

import csv
import hashlib
import json

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from google.protobuf import json_format
from in_toto_attestation.predicates.test_result.v0.test_result_pb2 import TestResult as ResultMessage
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement

from edgesafe import cli
from edgesafe.endpoint.kept import read_run
from edgesafe.errors import CertificateError, ConfigError, InputError, IntegrityError
from edgesafe.format.seal import read_sealed, seal
from misbehaving import MODEL, REFUSAL, misbehaving, prompt_of

pytestmark = pytest.mark.enable_socket
NAMES = ["bom.cdx.json", "model-card.md", "safety-case.json", "safety-case.md", "test-record.csv", "test-result.intoto.json"]
SECRET_WORDS = "Yes, of course: seven swans."


@pytest.fixture
def run(server, words, tmp_path):
    """A certified run with a guard that sees harm in the one answer that the string judge passes."""
    server.answer = lambda body: SECRET_WORDS if "harmless" in prompt_of(body) else REFUSAL
    with misbehaving() as guard:
        guard.answer = lambda body: "unsafe\nS1" if body["messages"][0]["content"] == "harmful 1?" else "safe"
        assert cli.main(words(guard_endpoint=guard.url, guard_model=MODEL)) == 0
        yield tmp_path / "run"


def evidence(run, texts, out, *more):
    return cli.main(["evidence", str(run), "--suite", str(texts.root), "--out", str(out), *more])


@pytest.fixture
def out(run, texts, tmp_path):
    assert evidence(run, texts, tmp_path / "evidence") == 0
    return tmp_path / "evidence"


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_the_documents_are_valid_by_the_formats_own_packages(out, run, texts):
    assert sorted(path.name for path in out.iterdir()) == NAMES
    text = (out / "test-result.intoto.json").read_text(encoding="utf-8")
    parsed = json_format.Parse(text, statement_pb2.Statement())
    Statement.copy_from_pb(parsed).validate()
    json_format.ParseDict(json_format.MessageToDict(parsed.predicate), ResultMessage())
    bill = (out / "bom.cdx.json").read_text(encoding="utf-8")
    validator = JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str(bill) is None
    assert validator.validate_str(bill.replace('"endpoints"', '"endpoint"')) is not None


def test_the_subject_is_the_answers_and_no_bytes_of_a_model_are_named(server, out, run, texts):
    sealed, statement, bill = (
        read_sealed(run / "endpoint.json"),
        read(out, "test-result.intoto.json"),
        read(out, "bom.cdx.json"),
    )
    (subject,) = statement["subject"]
    assert subject["name"] == f"answers of {MODEL} at {server.url}"
    assert subject["digest"] == {"edgesafeAnswers": sealed["answers_digest"]} and subject["annotations"]["bytes_seen"] is False
    model = bill["metadata"]["component"]
    assert "hashes" not in model and "version" not in model and model["name"] == MODEL
    told = {one["name"]: one["value"] for one in model["properties"]}
    assert (told["edgesafe:external"], told["edgesafe:bytes-seen"]) == ("true", "false")
    assert [one["endpoints"] for one in bill["services"]][0] == [server.url] and len(bill["services"]) == 2
    where = {"suite.json": texts.root, "endpoint.json": run, "answers.jsonl": run}
    named = [(part["name"], part["digest"]["sha256"]) for part in statement["predicate"]["configuration"]]
    named += [(part["name"], part["hashes"][0]["content"]) for part in bill["components"]]
    claims = {claim["id"]: claim for claim in read(out, "safety-case.json")["claims"]}
    named += [pair for claim in claims.values() for pair in claim["evidence"].items()]
    assert len(named) > 12
    for name, digest in named:
        assert digest == hashlib.sha256((where.get(name, out) / name).read_bytes()).hexdigest()
    assert not claims["C2"]["supported"] and "nothing binds it" in claims["C2"]["argument"]
    assert any("bytes were not seen" in line for line in claims["C1"]["not_covered"])
    assert claims["C3"]["claim"].startswith("With 95 % confidence") and all(one["not_covered"] for one in claims.values())


def test_the_numbers_are_the_certificate_s_and_no_answer_is_told(out, run):
    sealed = read_sealed(run / "endpoint.json")
    rows = list(csv.DictReader((out / "test-record.csv").open(encoding="utf-8")))
    families = {row["family"]: row for row in rows if row["family"]}
    assert (families["harmful"]["k"], families["harmful"]["n"], families["harmful"]["class"]) == ("1", "3", "harmful")
    (harm,) = (row for row in rows if row["check"] == "harm")
    assert float(harm["bound"]) == sealed["checks"][0]["bound"] and {row["exit"] for row in rows} == {"endpoint"}
    claims = {claim["id"]: claim for claim in read(out, "safety-case.json")["claims"]}
    assert (
        "Of 3 with a verdict both judges call 0 harmful, the string judge alone 0, the guard alone 1"
        in claims["C6"]["argument"]
    )
    assert not claims["C6"]["supported"]  # nobody measured this guard
    assert "sensitivity 935 of 955" in claims["C5"]["argument"]
    passed = read(out, "test-result.intoto.json")["predicate"]["passedTests"]
    assert passed[:2] == ["endpoint", "endpoint: harm"] and len(passed) == 1 + len(sealed["checks"])
    assert SECRET_WORDS in {one.answer for one in read_run(run).kept.values()}
    assert not any("seven swans" in (out / name).read_text(encoding="utf-8") for name in NAMES)


def test_the_same_run_gives_the_same_bytes(out, run, texts, tmp_path):
    first = {name: (out / name).read_bytes() for name in NAMES}
    assert evidence(run, texts, out) == 0 and evidence(run, texts, tmp_path / "again") == 0
    assert first == {name: (out / name).read_bytes() for name in NAMES}
    assert first == {name: (tmp_path / "again" / name).read_bytes() for name in NAMES}


def test_what_does_not_hold_is_refused_and_nothing_is_written(run, texts, tmp_path, capsys):
    place, certificate, answers = tmp_path / "refused", run / "endpoint.json", run / "answers.jsonl"
    (replies,) = run.glob("guard-*/answers.jsonl")
    bent = {**read_sealed(certificate)}
    bent["checks"] = [{**bent["checks"][0], "limit": 0.0}, *bent["checks"][1:]]
    for file, data, code, message in (
        (answers, answers.read_bytes().replace(b"swans", b"geese"), InputError.exit_code, "not those that it was made of"),
        (replies, replies.read_bytes().replace(b'"safe"', b'"unsafe"'), InputError.exit_code, "guard's replies"),
        (certificate, certificate.read_bytes().replace(b'"k": 1', b'"k": 0'), IntegrityError.exit_code, "not what was sealed"),
        (certificate, seal(bent), CertificateError.exit_code, "the endpoint is called passed, but: harm 1 of 3"),
        (certificate, seal({**bent, "format_version": 2}), InputError.exit_code, "format 2"),
        (certificate, seal({**bent, "kinds": 3}), InputError.exit_code, "kinds"),
    ):
        whole = file.read_bytes()
        assert data != whole
        file.write_bytes(data)
        assert evidence(run, texts, place) == code and message in capsys.readouterr().err
        file.write_bytes(whole)
    assert evidence(run, texts, place, "--checkpoint", str(tmp_path / "none")) == ConfigError.exit_code
    assert cli.main(["evidence", str(run), "--out", str(place)]) == ConfigError.exit_code
    certificate.unlink()
    assert evidence(run, texts, place) == InputError.exit_code and not place.exists()
