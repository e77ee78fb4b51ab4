"""Maps of a checkpoint: which pictures they come from, that nothing but the pictures' content counts, and what is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from edgesafe.checkpoint.exit_maps import maps_of
from edgesafe.checkpoint.exit_model import exit_state, exit_states, load, load_tower, open_images, pixel_values
from edgesafe.cli import main
from edgesafe.errors import InputError
from edgesafe.format.exits import Exit
from edgesafe.format.files import digest_folder
from edgesafe.maps import gather as gathering
from edgesafe.maps.fit import write_mapped
from edgesafe.maps.gather import by_content, find_pictures, gather
from tiny import make_tiny_llava
from tiny_families import DINOV2, make_tiny

FAMILIES = ("llava", DINOV2, "llava_next", "llava_onevision", "smolvlm", "idefics3")


def _draw(folder: Path, count: int, start: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + count):
        pixels = np.random.default_rng(i).integers(0, 256, (9, 11, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((80, 70)).save(folder / f"{i:03d}.png")
    return folder


def _model(name: str, folder: Path) -> Path:
    return make_tiny_llava(folder) if name == "llava" else make_tiny(name, folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return _draw(tmp_path_factory.mktemp("pictures") / "all", 30)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "exit_maps.safetensors"))


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", FAMILIES)
def test_mapped_states_lie_nearer_to_the_references(name, pictures, tmp_path):
    out = tmp_path / "out"
    write_mapped(_model(name, tmp_path / "model"), pictures, out)
    raw, mapped = load(tmp_path / "model"), load(out)
    images = open_images(sorted(pictures.glob("*.png")))
    want = exit_state(raw, exit_states(raw, pixel_values(raw, images)), raw.reference)
    states = exit_states(mapped, pixel_values(mapped, images))
    torch.testing.assert_close(exit_state(mapped, states, mapped.reference), want)  # the reference has no map
    assert set(maps_of(mapped.model)) == {d for d in range(1, mapped.n_blocks + 1) if d != mapped.reference.depth}
    for depth in maps_of(mapped.model):
        far, near = (float((exit_state(m, states, Exit(depth)) - want).square().mean()) for m in (raw, mapped))
        assert near < 0.7 * far, depth


def test_only_the_content_of_the_pictures_counts(tiny_llava, pictures, tmp_path):
    other = tmp_path / "other" / "deeper"
    other.mkdir(parents=True)
    for i, path in enumerate(sorted(pictures.glob("*.png"), reverse=True)):
        shutil.copyfile(path, other / f"x{i}.PNG")
    shutil.copyfile(other / "x0.PNG", other / "copy of it.png")  # a copy must not be fitted to and held out
    one, two = (write_mapped(tiny_llava, at, tmp_path / out) for at, out in ((pictures, "a"), (tmp_path / "other", "b")))
    assert _same(_weights(tmp_path / "a"), _weights(tmp_path / "b")) and one == two
    assert one["pictures"] == {"used": 30, "held_out": 6, "skipped": 0}


def test_other_pictures_give_other_maps(tiny_llava, pictures, tmp_path):
    write_mapped(tiny_llava, pictures, tmp_path / "a", limit=20)
    write_mapped(tiny_llava, pictures, tmp_path / "b")
    assert not _same(_weights(tmp_path / "a"), _weights(tmp_path / "b"))


def test_the_held_out_pictures_are_every_fifth_and_in_no_other_sum(tiny_llava, pictures):
    model, files = load(tiny_llava), by_content(find_pictures(pictures))
    found = gather(model, files)
    states = exit_states(model, pixel_values(model, open_images(list(files.values()))))
    held = torch.arange(30) % 5 == 1
    for sums, rows in ((found.fit, ~held), (found.held, held)):
        tokens = states[2][rows].flatten(0, 1).double()
        wanted = states[3][rows].flatten(0, 1).double()
        torch.testing.assert_close(sums.xx[1], tokens.T @ tokens)
        torch.testing.assert_close(sums.xy[1], tokens.T @ wanted)
        assert sums.tokens == len(tokens) and sums.yy == pytest.approx(float(wanted.square().sum()))
    assert found.held_out == int(held.sum())


def test_a_stopped_run_continues_and_ends_with_the_same_maps(tiny_llava, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(gathering, "_CHUNK", 4)
    monkeypatch.setattr(gathering, "_KEEP_S", -1.0)
    write_mapped(tiny_llava, pictures, tmp_path / "whole")
    seen = []
    real = gathering._add

    def stops(model, images, state):
        seen.append(len(images))
        if len(seen) == 5:
            raise KeyboardInterrupt
        real(model, images, state)

    monkeypatch.setattr(gathering, "_add", stops)
    with pytest.raises(KeyboardInterrupt):
        write_mapped(tiny_llava, pictures, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    write_mapped(tiny_llava, pictures, tmp_path / "cut")
    assert len(seen) == 5 + 4  # 8 chunks, of which 4 were done
    assert _same(_weights(tmp_path / "whole"), _weights(tmp_path / "cut"))
    assert not list(tmp_path.glob("*.partial"))


def test_the_tower_alone_gives_the_same_states(tiny_llava, pictures):
    whole, tower = load(tiny_llava), load_tower(tiny_llava)
    pixels = pixel_values(whole, open_images([pictures / "000.png"]))
    for one, other in zip(exit_states(whole, pixels), exit_states(tower, pixels), strict=True):
        assert torch.equal(one, other)
    assert all(weight.is_meta for weight in tower.language.parameters())


def test_the_weights_are_copied_as_they_are_and_older_maps_replaced(tiny_llava, pictures, tmp_path):
    before = digest_folder(tiny_llava)
    write_mapped(tiny_llava, pictures, tmp_path / "one", limit=10)
    record = write_mapped(tmp_path / "one", pictures, tmp_path / "two")
    write_mapped(tiny_llava, pictures, tmp_path / "three")
    assert digest_folder(tiny_llava) == before
    files = {path.name: path.read_bytes() for path in tiny_llava.iterdir()}
    new = {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    assert {name: new.pop(name) for name in files} == files and set(new) == {"exit_maps.safetensors", "exit_maps.json"}
    assert _same(_weights(tmp_path / "two"), _weights(tmp_path / "three"))
    assert json.loads((tmp_path / "two" / "exit_maps.json").read_text()) == record
    assert record["parent"]["digest"] == digest_folder(tmp_path / "one")


def test_maps_of_another_model_are_replaced_where_everything_else_refuses_them(tiny_llava, pictures, tmp_path):
    shutil.copytree(tiny_llava, tmp_path / "model")
    (tmp_path / "model" / "exit_maps.safetensors").write_bytes(b"junk")
    with pytest.raises(InputError, match="damaged"):
        load(tmp_path / "model")
    write_mapped(tmp_path / "model", pictures, tmp_path / "out")
    write_mapped(tiny_llava, pictures, tmp_path / "clean")
    assert _same(_weights(tmp_path / "out"), _weights(tmp_path / "clean"))


def test_pictures_that_cannot_be_read_are_skipped_and_counted(tiny_llava, tmp_path, capsys, monkeypatch):
    folder = _draw(tmp_path / "user", 9)
    (folder / "broken.jpg").write_bytes((folder / "000.png").read_bytes()[:60])
    Image.fromarray(np.arange(6400, dtype=np.uint16).reshape(80, 80) * 10).save(folder / "sixteen.png")
    Image.new("1", (9000, 9000)).save(folder / "enormous.png")
    (folder / "notes.txt").write_text("no picture")
    assert main(["maps", str(tiny_llava), "--pictures", str(folder), "--out", str(tmp_path / "out"), "--json"]) == 0
    out, said = capsys.readouterr()
    assert json.loads(out)["pictures"] == {"used": 10, "held_out": 2, "skipped": 2}
    assert "2 pictures were skipped" in said and "broken.jpg" in said and "enormous.png" in said


def test_few_pictures_are_said(tmp_path, capsys):
    model, folder = _model("llava", tmp_path / "model"), _draw(tmp_path / "few", 2)
    assert main(["maps", str(model), "--pictures", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert "few pictures" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: None, "no such folder"),
        (lambda folder: folder.mkdir(), "no picture here"),
        (lambda folder: _draw(folder, 1), "1 of 1 pictures can be used"),
        (lambda folder: (_draw(folder, 1), shutil.copy(folder / "000.png", folder / "again.png")), "1 of 1 pictures"),
        (lambda folder: (folder.mkdir(), (folder / "a.png").write_bytes(b"junk")), "0 of 1 pictures can be used"),
    ],
    ids=["no folder", "empty", "one", "one twice", "none readable"],
)
def test_too_few_pictures_are_refused_and_nothing_is_written(tiny_llava, tmp_path, make, says):
    make(tmp_path / "user")
    with pytest.raises(InputError, match=says):
        write_mapped(tiny_llava, tmp_path / "user", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.partial"))


def test_an_output_that_is_there_or_lies_in_an_input_is_refused(tiny_llava, pictures, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x").write_text("kept")
    for out in (tmp_path / "there", pictures / "out"):
        assert main(["maps", str(tiny_llava), "--pictures", str(pictures), "--out", str(out)]) == 11
    assert (tmp_path / "there" / "x").read_text() == "kept"
    assert main(["maps", str(tmp_path / "nothing"), "--pictures", str(pictures), "--out", str(tmp_path / "new")]) == 11
    assert "no checkpoint here" in capsys.readouterr().err
