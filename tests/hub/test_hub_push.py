"""`edgesafe push` against a hub on this machine: what is sent, what is refused, again and again, and broken in the middle."""

from __future__ import annotations

import hashlib
import json
import re

import pytest

from edgesafe.cli import main
from edgesafe.errors import CertificateError, HubError, HubUnavailableError, InputError, IntegrityError
from edgesafe.format.bundle import CERTIFICATE, LATENCY, MANIFEST, Bundle
from edgesafe.format.seal import seal
from edgesafe.hub.push import MARK, push
from edgesafe.runtime import measure
from handmade import make_bundle

pytestmark = pytest.mark.enable_socket
REPO = "someone/a-bundle"


def listed(root) -> set[str]:
    """What the manifest itself names, read as JSON: no code of the product chooses it."""
    return {*json.loads((root / MANIFEST).read_text())["files"], MANIFEST, CERTIFICATE}


def test_exactly_the_bundle_and_a_card_go_there(certified, copy_of, hub, online, capsys):
    root = copy_of(certified)
    measure(root, seconds=0.05)  # of this machine, so it stays
    (root / f"{MANIFEST}.sig").write_bytes(b"a signature")
    (root / f"{CERTIFICATE}.partial").write_bytes(b"half")
    (root / ".cache" / "huggingface").mkdir(parents=True)
    (root / ".cache" / "huggingface" / "token").write_text("hf_secret")
    (root / "README.md").write_text("hf_secret")
    online()
    with pytest.raises(IntegrityError, match="partial"):
        push(root, REPO)
    assert not hub.repos
    (root / f"{CERTIFICATE}.partial").unlink()
    assert main(["push", str(root), REPO, "--license", "apache-2.0"]) == 0
    tree = hub.repos[REPO].commits[hub.repos[REPO].head]
    assert tree.keys() == listed(root) | {f"{MANIFEST}.sig", "README.md", ".gitattributes"}
    assert all(tree[name] == (root / name).read_bytes() for name in listed(root))
    assert not any(b"hf_secret" in data for data in (*tree.values(), *hub.blobs.values())) and (root / LATENCY).exists()
    assert capsys.readouterr().out.startswith(f"hub:{REPO}@{hub.repos[REPO].head}: {len(tree) - 1} files, pushed")
    assert hub.repos[REPO].private


def test_the_card_says_what_the_certificate_says(certified, hub, online):
    online()
    push(certified, REPO, public=True, licence="mit")
    text = hub.repos[REPO].commits[hub.repos[REPO].head]["README.md"].decode()
    head = text.partition(MARK)[0]
    assert re.fullmatch(r"---\nlicense: mit\n(.+\n)+---\n", head) and "pipeline_tag: image-text-to-text" in head
    certificate = json.loads((certified / CERTIFICATE).read_text())
    for one in certificate["exits"]:
        assert f"| {one['exit']} | {one['verdict']} | {100 * one['harmful']['rate']:.1f} [" in text
    assert "No exit is certified under the present verdict" in text  # its rates are made up, and it has no checks
    assert (
        f"\n# {REPO}\n" in text
        and "## Scope" in text
        and "onnxruntime" in text
        and f'Session.open("hub:{REPO}")' in text
        and "mit, as its" in text
    )
    assert Bundle.open(certified).digest in text and not hub.repos[REPO].private and "test-record" not in text


def test_again_changes_nothing_and_another_bundle_replaces_it(certified, tmp_path, hub, online):
    online()
    first = push(certified, REPO)
    hub.uploaded.clear()
    second = push(certified, REPO)
    assert (second.source, second.new, first.new) == (first.source, False, True) and not hub.uploaded
    other = make_bundle(tmp_path / "other", suite_from=certified / "suite", device="rpi5").root
    (hub.repos[REPO].commits[hub.repos[REPO].head])["vision/gone.onnx"] = b"x"  # not the manifest's
    with pytest.raises(HubError, match=r"other than a bundle: vision/gone\.onnx"):
        push(other, REPO)
    del hub.repos[REPO].commits[hub.repos[REPO].head]["vision/gone.onnx"]
    third = push(other, REPO)
    assert third.new and third.digest == Bundle.open(other).digest != first.digest
    assert len(hub.repos[REPO].commits) == 3 and first.source.partition("@")[2] in hub.repos[REPO].commits


