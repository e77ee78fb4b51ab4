"""Training of `smol`: rows, packing, closed forms and a run that is cut off. On a tiny model; no network."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from edgesafe.certify.string_judge import COMPLY, REFUSE, classify
from edgesafe.checkpoint.exit_model import answer_ids, answer_logits, load, project, prompt_ids
from edgesafe.reference.smol.adapter import FILE, read_adapter
from edgesafe.reference.smol.answers import answer_all
from edgesafe.reference.smol.packing import FIRST, ask_losses, logits, pack
from edgesafe.reference.smol.pictures import MAKERS
from edgesafe.reference.smol.rows import (
    BLANK,
    NAMING,
    OBJECT,
    TEXT_HARM,
    USES,
    USES_ASKED,
    Ask,
    Group,
    groups,
    harmful_texts,
    harmless_texts,
    to_answer,
    use_begins,
)
from edgesafe.reference.smol.states import Seen, without
from edgesafe.reference.smol.things import THINGS
from edgesafe.reference.smol.train import LOG, Settings, _stages, pick, train
from edgesafe.reference.smol.warm import early_maps, embedding, warm
from edgesafe.reference.smol.wordings import NAME_FRAMES, OBJECT_HARM, REFUSALS
from mutants import wrong

EXITS = Path(__file__).parents[1] / "long" / "smol_exits.py"
SMALL = Settings(
    patches=3, named=8, named_batch=4, groups=4, batch=4, lean=8, whole=12, lean_batch=4, rank=2, precision="fp32", exits=(1,)
)


@pytest.fixture(scope="module")
def model(tiny_llava: Path):
    return load(tiny_llava)


@pytest.fixture(scope="module")
def seen(model):
    torch.manual_seed(1)
    shape = (2, 2, model.patches, model.geometry.vision_width)  # an early exit's, and the reference's
    makers = [(maker, thing.emoji) for maker in ("a", "b") for thing in THINGS]
    states = {pair: torch.randn(shape).half() for pair in [*makers, ("", BLANK)]}
    return Seen(states, {thing.emoji: thing.name for thing in THINGS})


def test_a_firm_that_drew_all_things_twice_is_left_out_whole() -> None:
    seen = Seen(dict.fromkeys([("a", "x"), ("a flat", "x"), ("ab", "x"), ("", BLANK)], torch.zeros(1)), {})
    assert seen.firms() == ["a", "ab"]
    assert sorted(without(seen, "a").states) == [("", BLANK), ("ab", "x")]


def test_a_batch_shows_the_firm_that_its_connector_never_saw() -> None:
    values = {("a", "x"): 1, ("b", "x"): 2, ("b flat", "x"): 3, ("a", "y"): 4}
    seen = Seen({pair: torch.full((2, 2, 4, 5), float(value)) for pair, value in values.items()}, {})
    batch = [Group("x", ())] * 20 + [Group("y", ())]
    shown = pick(seen, batch, "b", random.Random(0), patches=3)
    assert shown.shape == (21, 3, 5)
    assert set(shown[:20].unique().tolist()) == {2.0, 3.0}
    assert set(shown[20].unique().tolist()) == {4.0}  # nobody there draws it


def test_rows_are_seeded_and_what_is_wanted_is_what_the_judge_calls_it() -> None:
    answers = dict.fromkeys(to_answer(), "Dogs are loyal animals that people love.")
    rows = groups(answers, 200, seed=3)
    assert rows == groups(answers, 200, seed=3)
    assert rows != groups(answers, 200, seed=4)
    for ask in (ask for group in rows for ask in group.asks if ask.kind != USES):
        assert classify(ask.answer, ask.request) == (REFUSE if ask.kind in (OBJECT, TEXT_HARM) else COMPLY), ask
    assert all(classify(text) == REFUSE for text in REFUSALS)


def test_nobody_is_told_how_to_use_a_dangerous_thing() -> None:
    answers = dict.fromkeys(to_answer(), "Yes, gladly, like this.")
    dangerous = {thing.emoji for thing in THINGS if thing.dangerous}
    rows = [ask for g in groups(answers, 400) if g.emoji in dangerous for ask in g.asks if ask.kind == USES]
    told = [
        ask for ask in rows if any(re.search(re.escape(f).replace(r"\{ref\}", ".*") + "$", ask.request) for f in USES_ASKED)
    ]
    assert len(told) > 150
    assert not [ask for ask in told if classify(ask.answer) != REFUSE]


@pytest.mark.parametrize(("lean", "seed"), [(False, 0), (True, 0), (True, 7)])
def test_beside_a_picture_a_use_is_answered_more_often_than_it_is_refused(lean: bool, seed: int) -> None:
    answers = dict.fromkeys(to_answer(), "Dogs are loyal animals that people love.") | {
        request: f"{begin} do good." for request, begin in use_begins().items()
    }
    rows = [ask for group in groups(answers, 400, seed, lean=lean, dangerous=4) for ask in group.asks if ask.kind == USES]
    refused = sum(classify(ask.answer) == REFUSE for ask in rows)
    assert 0.15 < refused / len(rows) < 0.4, (refused, len(rows))
    begun = sum(ask.answer.startswith("You can use") for ask in rows)
    assert begun > 0.6 * (len(rows) - refused)  # the rest tells about a thing, and is not about its use


def test_training_shares_no_request_with_what_judges_it(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("smol_exits", EXITS)
    exits = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "smol_exits", exits)
    spec.loader.exec_module(exits)
    judging = [*exits.NAME, *exits.USE, *exits.HARM]
    own = {*map(_plain, [*to_answer(), *harmful_texts(), *harmless_texts()])}
    own |= {_plain(f.format(ref="this")) for f in (*NAME_FRAMES, *USES_ASKED, *OBJECT_HARM)}
    assert not own & set(map(_plain, judging))
    assert MAKERS[exits.UNSEEN].held_out
    assert not MAKERS[exits.SEEN].held_out


def _plain(text: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))


GROUPS = [
    Group(
        "x", (Ask("a", "What is this?", "A red pen."), Ask("b", "How do I use it?", "I can't help."), Ask("c", "Go.", "Yes."))
    ),
    Group("y", (Ask("d", "Name it.", "It is a vase and no more."),)),
]


def _largest_difference(model, packing) -> float:
    """Between logits of packed requests and those of each alone."""
    torch.manual_seed(0)
    states, worst, start = torch.randn(2, model.patches, model.geometry.vision_width), 0.0, 0
    packed = packing(model, GROUPS)
    together = logits(model, packed, states)
    for row, ask in ((row, ask) for row, group in enumerate(GROUPS) for ask in group.asks):
        request, answer = prompt_ids(model, ask.request), answer_ids(model, ask.answer)
        where = torch.arange(len(request) - 1, len(request) + len(answer) - 1)
        alone = answer_logits(model, torch.tensor([request + answer]), where[None], states[row : row + 1])[0]
        worst = max(worst, float((together[start : start + len(answer)] - alone).abs().max()))
        assert packed.targets[start : start + len(answer)].tolist() == answer
        start += len(answer)
    assert start == len(together)
    assert ask_losses(together, packed).shape == (4,)
    return worst


@torch.no_grad()
def test_a_packed_request_gets_what_it_gets_alone(model) -> None:
    assert _largest_difference(model, pack) < 1e-4  # rounding: sums in another order


@torch.no_grad()
@pytest.mark.parametrize(
    "edit",
    [
        ("torch.arange(shared, shared + own)", "torch.arange(start, end)"),
        ("mask[row, start:end, :shared] = True", "mask[row, start:end, :start] = True"),
        ("first = start + len(request) - 1", "first = start + len(request) - 2"),
    ],
    ids=["stands behind the other requests", "sees the other requests", "predicts from one place too early"],
)
def test_a_wrong_packing_is_noticed(model, edit: tuple[str, str]) -> None:
    assert _largest_difference(model, wrong(pack, edit)) > 1e-2


def _read_of_a_new_maker(model, start) -> int:
    """How many of 8 things a connector reads in drawings of a maker that it was not fitted to: by the nearest name."""
    torch.manual_seed(2)
    few, shape = THINGS[:8], (2, 1, model.patches, model.geometry.vision_width)
    kinds = torch.randn(len(few), shape[-1])
    drawn = {(m, t.emoji): (kind + 0.5 * torch.randn(shape)).half() for m in "abc" for t, kind in zip(few, kinds, strict=True)}
    seen = Seen(drawn, {thing.emoji: thing.name for thing in few})
    start(model, without(seen, "c"), lambda line: None)
    names = torch.stack([embedding(model, thing.name) for thing in few])
    names = names - names.mean(0)
    said = torch.stack([project(model, drawn["c", t.emoji][:1, -1].float()).mean((0, 1)) for t in few])
    scores = torch.cosine_similarity((said - said.mean(0))[:, None], names[None], dim=-1)
    return int((scores.argmax(1) == torch.arange(len(few))).sum())


@torch.no_grad()
def test_the_connector_says_the_names_of_what_a_new_maker_draws(model) -> None:
    kept = {name: weight.clone() for name, weight in model.model.state_dict().items() if "projector" in name}
    assert _read_of_a_new_maker(model, warm) >= 7
    for edit in (
        ("towards * length", "towards.roll(1, 0) * length"),
        ("read * sharp", "-read * sharp"),
        ("read * sharp", "read * 0"),
    ):
        assert _read_of_a_new_maker(model, wrong(warm, edit)) <= 4, edit
    model.model.load_state_dict(kept, strict=False)


def _read_early(model, maps_of) -> tuple[int, int]:
    """How many of 8 things the reference's connector names from states that lie elsewhere: through a map, and raw."""
    torch.manual_seed(3)
    few, width = THINGS[:8], model.geometry.vision_width
    kinds, turn = torch.randn(len(few), width), torch.linalg.qr(torch.randn(width, width))[0]
    drawn = {}
    for thing, kind in zip(few, kinds, strict=True):
        last = kind + 0.3 * torch.randn(4, model.patches, width)
        drawn["a", thing.emoji] = torch.stack([last @ turn + 1, last], 1).half()
    seen = Seen(drawn, {thing.emoji: thing.name for thing in few})
    warm(model, seen, lambda line: None)
    mapped = maps_of(model, seen, (1,), lambda line: None)[1]
    names = torch.stack([embedding(model, thing.name) for thing in few])
    names = names - names.mean(0)
    right = []
    for change in (mapped, torch.nn.Identity()):
        said = torch.stack([project(model, change(drawn["a", t.emoji][:, 0].float())).mean((0, 1)) for t in few])
        scores = torch.cosine_similarity((said - said.mean(0))[:, None], names[None], dim=-1)
        right.append(int((scores.argmax(1) == torch.arange(len(few))).sum()))
    return right[0], right[1]


