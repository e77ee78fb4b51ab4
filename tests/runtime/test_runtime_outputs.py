"""What `certify`, `smoke` and `measure` write: tried before any work, and a measurement that has no place in the bundle."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from fake_engine import NumpyEngine

from edgesafe import Budget, Session, cli
from edgesafe.certify import certify as certify_module
from edgesafe.certify.certify import certify
from edgesafe.certify.smoke import smoke
from edgesafe.errors import BundleError, CertificateError, DeviceError, InputError
from edgesafe.format import latency as latency_module
from edgesafe.format.bundle import LATENCY, Bundle
from edgesafe.format.latency import LatencyTable, cached_path, read_cached_latency, read_latency, write_latency
from edgesafe.format.seal import seal
from edgesafe.runtime import measure
from mutants import wrong

BLACK = np.zeros((8, 8, 3), np.uint8)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The user's cache, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def sealed(suited_copy, read_only):
    """The bundle in a folder that can't be written."""
    return read_only(suited_copy)


def unwritable(tmp_path) -> list:
    (tmp_path / "a folder").mkdir()
    return [tmp_path / "missing" / "out", tmp_path / "a folder"]


def refused_before_any_work(error, work) -> str:
    engine = NumpyEngine()
    with pytest.raises(error) as caught:
        work(engine)
    assert not engine.ran and caught.value.todo, engine.ran
    return str(caught.value)


def test_answers_and_reports_that_can_not_be_written(suited_copy, tmp_path):
    for path in [*unwritable(tmp_path), suited_copy / "inside"]:
        before = (suited_copy / "certificate.json").read_bytes()
        assert str(path) in refused_before_any_work(InputError, lambda e, p=path: certify(suited_copy, answers=p, engine=e))
        assert str(path) in refused_before_any_work(InputError, lambda e, p=path: smoke(suited_copy, junit=p, engine=e))
        assert (suited_copy / "certificate.json").read_bytes() == before
        assert cli.main(["certify", str(suited_copy), "--answers", str(path)]) == 11
        assert cli.main(["smoke", str(suited_copy), "--junit", str(path)]) == 11
    Bundle.open(suited_copy)
    assert list((tmp_path / "a folder").iterdir()) == []


def test_a_bundle_that_can_not_be_written_is_not_certified_for_hours_first(sealed, tmp_path):
    shown = refused_before_any_work(CertificateError, lambda e: certify(sealed, engine=e))
    assert "certificate.json" in shown and "copy the bundle" in shown
    assert smoke(sealed, junit=tmp_path / "j.xml").exits  # reading is enough for this


def test_that_check_fails_where_outputs_are_tried_at_the_end(sealed, tmp_path, monkeypatch):
    monkeypatch.setattr(certify_module, "check_writable", lambda *_, **__: None)
    with pytest.raises((AssertionError, OSError)):
        refused_before_any_work(CertificateError, lambda e: certify(sealed, engine=e))


def test_what_is_no_bundle_stays_what_it_was_called(tmp_path):
    for work in (certify, smoke, measure):
        for path in (tmp_path, tmp_path / "missing"):
            with pytest.raises(BundleError, match=r"manifest\.json|not a folder"):
                work(path)
    assert list(tmp_path.iterdir()) == []


def test_a_measurement_of_a_bundle_that_can_not_be_written_is_kept_in_the_cache(sealed, cache, capsys):
    table = measure(sealed, seconds=0.1, threads=1)
    bundle = Bundle.open(sealed)
    assert table.path == cache / "edgesafe" / "latency" / f"{bundle.digest}.json" == cached_path(bundle)
    assert str(table.path) in capsys.readouterr().err
    assert read_cached_latency(bundle) == table and read_latency(bundle) is None
    assert "path" not in table.to_dict() and "path" not in json.loads(table.path.read_bytes())
    answer = Session.open(sealed).ask(BLACK, "what?", Budget(60_000, require_measured=True))
    assert answer.prediction == "measured" and answer.note == ""


def test_a_measurement_of_a_bundle_that_can_be_written_is_in_it(suited_copy, cache, capsys):
    assert measure(suited_copy, seconds=0.1, threads=1).path == suited_copy / LATENCY
    assert not cache.exists() and "can't be written" not in capsys.readouterr().err


