"""A file of exit maps that is damaged, or another model's, is refused before anything is traced; the hub's is read too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from edgesafe.checkpoint.exit_maps import detach, maps_of
from edgesafe.checkpoint.exit_model import load
from edgesafe.checkpoint.weight_files import MAPS, SINGLE
from edgesafe.cli import main
from edgesafe.device import load_device
from edgesafe.errors import InputError
from edgesafe_export import export as export_module
from edgesafe_export import export_bundle
from edgesafe_export.skeleton import open_sketch
from fakehub import hub
from tiny_maps import FULL, mapped_copy, random_maps, write_maps

WIDTH, REFERENCE, BLOCKS = 32, 3, 4  # of the fixture tiny_llava
REPO = "someone/mapped"


def _full(depth: int, width: int = WIDTH) -> dict[str, np.ndarray]:
    shapes = {"weight": (width, width), "bias": (width,)}
    return {f"exit_maps.{depth}.{key}": np.ones(shape, np.float16) for key, shape in shapes.items()}


def _low(depth: int, rank: int) -> dict[str, np.ndarray]:
    shapes = {"0.weight": (rank, WIDTH), "1.weight": (WIDTH, rank), "1.bias": (WIDTH,)}
    return {f"exit_maps.{depth}.{key}": np.ones(shape, np.float16) for key, shape in shapes.items()}


def _without(tensors: dict[str, np.ndarray], key: str) -> dict[str, np.ndarray]:
    return {name: array for name, array in tensors.items() if not name.endswith(key)}


FOREIGN = {
    "another width": (_full(1, 16), r"depth 1 has the shapes"),
    "a weight turned": ({**_low(1, 4), "exit_maps.1.0.weight": np.ones((WIDTH, 4), np.float16)}, r"depth 1 has the shapes"),
    "no bias": (_without(_full(1), "bias"), r"depth 1 has the shapes"),
    "half a map": (_without(_low(1, 4), ".1.weight"), r"depth 1 has the shapes"),
    "both kinds": ({**_full(1), **_low(1, 4)}, r"depth 1 has the shapes"),
    "rank 1": (_low(1, 1), r"depth 1 has the shapes"),
    "rank 0": (_low(1, 0), r"depth 1 has the shapes"),
    "a number": ({**_low(1, 4), "exit_maps.1.0.weight": np.array(1, np.float16)}, r"depth 1 has the shapes"),
    "the reference's": (_full(REFERENCE), "it maps depth 3 of 4, 3 being the reference"),
    "too deep": (_full(BLOCKS + 1), "it maps depth 5 of 4"),
    "depth 0": (_full(0), r"it holds the tensor exit_maps\.0\."),
    "an unknown name": ({**_full(1), "exit_maps.1.scale": np.ones(1, np.float16)}, r"it holds the tensor exit_maps\.1\.scale"),
    "another tensor": ({**_full(1), "lm_head.weight": np.ones(1, np.float16)}, r"it holds the tensor lm_head\.weight"),
    "nothing": ({}, "it holds no map"),
    "whole numbers": ({k: v.astype(np.int32) for k, v in _full(1).items()}, "exit_maps.1"),
    "not finite": ({**_full(1), "exit_maps.1.bias": np.full(WIDTH, np.nan, np.float16)}, r"exit_maps\.1\.bias"),
    "infinite": ({**_full(1), "exit_maps.1.weight": np.full((WIDTH, WIDTH), np.inf, np.float16)}, r"exit_maps\.1\.weight"),
}


def _refused(folder: Path, out: Path, match: str, monkeypatch) -> None:
    """Refused by what align and evaluate load with and by an export, which traces nothing."""
    monkeypatch.setattr(export_module, "trace_pieces", lambda *_, **__: pytest.fail("it was traced"))
    for read in (lambda: load(folder), lambda: export_bundle(folder, out, load_device("host"))):
        with pytest.raises(InputError, match=match) as caught:
            read()
        assert MAPS in str(caught.value)
    assert not out.exists()


@pytest.mark.parametrize("what", FOREIGN)
def test_maps_that_do_not_belong_to_the_model_are_refused(folder, tmp_path, monkeypatch, what):
    tensors, match = FOREIGN[what]
    save_file(tensors, folder / MAPS)
    _refused(folder, tmp_path / "out", match, monkeypatch)


@pytest.mark.parametrize("left", [0, 4, 100, -1])
def test_a_file_of_maps_that_is_cut_short_is_refused(folder, tmp_path, monkeypatch, left):
    path = write_maps(folder, random_maps(WIDTH, {1: FULL})) / MAPS
    path.write_bytes(path.read_bytes()[:left])
    _refused(folder, tmp_path / "out", "damaged|bytes|header|short", monkeypatch)


def test_a_git_lfs_note_in_the_place_of_maps_is_refused(folder, tmp_path, monkeypatch):
    (folder / MAPS).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    _refused(folder, tmp_path / "out", "git lfs pull", monkeypatch)


def test_a_checkpoint_s_maps_are_read_with_their_numbers(tiny_llava, tmp_path):
    ranks = {1: FULL, 2: 4, 4: 2}
    folder = mapped_copy(tiny_llava, tmp_path / "m", ranks)
    made, model, sketch = random_maps(WIDTH, ranks), load(folder).model, open_sketch(folder)
    assert list(maps_of(model)) == list(maps_of(sketch.family.model)) == [1, 2, 4]
    state = torch.randn(2, 5, WIDTH)
    for depth, own in maps_of(model).items():
        torch.testing.assert_close(own(state), made[depth](state), rtol=2e-3, atol=2e-3)  # they lie in float16
        assert {f"exit_maps.{depth}.{key}" for key in own.state_dict()} <= sketch.stored.keys()
    plain = open_sketch(tiny_llava)
    assert sketch.count - plain.count == (32 + 1) * 32 + (2 * 4 + 1) * 32 + (2 * 2 + 1) * 32
    detach(model)
    assert not maps_of(model) and dict(model.named_parameters()).keys() == plain.stored.keys()


@pytest.fixture
def endpoint(tmp_path, monkeypatch):
    """Points huggingface_hub at an address, with a cache of the test's own; None is no network."""
    from huggingface_hub import constants

    def point(address: str | None) -> None:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", address is None)
        monkeypatch.setattr(constants, "ENDPOINT", address or "http://127.0.0.1:9")
        template = f"{constants.ENDPOINT}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    return point