def test_files_of_an_earlier_bundle_go_away(certified, tmp_path, hub, online):
    online()
    push(certified, REPO)
    small = make_bundle(tmp_path / "small", suite_from=certified / "suite")
    manifest = json.loads((small.root / MANIFEST).read_text())
    (small.root / "vision" / "extra.onnx").write_bytes(b"x")
    manifest["files"]["vision/extra.onnx"] = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    tree = dict(hub.repos[REPO].commits[hub.repos[REPO].head])
    hub.repos[REPO].commit(tree | {MANIFEST: seal(manifest), "vision/extra.onnx": b"x"})
    push(certified, REPO)
    assert "vision/extra.onnx" not in hub.repos[REPO].commits[hub.repos[REPO].head]


def test_somebody_s_own_repository_is_left_alone(certified, hub, online):
    online()
    for name, what in (
        ("model.safetensors", "model.safetensors"),
        ("README.md", "was written by somebody"),
        (MANIFEST, MANIFEST),
    ):
        hub.repos.clear()
        push(certified, REPO)
        hub.repos[REPO].commits.clear()
        before = hub.repos[REPO].commit({".gitattributes": b"", name: b'{"their": "own"}'})
        if name == MANIFEST:  # named like ours, and all that it says is left out
            hub.repos[REPO].commits[before]["theirs.txt"] = b"x"
        with pytest.raises(HubError, match=what):
            push(certified, REPO)
        assert hub.repos[REPO].head == before


def test_what_does_not_verify_or_has_no_certificate_sends_nothing(certified, copy_of, hub, online):
    online()
    root = copy_of(certified)
    whole = (root / "tokenizer.json").read_bytes()
    (root / "tokenizer.json").write_bytes(whole[:-1] + b" ")
    with pytest.raises(IntegrityError, match=r"tokenizer\.json"):
        push(root, REPO)
    (root / "tokenizer.json").write_bytes(whole)
    (root / CERTIFICATE).unlink()
    with pytest.raises(CertificateError, match="certif"):
        push(root, REPO)
    assert hub.requests == []


def test_an_interrupted_push_leaves_the_repository_and_continues(certified, hub, online):
    online()
    hub.breaks["/commit/"] = 500
    with pytest.raises(HubUnavailableError, match="answered 500"):
        push(certified, REPO)
    assert len(hub.repos[REPO].commits) == 1 and hub.uploaded
    hub.breaks.clear()
    hub.uploaded.clear()
    assert push(certified, REPO).new and not hub.uploaded  # what was sent is there


def test_two_pushes_at_once_do_not_mix(certified, hub, online):
    online()
    push(certified, REPO)
    hub.breaks["/commit/"] = 412
    with pytest.raises(HubUnavailableError, match="changed meanwhile"):
        push(certified, "someone/other")


@pytest.mark.parametrize("repo", ["name", "a/b/c", "a/b@main", "../b", "a/..", "", "a/b--c", "https://h/a/b", "a/b c"])
def test_names_of_no_repository(certified, hub, online, repo):
    online()
    with pytest.raises(InputError):
        push(certified, repo)
    with pytest.raises(InputError, match="licence"):
        push(certified, REPO, licence="mit\ntags: [x]")
    assert hub.requests == []


def test_without_a_token_a_right_or_a_network(certified, hub, online, monkeypatch, capsys):
    online()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match="may not do this.*Invalid user token.*hf auth login"):
        push(certified, REPO)
    monkeypatch.delenv("HF_TOKEN")
    hub.requests.clear()
    assert main(["push", str(certified), REPO]) == 90 and "there is no token" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "hf_any")
    online(False)
    assert main(["push", str(certified), REPO]) == 91 and "HF_HUB_OFFLINE" in capsys.readouterr().err
    assert hub.requests == []
