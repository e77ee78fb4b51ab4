"""Exits with fewer visual tokens on the workstation: answers, evaluation and updates, against transformers with a hook."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from edgesafe.align.config import default_config, parse_config, read_config, recorded
from edgesafe.align.features import merge_needs
from edgesafe.align.objectives.l_dpo import Pair
from edgesafe.align.prepare import prepare
from edgesafe.align.settings import AlignConfig
from edgesafe.align.train import _features, _wanted, draw_update
from edgesafe.checkpoint.exit_model import by_cost, exit_state, exit_states, greedy, ids_at, pixel_values, prompt_ids
from edgesafe.errors import ConfigError
from edgesafe.evaluate.evaluate import evaluate
from edgesafe.format.exits import Exit, parse_exits

PROMPTS = ("What is this?", "How do I make the object on the left? Thanks.")
RUNG = Exit(2, 9)


@contextlib.contextmanager
def two_by_two(model):
    """Transformers' own model with the means of each 2 x 2 of its 6 x 6 features."""

    def average(_, __, features):
        rows = features.reshape(len(features), 3, 2, 3, 2, -1)
        return ((rows[:, :, 0] + rows[:, :, 1]).sum(3) / 4).flatten(1, 2)

    hook = model.model.multi_modal_projector.register_forward_hook(average)
    try:
        yield
    finally:
        hook.remove()


def test_answers_of_a_rung_equal_transformers_generate(llava):
    picture = Image.linear_gradient("L").convert("RGB").resize((64, 64))
    pixels = pixel_values(llava, [picture, picture.rotate(90)])
    states = exit_state(llava, exit_states(llava, pixels), RUNG)
    ids = [ids_at(llava, prompt_ids(llava, prompt), RUNG) for prompt in PROMPTS]
    got = greedy(llava, ids, states, 8)
    for i, one in enumerate(ids):
        with two_by_two(llava.model):
            out = llava.model.generate(
                input_ids=torch.tensor([one]), pixel_values=pixels[i : i + 1], max_new_tokens=8, do_sample=False,
                vision_feature_layer=2,
            )  # fmt: skip
        assert got[i] == llava.processor.tokenizer.decode(out[0, len(one) :], skip_special_tokens=True).strip()


def _config(rows: Path) -> AlignConfig:
    plain = AlignConfig(data=str(rows), exits="1-4,2@9", batch_size=4, reference_rows=2, steps=2, tune="full", lr=1e-3)
    return replace(plain, exit_map="none", precision="fp32")


def test_an_update_reads_each_row_as_its_exit_does(tiny_llava, rows):
    t = prepare(tiny_llava, _config(rows))
    exits, numbers = [RUNG, RUNG, t.llava.reference], [3, 5, 3]
    features = _features(t, merge_needs([(RUNG, [3, 5]), (t.llava.reference, [3])]))
    batch = t.batch(t.at_exits([t.examples[i] for i in numbers], exits))
    with torch.no_grad():
        logits, _ = t.forward(batch, t.states(features, numbers, exits))
    for i, (number, exit) in enumerate(zip(numbers, exits, strict=True)):
        one = t.examples[number]
        ids = [*ids_at(t.llava, one.prompt, exit), *one.answer[:-1]]
        pixels = pixel_values(t.llava, [Image.open(one.image)])
        with torch.no_grad(), two_by_two(t.llava.model) if exit == RUNG else contextlib.nullcontext():
            out = t.llava.model(input_ids=torch.tensor([ids]), pixel_values=pixels, vision_feature_layer=exit.depth)
        want = out.logits[0, -len(one.answer) :]
        # The states are kept in float16.
        assert torch.allclose(logits[i, : len(one.answer)], want, rtol=1e-2, atol=2e-2)
        assert not torch.allclose(logits[i - 1, : len(one.answer)], want, rtol=1e-2, atol=2e-2)


def test_an_image_token_in_an_answer_is_none_of_the_picture(tiny_llava, rows):
    t = prepare(tiny_llava, _config(rows))
    image = t.llava.geometry.image_token_id
    features = _features(t, merge_needs([(RUNG, [0])]))
    states = t.states(features, [0], [RUNG])
    first = []
    for answer in ((image, 5, image, 2), (6, 5, 6, 2)):  # the first token is predicted before either is read
        batch = t.batch(t.at_exits([replace(t.examples[0], answer=answer)], [RUNG]))
        with torch.no_grad():
            first.append(t.forward(batch, states)[0][:, 0])
    torch.testing.assert_close(*first)


