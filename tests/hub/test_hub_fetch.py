"""`hub:ORG/NAME@REVISION`: fetched once and of one commit, opened from links, with and without a network, or refused."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from edgesafe import Session
from edgesafe.assurance.signing import verify
from edgesafe.cli import main
from edgesafe.errors import BundleError, ConfigError, HubError, HubUnavailableError, InputError, IntegrityError
from edgesafe.format.bundle import MANIFEST, Bundle
from edgesafe.format.suite import read_suite
from edgesafe.hub.cache import is_blob, snapshot_source
from edgesafe.hub.fetch import fetch_bundle
from edgesafe.hub.push import push
from fakehub_push import Repo
from handmade import ANSWER

pytestmark = pytest.mark.enable_socket
REPO = "someone/a-bundle"
PICTURE = Image.new("RGB", (8, 8), "red")


@pytest.fixture
def pushed(certified, hub, online) -> str:
    """The bundle on the hub: ``hub:ORG/NAME@COMMIT``."""
    online()
    return push(certified, REPO).source


def test_a_session_opens_it_and_its_answers_name_the_commit(pushed, hub, online):
    hub.requests.clear()
    with Session.open(f"hub:{REPO}") as session:
        answer = session.ask(PICTURE, "what?")
    assert (answer.text, answer.certified, answer.source) == (ANSWER, True, pushed)
    assert answer.to_dict()["source"] == pushed and verify(pushed).source == pushed
    files = [path for path in hub.sent("GET") if "/resolve/" in path]
    assert len(files) == len(set(files)) and not any(path.endswith("README.md") for path in files)
    hub.requests.clear()
    online(False)
    for name in (f"hub:{REPO}", pushed, f"hub:{REPO}@main"):
        with Session.open(name) as session:
            assert session.bundle.source == pushed
    assert hub.requests == []


def test_a_branch_that_moves_is_not_mixed(pushed, hub, online, monkeypatch):
    moved = dict(hub.repos[REPO].commits[hub.repos[REPO].head])
    library = importlib.import_module("huggingface_hub")
    real = library.snapshot_download

    def moving(repo, **options):
        folder = real(repo, **options)
        if MANIFEST in options["allow_patterns"]:
            hub.repos[REPO].commit(moved | {"tokenizer.json": b"{}"})
        return folder

    monkeypatch.setattr(library, "snapshot_download", moving)
    assert Bundle.open(fetch_bundle(f"hub:{REPO}")).source == pushed


def test_the_command_line_takes_it(pushed, online, tmp_path, capsys):
    PICTURE.save(tmp_path / "p.png")
    assert main(["ask", pushed, "--image", str(tmp_path / "p.png"), "--prompt", "what?", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["source"] == pushed
    assert main(["verify", f"hub:{REPO}"]) == 0 and f"from {pushed}" in capsys.readouterr().out
    out = tmp_path / "evidence"
    assert main(["evidence", f"hub:{REPO}", "--out", str(out)]) == 0 and (out / "bom.cdx.json").exists()
    before = sorted((tmp_path / "cache").rglob("*"))
    for command, code in (("certify", 40), ("sign", 10)):
        more = ["--key", str(tmp_path / "none.pem")] if command == "sign" else []
        assert main([command, f"hub:{REPO}", *more]) == code
        if command == "certify":
            assert "hf download someone/a-bundle --local-dir" in capsys.readouterr().err
    assert sorted((tmp_path / "cache").rglob("*")) == before


def test_nothing_is_written_into_a_snapshot(pushed, online, tmp_path, monkeypatch, capsys):
    snapshot = fetch_bundle(pushed)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    before = sorted((tmp_path / "cache").rglob("*"))
    assert main(["measure", pushed, "--seconds", "0.05"]) == 0 and list((tmp_path / "xdg").rglob("*.json"))
    assert main(["smoke", pushed]) in (0, 42) and list(Path(os.environ["XDG_STATE_HOME"]).rglob("*.json"))
    assert main(["certify", str(snapshot)]) != 0 and "hub's cache" in capsys.readouterr().err
    assert sorted((tmp_path / "cache").rglob("*")) == before


def test_what_hf_download_makes_is_a_bundle_too(pushed, certified, online, tmp_path):
    library = importlib.import_module("huggingface_hub")
    for folder in (library.snapshot_download(REPO), library.snapshot_download(REPO, local_dir=tmp_path / "local")):
        names = {path.name for path in Path(folder).iterdir()}
        assert {"README.md", ".gitattributes"} <= names
        with Session.open(folder) as session:
            assert session.ask(PICTURE, "what?").certified
        assert read_suite(Path(folder) / "suite").digest == read_suite(certified / "suite").digest
    assert verify(tmp_path / "local").source == "" and (tmp_path / "local" / ".cache" / "huggingface").is_dir()


def test_links_that_lead_elsewhere_are_refused_in_a_snapshot_too(pushed, tmp_path):
    snapshot = fetch_bundle(pushed)
    target = snapshot / "tokenizer.json"
    blob = Path(os.path.realpath(target))
    other = tmp_path / "cache" / "models--someone--other" / "blobs" / blob.name
    other.parent.mkdir(parents=True)
    for path in (other, tmp_path / "elsewhere", blob.parent.parent / "loose"):
        shutil.copyfile(blob, path)
        target.unlink()
        target.symlink_to(path)
        assert not is_blob(target)
        with pytest.raises(IntegrityError, match=r"tokenizer\.json"):
            Bundle.open(snapshot)
    target.unlink()
    target.symlink_to(blob)
    assert is_blob(target) and Bundle.open(snapshot)
    (snapshot / "vision").rename(tmp_path / "vision")
    (snapshot / "vision").symlink_to(tmp_path / "vision")
    with pytest.raises(IntegrityError, match="vision"):
        Bundle.open(snapshot)
    assert [snapshot_source(path) for path in (tmp_path, snapshot / "text", snapshot.parent)] == ["", pushed, ""]


def test_bytes_that_are_not_the_manifest_s(pushed, hub, online):
    tree = dict(hub.repos[REPO].commits[hub.repos[REPO].head])
    hub.repos[REPO].commit(tree | {"tokenizer.json": tree["tokenizer.json"] + b" "})
    with pytest.raises(IntegrityError, match=r"tokenizer\.json.*hf cache rm.*the repository is damaged"):
        Session.open(f"hub:{REPO}")
    del tree["tokenizer.json"]
    hub.repos[REPO].commit(tree)
    with pytest.raises(HubUnavailableError, match=r"not whole: tokenizer\.json"):
        Session.open(f"hub:{REPO}")


def test_half_a_snapshot(pushed, hub, online):
    hub.breaks["tokenizer.json"] = 403
    with pytest.raises(HubError, match="may not do this"):
        Session.open(f"hub:{REPO}")
    hub.breaks.clear()
    online(False)
    with pytest.raises(HubUnavailableError, match="HF_HUB_OFFLINE|not whole"):
        Session.open(f"hub:{REPO}")
    online()
    with Session.open(f"hub:{REPO}") as session:  # continues
        assert session.bundle.source == pushed


def test_what_the_hub_refuses(pushed, hub, online, monkeypatch, capsys):
    for name, what in (("someone/none", "no such repository, or it is private"), (f"{REPO}@v9", "no such revision")):
        with pytest.raises(HubError, match=what):
            Session.open(f"hub:{name}")
    hub.repos["someone/gated"], hub.repos["someone/empty"] = Repo(gated=True), Repo()
    for name in ("gated", "empty"):
        hub.repos[f"someone/{name}"].commit({"config.json": b"{}"})
    with pytest.raises(HubError, match="holds no bundle"):
        Session.open("hub:someone/empty")
    with pytest.raises(HubError, match="gated.*accept its terms"):
        Session.open("hub:someone/gated")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert hub.repos[REPO].private
    with pytest.raises(HubError, match="private.*hf auth login"):
        Session.open(f"hub:{REPO}")
    assert main(["verify", "hub:someone/none"]) == 90 and "HubError" in capsys.readouterr().err


def test_without_a_network(hub, online):
    online(False)
    with pytest.raises(HubUnavailableError, match="HF_HUB_OFFLINE"):
        Session.open(f"hub:{REPO}")


def test_a_hub_that_does_not_answer(online, monkeypatch):
    from huggingface_hub import constants

    online()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubUnavailableError, match="can't be reached.*network"):
        Session.open(f"hub:{REPO}")


@pytest.mark.parametrize(
    "name", ["hub:", "hub:name", "hub:a/b/c", "hub:../b", "hub:a/..", "hub:a/b@", "hub:a/b@../c", "hub:a/b c"]
)
def test_malformed_names(online, hub, name):
    online()
    with pytest.raises(InputError, match="hub:ORG/NAME"):
        Session.open(name)
    with pytest.raises(BundleError):
        Bundle.open(name)
    assert hub.requests == []


def test_without_the_extra(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"edgesafe\[hub\]"):
        Session.open(f"hub:{REPO}")
    assert main(["verify", f"hub:{REPO}"]) == 10 and "edgesafe[hub]" in capsys.readouterr().err
