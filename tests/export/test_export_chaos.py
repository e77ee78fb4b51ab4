"""An export that is killed at any step that touches the disk leaves the older bundle or the newer one, whole."""

from __future__ import annotations

import shutil

import pytest
from killed import killed_at_every_step

from edgesafe.format import files
from edgesafe.format.bundle import Bundle, is_bundle
from edgesafe.format.files import replacing
from edgesafe.format.targets import KEY, NEW
from handmade import make_bundle


@pytest.fixture
def export(tmp_path):
    """(folder, write, lay, which) of a bundle that an export replaces; the graphs are copied instead of traced."""
    old = make_bundle(tmp_path / "kept" / "old", certified=None, seed=1)
    new = make_bundle(tmp_path / "kept" / "new", certified=None, seed=2)
    work = tmp_path / "work"
    out = work / "bundle"

    def lay():
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(old.root, out)

    def write():
        with replacing(out, "bundle", is_bundle) as folder:
            shutil.copytree(new.root, folder / NEW)

    def which():
        return {old.digest: "old", new.digest: "new"}[Bundle.open(out).digest]

    return work, write, lay, which


def test_a_bundle_is_old_until_it_is_new(export):
    seen = killed_at_every_step(*export)
    assert seen == sorted(seen, reverse=True) and {"old", "new"} == set(seen) and len(seen) > 20


def test_that_check_fails_where_the_exchange_is_two_renames(export, monkeypatch):
    monkeypatch.setattr(files, "exchange", lambda new, out: False)
    with pytest.raises(Exception, match="is not a folder"):
        killed_at_every_step(*export)


def test_after_a_kill_the_next_export_starts_afresh(export):
    work, write, lay, which = export
    lay()
    (work / "bundle.partial").mkdir()
    for name in (KEY, "half"):
        (work / "bundle.partial" / name).write_text("x")
    write()
    assert which() == "new" and [path.name for path in work.iterdir()] == ["bundle"]