def test_neither_place_can_be_written(sealed, tmp_path, read_only, monkeypatch):
    for named in (read_only(tmp_path / "closed"), tmp_path / "closed" / "deeper"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(named))
        assert "XDG_CACHE_HOME" in refused_before_any_work(DeviceError, lambda e: measure(sealed, seconds=0.1, engine=e))
    (tmp_path / "a file").write_text("x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    refused_before_any_work(DeviceError, lambda e: measure(sealed, seconds=0.1, engine=e))


def test_the_cache_is_at_home_where_nothing_or_a_relative_path_is_named(suited_copy, monkeypatch, tmp_path):
    bundle = Bundle.open(suited_copy)
    monkeypatch.setenv("HOME", str(tmp_path))
    for named in ("", "relative", None):
        monkeypatch.delenv("XDG_CACHE_HOME") if named is None else monkeypatch.setenv("XDG_CACHE_HOME", named)
        assert cached_path(bundle) == tmp_path / ".cache" / "edgesafe" / "latency" / f"{bundle.digest}.json"

    def homeless():
        raise RuntimeError("could not determine home directory")

    monkeypatch.setattr(latency_module.Path, "home", homeless)
    assert cached_path(bundle) is None and read_cached_latency(bundle) is None


def cached(bundle, table, **changes):
    """The table with changes, in the cache."""
    path = cached_path(bundle)
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_latency(bundle, replace(table, **changes), path)


def test_which_of_two_measurements_counts(measured, cache):
    root, table = measured
    bundle = Bundle.open(root)
    own = {**table.conditions, "measured_at": "2026-01-02T00:00:00+00:00"}
    write_latency(bundle, replace(table, conditions=own))
    for changes, threads in (
        ({"threads": 7}, 1),  # not known when: the bundle's own
        ({"threads": 7, "conditions": {**own, "measured_at": "2026-01-01T00:00:00+00:00"}}, 1),
        ({"threads": 7, "conditions": own}, 1),
        ({"threads": 7, "conditions": {**own, "measured_at": "2026-01-03T00:00:00+00:00"}}, 7),
        ({"threads": 7, "conditions": {**own, "measured_at": "2026-01-03"}, "bundle_digest": "0" * 64}, 1),
        ({"threads": 7, "conditions": {**own, "measured_at": "2026-01-03"}, "machine": "another"}, 1),
        ({"threads": 7, "conditions": {**own, "measured_at": "2026-01-03"}, "engine": "another"}, 1),
    ):
        cached(bundle, table, **changes)
        session = Session.open(root)
        assert (session.threads, session.tuning.latency is not None) == (threads, True), changes
    # The bundle's own was measured elsewhere, as one that is shipped with it: the cache's counts.
    write_latency(bundle, replace(table, machine="another"))
    cached(bundle, table, threads=7)
    assert Session.open(root).threads == 7


def test_a_cache_that_is_damaged_is_no_reason_to_stop(measured, cache):
    root, table = measured
    bundle = Bundle.open(root)
    for data in (b"", b"{}", b"\xff", seal({"format_version": 99}), seal({**table.to_dict(), "threads": "two"})):
        path = cached_path(bundle)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        assert Session.open(root).tuning.latency is not None
        shutil.move(root / LATENCY, root.parent / LATENCY)
        note = Session.open(root).ask(BLACK, "what?").note
        assert "the copy in the cache can't be read" in note, data
        shutil.move(root.parent / LATENCY, root / LATENCY)


def test_tables_of_formats_2_and_3_open_and_predict(measured):
    root, table = measured
    obj = table.to_dict()
    # Then there was one picture, decoded, of 864 x 1152.
    (picture,) = obj["text"]["preprocess"]
    table.text["preprocess"][0]["pixels"] = 864 * 1152
    obj["text"]["preprocess"] = {key: picture[key] for key in ("p50_ms", "p95_ms", "ms")}
    assert LatencyTable.from_dict({**obj, "format_version": 3}) == table
    del obj["engine"]
    old = {**obj, "format_version": 2, "onnxruntime_version": obj.pop("engine_version")}
    del old["engine_version"]
    assert LatencyTable.from_dict(old) == table
    (root / LATENCY).write_bytes(seal(old))
    assert Session.open(root).ask(BLACK, "what?", Budget(60_000)).prediction == "measured"
    for wrong_keys in ({**old, "engine": "x"}, {**old, "format_version": 3}, {**old, "format_version": True}):
        with pytest.raises(BundleError):
            LatencyTable.from_dict(wrong_keys)


def test_that_check_fails_where_old_tables_are_not_read(measured, monkeypatch):
    edit = ("version not in (_ONE_ENGINE, _ONE_PICTURE, LATENCY_VERSION)", "version != LATENCY_VERSION")
    monkeypatch.setattr(latency_module, "_check_version", wrong(latency_module._check_version, edit))
    with pytest.raises(BundleError):
        test_tables_of_formats_2_and_3_open_and_predict(measured)