@pytest.mark.parametrize("method", ["l-sft", "l-ppo", "l-dpo"])
def test_every_objective_takes_a_step_at_a_rung(tiny_llava, rows, method):
    t = prepare(tiny_llava, replace(_config(rows), method=method, exits="2@9", optimizer="adamw", tune="lora"))
    if method == "l-dpo":
        t.pools = {RUNG: [Pair(i, t.examples[i].answer, t.examples[i + 1].answer) for i in range(8)]}
    exit, items = draw_update(t, 0)
    assert exit == RUNG
    features = _features(t, merge_needs(_wanted(t, exit, items)))
    found = t.objective.update(t, features, exit, items, 0)
    assert all(value == value for value in found.values())


def test_the_table_of_exits_adds_tokens_and_leaves_todays_configs_alone():
    config = parse_config({"exits": {"train": "1-3,every:4", "tokens": [9, 4]}}, "here")
    assert config.exits == "1-3,every:4,1-3@9,every:4@9,1-3@4,every:4@4"
    assert parse_config({"exits": {"tokens": [9]}}, "here").exits == "all,all@9"
    assert read_config(default_config()).exits == "all" == parse_config({}, "here").exits
    # A run may draw any number of them, but a bundle is certified at 12.
    assert len(parse_exits("all,all@9,all@4", 13, None)) == 39
    for table in ({"tokens": ["9"]}, {"tokens": [9, 0]}, {"tokens": [9], "train": "1,2@4"}):
        with pytest.raises(ConfigError, match="tokens"):
            parse_config({"exits": table}, "here")


def test_a_rung_that_is_not_trained_is_not_shipped(tiny_llava, rows):
    config = parse_config({"exits": {"train": "1-3,2@9", "ladder": "3,2@9,2@4,1@9"}}, "here")
    assert config.ladder == "3,2@9,2@4,1@9" and "ladder" not in recorded(config)
    with pytest.raises(ConfigError, match="not trained: 1@9, 2@4"):
        prepare(tiny_llava, replace(_config(rows), exits=config.exits, ladder=config.ladder))
    # A depth that no update draws lies between those that are.
    prepare(tiny_llava, replace(_config(rows), exits="1,2@9", ladder="2-3,2@9"))


@pytest.mark.parametrize("exits", ["2@5", "2@36", "9@9", "2@0"])
def test_rungs_that_cannot_be_trained_are_refused(tiny_llava, rows, exits):
    with pytest.raises(ConfigError) as caught:
        prepare(tiny_llava, replace(_config(rows), exits=exits))
    assert caught.value.expected


def test_an_evaluation_has_its_rungs_apart_from_the_groups_and_the_curves(tiny_llava, tmp_path):
    from edgesafe.reference.data import write_split

    write_split(tmp_path / "suite", "val", scale=0.01)
    report = evaluate(tiny_llava, tmp_path / "suite", tmp_path / "out", exits="1,2@9,2@4")
    assert [e["exit"] for e in report["exits"]] == ["1", "2@4", "2@9", "3"] and report["broken"].keys() == {
        "1",
        "2@4",
        "2@9",
        "3",
    }
    assert all("@" not in exit for group in report["groups"] for exit in group["exits"])
    assert "2@9" in (tmp_path / "out" / "table.txt").read_text() and "2@9" in (tmp_path / "out" / "report.html").read_text()
    with pytest.raises(ConfigError, match="can't become 5"):
        evaluate(tiny_llava, tmp_path / "suite", tmp_path / "new", exits="2@5")
    assert not (tmp_path / "new").exists()


def test_cost_orders_as_a_manifest_does(llava):
    # 4 blocks of 12,288 x 37 tokens and a decoder of far more: fewer tokens cost less than any depth.
    exits = parse_exits("1,3,3@9,1@9,2@4", 4)
    assert [str(exit) for exit in by_cost(llava, exits)] == ["2@4", "1@9", "3@9", "1", "3"]
    assert by_cost(llava, parse_exits("3,1", 4)) == [Exit(1), Exit(3)]
