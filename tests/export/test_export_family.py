"""A member of a family that can't be cut is refused before anything is traced."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgesafe.checkpoint.hub import resolve_model
from edgesafe.errors import InputError, UnsupportedModelError
from edgesafe_export.family import load_family
from tiny_families import make_tiny


def _edited(tiny_llava: Path, to: Path, **changes) -> Path:
    shutil.copytree(tiny_llava, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, **changes}))
    return to


@pytest.mark.parametrize("family", ["mllama", "a-family-of-next-year"])
def test_other_families_are_named_with_what_is_supported(tiny_llava, tmp_path, family):
    folder = _edited(tiny_llava, tmp_path / "m", model_type=family)
    with pytest.raises(UnsupportedModelError, match=rf"{family}.*llava \(clip_vision_model or dinov2 tower, llama text\)"):
        load_family(folder)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("mllama", "3, 7, 15, 23 and 30"),
        ("qwen2_vl", "three positions"),
        ("qwen2_5_vl", "8, 16, 24 and 32"),
        ("qwen3_vl", "deepstack"),
        ("gemma3", "both directions"),
        ("paligemma", "both directions"),
    ],
)
def test_families_that_an_exit_would_break_are_refused_with_the_reason(tiny_llava, tmp_path, family, reason):
    folder = _edited(tiny_llava, tmp_path / "m", model_type=family)
    with pytest.raises(UnsupportedModelError, match=rf"{family}.*{reason}.*Expected: .*smolvlm"):
        load_family(folder)


@pytest.mark.parametrize(
    ("name", "pictures", "config", "error", "shown"),
    [
        ("smolvlm", {"do_resize": False}, {}, UnsupportedModelError, "tiles of one size"),
        ("smolvlm", {"max_image_size": {"longest_edge": 36}}, {}, InputError, "36 x 36"),
        ("llava_next", {"crop_size": {"height": 12, "width": 12}}, {}, UnsupportedModelError, "tiles of"),
        ("llava_next", {"image_grid_pinpoints": [[24, 24]]}, {}, InputError, "differently from what the model expects"),
        ("llava_next", {}, {"vision_feature_select_strategy": "full"}, UnsupportedModelError, "select strategy 'full'"),
        (
            "llava_onevision",
            {},
            {"vision_feature_select_strategy": "default"},
            UnsupportedModelError,
            "select strategy 'default'",
        ),
        ("llava_onevision", {}, {"vision_aspect_ratio": "square"}, UnsupportedModelError, "vision_aspect_ratio is 'square'"),
        ("llava_onevision", {}, {"vision_aspect_ratio": "anyres_max_9"}, UnsupportedModelError, "anyres_max_9"),
    ],
    ids=lambda value: "" if isinstance(value, type) else str(value)[:40],
)
def test_members_of_the_families_with_tiles_that_cut_otherwise_are_refused(tmp_path, name, pictures, config, error, shown):
    folder = make_tiny(name, tmp_path / "m", **pictures)
    whole = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**whole, **config}))
    with pytest.raises(error, match=shown):
        load_family(folder)


def test_a_decoder_that_sees_a_window_alone_is_refused(tmp_path):
    folder = make_tiny("llava_next mistral", tmp_path / "m")
    whole = json.loads((folder / "config.json").read_text())
    whole["text_config"]["sliding_window"] = 128
    (folder / "config.json").write_text(json.dumps(whole))
    with pytest.raises(UnsupportedModelError, match="the last 128 tokens"):
        load_family(folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"vision_feature_layer": [-2, -1]}, "several vision layers"),
        ({"vision_feature_select_strategy": "full"}, None),
    ],
)
def test_members_of_the_family_that_read_the_tower_otherwise(tiny_llava, tmp_path, change, named):
    # Two layers are concatenated, so the projector is twice as wide and the weights no longer fit: refused either way.
    folder = _edited(tiny_llava, tmp_path / "m", **change)
    if named is None:
        assert load_family(folder).geometry.image_tokens == 6 * 6 + 1  # 72 px in patches of 12, and CLS is kept
    else:
        with pytest.raises((UnsupportedModelError, InputError)):
            load_family(folder)


def test_a_checkpoint_without_a_fast_tokenizer_or_with_another_picture_size(tiny_llava, tmp_path):
    folder = Path(shutil.copytree(tiny_llava, tmp_path / "a"))
    for path in folder.glob("*processor*.json"):
        path.write_text(path.read_text().replace("72", "60"))
    with pytest.raises(InputError, match="60 x 60"):
        load_family(folder)
    folder = Path(shutil.copytree(tiny_llava, tmp_path / "b"))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError):
        load_family(folder)


def test_a_processor_that_can_not_read_a_picture(tmp_path):
    folder = make_tiny("llava_onevision", tmp_path / "m")
    path = folder / "processor_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "num_image_tokens"}))
    with pytest.raises(
        InputError, match="can't read a picture: TypeError.*num_image_tokens is missing.*add 'num_image_tokens'"
    ):
        load_family(folder)


def test_a_folder_is_taken_as_it_is(tiny_llava):
    assert resolve_model(tiny_llava) == (tiny_llava, tiny_llava.name)


def test_a_hub_id_comes_from_the_cache_without_a_network(tiny_llava, tmp_path):
    # The hub's own cache layout: a snapshot of links into a folder of blobs.
    repo = tmp_path / "hub" / "models--someone--tiny-llava"
    snapshot = repo / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    (repo / "blobs").mkdir()
    for file in tiny_llava.iterdir():
        shutil.copy(file, repo / "blobs" / file.name)
        (snapshot / file.name).symlink_to(repo / "blobs" / file.name)
    code = (
        "import sys; from edgesafe.checkpoint.hub import resolve_model; from edgesafe_export.family import load_family;"
        "folder, name = resolve_model('someone/tiny-llava'); print(name, load_family(folder).geometry.n_blocks);"
        "from edgesafe.errors import InputError\n"
        "try: resolve_model('someone/else')\n"
        "except InputError as error: print(error.where)"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub"), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["tiny-llava 4", "someone/else"], done.stderr[-2000:]