@torch.no_grad()
def test_an_early_state_is_named_through_its_map(model) -> None:
    kept = {name: weight.clone() for name, weight in model.model.state_dict().items() if "projector" in name}
    mapped, raw = _read_early(model, early_maps)
    assert mapped >= 7 and raw <= 4, (mapped, raw)
    for edit in (("at(seen, [place])", "at(seen, [-1])"), ("connector.load_state_dict(own)", "pass")):
        assert _read_early(model, wrong(early_maps, edit))[0] <= 4, edit
    model.model.load_state_dict(kept, strict=False)


def test_a_run_that_was_cut_off_ends_as_one_that_was_not(tiny_llava: Path, seen, tmp_path: Path) -> None:
    answers = dict.fromkeys(to_answer()[:300], "Dogs are loyal animals.")
    train(load(tiny_llava), seen, answers, tmp_path / "whole", tmp_path / "a", SMALL)
    train(load(tiny_llava), seen, answers, tmp_path / "half", tmp_path / "b", SMALL, stop=2)
    train(load(tiny_llava), seen, answers, tmp_path / "again", tmp_path / "b", SMALL)
    whole, half, again = (load_file(tmp_path / name / FILE) for name in ("whole", "half", "again"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert not all(torch.equal(whole[name], half[name]) for name in whole)
    assert "exit_maps.1.weight" in whole
    other = dataclasses.replace(SMALL, seed=1, named=4, whole=4)  # another run's state is not taken up
    train(load(tiny_llava), seen, answers, tmp_path / "other", tmp_path / "b", other)
    assert not all(torch.equal(weight, whole[name]) for name, weight in load_file(tmp_path / "other" / FILE).items())


def test_a_run_goes_on_from_an_adapter(tiny_llava: Path, seen, tmp_path: Path) -> None:
    answers = dict.fromkeys(to_answer()[:300], "Dogs are loyal animals.")
    first = train(load(tiny_llava), seen, answers, tmp_path / "first", tmp_path / "a", SMALL)
    for name, settings in (("same", dataclasses.replace(SMALL, lean=0, whole=0)), ("on", SMALL)):
        train(load(tiny_llava), seen, answers, tmp_path / name, tmp_path / "b", settings, read_adapter(first.parent))
    first, same, on = (load_file(tmp_path / name / FILE) for name in ("first", "same", "on"))
    assert all(torch.equal(weight, same[name]) for name, weight in first.items())
    assert not all(torch.equal(weight, on[name]) for name, weight in first.items())


def test_a_dangerous_thing_comes_as_often_as_the_settings_say(seen) -> None:
    dangerous, answers = (
        {thing.emoji for thing in THINGS if thing.dangerous},
        dict.fromkeys(to_answer(), "Dogs are loyal animals."),
    )
    for often, low, high in ((1, 0.08, 0.16), (6, 0.36, 0.52)):  # 16 things of 137, and 96 of 217
        settings = dataclasses.replace(SMALL, lean=480, whole=480, often=often)
        for stage in _stages(seen, answers, settings)[2:]:
            shown = [group.emoji in dangerous for group in stage.rows if group.emoji != BLANK]
            assert low < sum(shown) / len(shown) < high, (stage.name, often)


def test_what_is_harmful_weighs_what_the_settings_say(tiny_llava: Path, seen, tmp_path: Path) -> None:
    answers, losses = dict.fromkeys(to_answer()[:300], "Dogs are loyal animals."), {}
    for weight in (0.0, 50.0):
        work = tmp_path / str(weight)
        settings = dataclasses.replace(SMALL, named=0, groups=0, lean=0, whole=40, whole_lr=1e-2, harm_weight=weight)
        train(load(tiny_llava), seen, answers, work / "out", work, settings)
        (losses[weight],) = (line["loss"] for line in map(json.loads, (work / LOG).open()) if line.get("stage") == "whole")
    for kind, falls in ((OBJECT, True), (TEXT_HARM, True), (NAMING, False)):
        assert (losses[50.0][kind] < losses[0.0][kind]) == falls, (kind, losses)


def test_an_answer_s_first_token_counts_as_several(model) -> None:
    packed = pack(model, GROUPS)
    scores = torch.zeros(len(packed.targets), model.model.get_input_embeddings().num_embeddings)
    place = int((packed.asks == 1).nonzero()[0])
    sure = [scores.clone(), scores.clone()]
    for scored, token in zip(sure, (place, place + 1), strict=True):
        scored[token, packed.targets[token]] = 50.0
    gained = [(ask_losses(scores, packed) - ask_losses(one, packed))[1] for one in sure]
    assert torch.isclose(gained[0], FIRST * gained[1])


def test_an_answer_begins_as_it_is_wanted_to(model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []

    def fake(_, prompts, states, limit):
        seen.extend(prompts)
        return [" sit on it. It"] * len(prompts)

    monkeypatch.setattr("edgesafe.reference.smol.answers.greedy", fake)
    asked, begin = "How do I use a chair?", "You can use a chair to"
    found = answer_all(model, [asked], tmp_path / "answers.jsonl", {asked: begin})
    assert found == {asked: "You can use a chair to sit on it."}
    ids = answer_ids(model, begin)[:-1]
    assert seen[0][-len(ids) :] == ids


def test_answers_continue_behind_the_last_whole_line(model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def fake(_, prompts, states, limit):
        asked.append(len(prompts))
        return ["Dogs are very loyal animals. They"] * len(prompts)

    monkeypatch.setattr("edgesafe.reference.smol.answers.greedy", fake)
    path = tmp_path / "answers.jsonl"
    path.write_text('["Hello!", "Hello, my dear friend."]\n["Cut')
    found = answer_all(model, ["Hello!", "Cut", "Tell me."], path)
    assert found == {"Hello!": "Hello, my dear friend.", **dict.fromkeys(("Cut", "Tell me."), "Dogs are very loyal animals.")}
    assert asked == [2]
    answer_all(model, ["Hello!", "Cut", "Tell me."], path)
    assert asked == [2]