def _plan(capsys, model: str) -> dict:
    capsys.readouterr()
    assert main(["plan", model, "--device", "rpi5", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.enable_socket
def test_a_plan_reads_the_hub_s_maps_by_their_header(tiny_llava, tmp_path, endpoint, capsys):
    # Larger than what is asked for at once of a header, so that the numbers themselves would show.
    folder = mapped_copy(tiny_llava, tmp_path / "m", {1: FULL, 2: 9000})
    wanted, plain = _plan(capsys, str(folder)), _plan(capsys, str(tiny_llava))
    assert wanted["weights"] - plain["weights"] == (32 + 1) * 32 + (2 * 9000 + 1) * 32
    with hub(REPO, folder) as (address, sent):
        endpoint(address)
        found = _plan(capsys, REPO)
    assert {**found, "model": ""} == {**wanted, "model": ""}
    assert 0 < sent[MAPS] < (folder / MAPS).stat().st_size and not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.enable_socket
def test_without_a_network_a_cached_checkpoint_without_maps_is_planned(tiny_llava, tmp_path, endpoint, capsys):
    from edgesafe.checkpoint.hub import resolve_model

    folder = Path(shutil.copytree(tiny_llava, tmp_path / "m"))
    assert (folder / SINGLE).is_file()
    with hub(REPO, folder) as (address, _):
        endpoint(address)
        resolve_model(REPO)
    endpoint(None)
    assert _plan(capsys, REPO)["weights"] == _plan(capsys, str(tiny_llava))["weights"]
