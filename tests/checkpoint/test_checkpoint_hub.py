"""`edgesafe plan` with a hub id: headers come, weights don't. The hub is a server on this machine."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from random_checkpoint import find_config, make_checkpoint

from edgesafe.checkpoint.exit_model import load
from edgesafe.checkpoint.hub import resolve_model
from edgesafe.cli import main
from edgesafe.errors import InputError
from fakehub import COMMIT, hub

pytestmark = pytest.mark.enable_socket
REPO = "someone/llava-1.5-7b"
PLAN = ["--device", "rpi5", "--json"]


@pytest.fixture(scope="module")
def seven_billion(tmp_path_factory) -> Path:
    """Three shards of 14 GB together, holes on the disk; the headers are LLaVA-1.5-7B's."""
    return make_checkpoint(find_config("llava-1.5-7b"), tmp_path_factory.mktemp("hub") / "llava-1.5-7b", empty=True)


@pytest.fixture
def at(tmp_path, monkeypatch):
    """Points huggingface_hub at an endpoint, with a cache of the test's own; None is no network."""
    from huggingface_hub import constants

    def point(endpoint: str | None) -> Path:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", endpoint is None)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint or "http://127.0.0.1:9")
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{constants.ENDPOINT}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )
        return tmp_path / "cache" / "models--someone--llava-1.5-7b" / "snapshots" / COMMIT

    return point


def _plan(capsys, model: str) -> dict:
    capsys.readouterr()
    assert main(["plan", model, *PLAN]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_plan_fetches_headers_and_no_weights(seven_billion, at, capsys):
    wanted = _plan(capsys, str(seven_billion))
    shards = [path.name for path in seven_billion.glob("*.safetensors")]
    with hub(REPO, seven_billion) as (endpoint, sent):
        snapshot = at(endpoint)
        assert _plan(capsys, REPO) == wanted and wanted["weights"] == 7_063_427_072
    assert len(shards) == 3 and all(0 < sent[name] <= 100_001 + 8 for name in shards)
    assert sum(sent.values()) < 10e6  # of 14 GB; most of it is the tokenizer
    assert not list(snapshot.glob("*.safetensors"))


def test_without_a_network_a_plan_needs_the_whole_snapshot(seven_billion, at, capsys, tmp_path):
    with hub(REPO, seven_billion) as (endpoint, _):
        snapshot = at(endpoint)
        first = _plan(capsys, REPO)
    at(None)
    assert main(["plan", REPO, *PLAN]) == 11 and "can't be fetched" in capsys.readouterr().err
    for shard in seven_billion.glob("*.safetensors"):
        (snapshot / shard.name).symlink_to(shard)
    assert _plan(capsys, REPO) == first


def test_the_headers_of_shards_that_are_there_are_not_fetched(seven_billion, at, capsys):
    with hub(REPO, seven_billion) as (endpoint, sent):
        snapshot = at(endpoint)
        first = _plan(capsys, REPO)
        for shard in seven_billion.glob("*.safetensors"):
            (snapshot / shard.name).symlink_to(shard)
        sent.clear()
        assert _plan(capsys, REPO) == first and not any("safetensors" in name for name in sent if sent[name])


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("model-00002-of-00003.safetensors", "the repository has no model-00002"),
        ("model.safetensors.index.json", "no weights here"),
    ],
)
def test_a_repository_without_such_weights(seven_billion, at, capsys, tmp_path, name, what):
    folder = Path(shutil.copytree(seven_billion, tmp_path / "repo", copy_function=lambda a, b: Path(b).symlink_to(a)))
    (folder / name).unlink()
    with hub(REPO, folder) as (endpoint, _):
        at(endpoint)
        assert main(["plan", REPO, *PLAN]) == 11 and what in capsys.readouterr().err


def test_an_export_still_fetches_everything(tiny_llava, at):
    with hub(REPO, tiny_llava) as (endpoint, sent):
        snapshot = at(endpoint)
        folder, name = resolve_model(REPO)
    assert (folder, name) == (snapshot, "llava-1.5-7b")
    weights = tiny_llava / "model.safetensors"
    assert sent[weights.name] == weights.stat().st_size and (folder / weights.name).read_bytes() == weights.read_bytes()


def test_an_export_of_a_revision(tiny_llava, at):
    with hub(REPO, tiny_llava, "refs/pr/3") as (endpoint, _):
        snapshot = at(endpoint)
        assert resolve_model(f"{REPO}@refs/pr/3") == (snapshot, "llava-1.5-7b")
    assert load(snapshot).n_blocks  # a snapshot of links is a checkpoint like any other


def _copied(source: Path, to: Path) -> Path:
    return Path(shutil.copytree(source, to, copy_function=lambda a, b: Path(b).symlink_to(a)))


def test_one_file_wins_over_an_index_on_the_hub_too(tiny_llava, seven_billion, at, capsys, tmp_path):
    folder = _copied(tiny_llava, tmp_path / "repo")
    for path in seven_billion.glob("model*"):
        (folder / path.name).symlink_to(path)
    with hub(REPO, folder) as (endpoint, sent):
        at(endpoint)
        assert _plan(capsys, REPO)["weights"] == _plan(capsys, str(tiny_llava))["weights"] < 10**6
    assert not sent.get("model-00001-of-00003.safetensors")


@pytest.mark.parametrize(("name", "text", "match"), [
    ("pytorch_model.bin", "x", "pickled.*convert them"),
    ("adapter_config.json", '{"base_model_name_or_path": "a/b"}', "adapter for a/b.*merge it first"),
])  # fmt: skip
def test_weights_of_another_kind_on_the_hub(tiny_llava, at, capsys, tmp_path, name, text, match):
    folder = _copied(tiny_llava, tmp_path / "repo")
    (folder / "model.safetensors").unlink()
    (folder / name).write_text(text)
    with hub(REPO, folder) as (endpoint, _):
        at(endpoint)
        with pytest.raises(InputError, match=match):
            resolve_model(REPO)
        assert main(["plan", REPO, *PLAN]) == 11 and re.search(match, capsys.readouterr().err)
