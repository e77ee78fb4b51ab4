"""The learned reward on a tiny GPT-2: scores and padding, the balance that makes refusing everything lose, what it refuses."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgesafe.align.objectives.ppo import PpoConfig
from edgesafe.align.reward.model import MODEL_SHARE, ModelReward, balance, encode, open_model_reward, read_scores
from edgesafe.align.reward.overlap import word_f1
from edgesafe.align.reward.preferences import render
from edgesafe.align.settings import AlignConfig, LoraConfig, RewardConfig
from edgesafe.align.train import align
from edgesafe.errors import AlignError, ConfigError
from edgesafe.format.files import digest_folder
from edgesafe.format.suite import Row
from mutants import wrong
from tiny_reward import LIKED, make_gpt2


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    return make_gpt2(tmp_path_factory.mktemp("scorer") / "reward", head=True)


# Scores: the last token's, however it is padded.


def _dialogues(reward):
    return [encode(reward.tokenizer, (("user", "tell me about pen"), ("assistant", a))) for a in ("it", "a big red thing", "")]


def _open(scorer, **changes) -> ModelReward:
    return open_model_reward(str(scorer), **{"harmlessness": 5.0, "helpfulness": 1.0, **changes})


@torch.no_grad()
def _hidden_scores(model, ids):
    """The head on every position of one unpadded dialogue, without transformers' choice of a position: [tokens]."""
    return model.score(model.transformer(torch.tensor([ids])).last_hidden_state)[0, :, 0]


def check_scores(read, reward):
    """The head at each dialogue's last token, as far as 1e-4, alone and in a batch."""
    ids = _dialogues(reward)
    assert len(set(map(len, ids))) == 3 and reward.model.config.pad_token_id == reward.tokenizer.pad_token_id == 1
    with torch.no_grad():
        batched, alone = read(reward.model, ids), torch.cat([read(reward.model, [one]) for one in ids])
    want = torch.stack([_hidden_scores(reward.model, one)[-1] for one in ids])
    torch.testing.assert_close(alone, want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(batched, want, rtol=1e-4, atol=1e-6)


def test_scores_are_the_last_tokens_alone_and_batched(scorer):
    check_scores(read_scores, _open(scorer))


@pytest.mark.parametrize(
    "edit",
    [
        ("(len(ids), width), model.config.pad_token_id)", "(len(ids), width), 0)"),
        ("tokens[i, : len(row)] = torch.tensor(row)", "tokens[i, width - len(row) :] = torch.tensor(row)"),
        ("tokens[i, : len(row)] = torch.tensor(row)", "tokens[i, : len(row) - 1] = torch.tensor(row[:-1])"),
        ("logits[:, 0]", "logits[:, 0].flip(0)"),
    ],
    ids=["the padding read instead of the last token", "padded on the left", "last token cut", "rows turned over"],
)
def test_a_wrong_reading_is_seen(scorer, edit):
    with pytest.raises(AssertionError):
        check_scores(wrong(read_scores, edit), _open(scorer))


def test_a_long_answer_loses_its_beginning_not_its_end(scorer):
    reward = _open(scorer)
    said = (("user", "tell me about pen"), ("assistant", "it is " * 40 + LIKED))
    ids = encode(reward.tokenizer, said, 64)
    assert len(ids) == 64 and reward.tokenizer.decode(ids[-1:]) == LIKED
    assert math.isfinite(reward([ROWS[1]], ["it is " * 500])[0])


def test_a_chat_template_wins_over_the_papers_format(scorer):
    tokenizer = _open(scorer).tokenizer
    turns = (("user", "tell me"), ("assistant", "gladly"))
    assert render(tokenizer, turns) == "\n\nHuman: tell me\n\nAssistant: gladly"
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    assert render(tokenizer, turns) == "<user>tell me<assistant>gladly"


# The balance: whatever the model likes, refusing everything loses.

REFUSAL = "I'm sorry, but I can't help with that."
ROWS = [
    Row("h1", "harmful", "bomb", None, "How do I make this?", REFUSAL, (), "t", False),
    Row("t1", "task", "name", None, "What is it?", "It is a pen.", ("pen",), "t", False),
    Row("o1", "harmless", "draw", None, "How do I draw it?", "Here is how to draw the pen.", (), "t", False),
    Row("h2", "harmful", "bomb", None, "How do I use this?", REFUSAL, (), "t", False),
]
RIGHT = [row.target for row in ROWS]


class Scripted:
    """Scores in place of the model's, by a function of the answer."""

    def __init__(self, monkeypatch, say):
        said: list[str] = []
        real = encode

        def remember(tokenizer, turns, max_length=None):
            said.append(turns[-1][1])
            return real(tokenizer, turns, max_length)

        monkeypatch.setattr("edgesafe.align.reward.model.encode", remember)

        def scores(model, ids):
            batch = [said.pop(0) for _ in ids]
            return torch.tensor([say(answer) for answer in batch])

        monkeypatch.setattr("edgesafe.align.reward.model.read_scores", scores)


def _mean(reward, answers):
    return sum(reward(ROWS, answers)) / len(ROWS)


@pytest.mark.parametrize("weights", [(5.0, 1.0), (1.0, 5.0), (20.0, 0.1)], ids=str)
@pytest.mark.parametrize(
    "say",
    [
        lambda answer: 100.0 if "sorry" in answer else -100.0,
        lambda answer: -100.0 if "sorry" in answer else 100.0,
        lambda answer: 0.0,
        lambda answer: float(len(answer)),
    ],
    ids=["loves refusals", "hates refusals", "says nothing", "counts letters"],
)
def test_refusing_everything_loses_whatever_the_model_likes(scorer, monkeypatch, say, weights):
    Scripted(monkeypatch, say)
    reward = _open(scorer, harmlessness=weights[0], helpfulness=weights[1])
    assert _mean(reward, RIGHT) == pytest.approx(1.0)
    assert _mean(reward, [REFUSAL] * 4) < 1.0 - weights[1] * 0.2


def test_without_the_overlap_a_model_that_loves_refusals_would_win(scorer, monkeypatch):
    Scripted(monkeypatch, lambda answer: 100.0 if "sorry" in answer else -100.0)
    monkeypatch.setattr("edgesafe.align.reward.model.word_f1", lambda *_: 1.0)
    assert _mean(_open(scorer), [REFUSAL] * 4) == pytest.approx(_mean(_open(scorer), RIGHT))


def test_complying_everywhere_loses_with_a_model_that_likes_refusals(scorer, monkeypatch):
    Scripted(monkeypatch, lambda answer: 4.0 if "sorry" in answer else 0.0)
    got = _open(scorer)(ROWS, ["It is a pen."] * 4)
    # On harmful rows r is 4 below the wanted answer's: lost = 2 sigmoid(4) - 1 = 0.964028; 1 - 6 * 0.964028 = -4.784166.
    assert got[0] == got[3] == pytest.approx(-4.784166, abs=1e-5)
    assert got[1] == 1.0 and sum(got) / 4 < 0


@pytest.mark.parametrize(
    ("row", "answer", "margin", "want"),
    [
        # F1("it is a vase", "it is a pen") = 3/4; lost 0: 1 - 2 * (1/4) / 1.5
        (1, "It is a vase.", 0.0, 1 - 2 * 0.25 / 1.5),
        # and lost = 2 sigmoid(1) - 1 = 0.462117 half counted
        (1, "It is a vase.", -1.0, 1 - 2 * (0.25 + 0.5 * 0.462117) / 1.5),
        (0, "It is a vase.", -1.0, 1 - 6 * 0.462117),
        (0, "It is a vase.", 3.0, 1.0),  # nothing is won beyond the wanted answer
    ],
)
def test_the_balance_by_hand(row, answer, margin, want):
    overlap = word_f1(answer, ROWS[row].target)
    assert balance(ROWS[row].cls, margin, overlap, 5.0, 1.0) == pytest.approx(want, abs=1e-5)
    wrong = {
        "sign of the margin": balance(ROWS[row].cls, -margin, overlap, 5.0, 1.0),
        "weights swapped": balance(ROWS[row].cls, margin, overlap, 1.0, 5.0),
        "class ignored": balance("task" if row == 0 else "harmful", margin, overlap, 5.0, 1.0),
    }
    same = {"sign of the margin"} if margin == 0 else {"weights swapped"} if margin == 3.0 else set()
    for name, value in wrong.items():
        assert (value == pytest.approx(want, abs=1e-3)) is (name in same), name


def test_a_reward_is_named_and_stamped_and_says_the_same_twice(scorer):
    reward = _open(scorer, batch_size=3)
    assert reward.name == "model:reward" and str(scorer.parent) not in json.dumps(reward.identity)
    assert reward.identity["kind"] == "model" and reward.identity["digest"] == digest_folder(scorer)
    assert reward.identity["balance"] == {"harmlessness": 5.0, "helpfulness": 1.0, "model_share": MODEL_SHARE}
    answers = ["It is a pen.", "", "gladly", REFUSAL]
    assert reward(ROWS, answers) == reward(ROWS, answers) and reward([], []) == []
    alone = [reward([row], [answer])[0] for row, answer in zip(ROWS, answers, strict=True)]
    assert alone == pytest.approx(reward(ROWS, answers), abs=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_a_score_that_is_not_finite_stops_the_run_and_names_the_row(scorer, monkeypatch, value):
    Scripted(monkeypatch, lambda answer: value if answer == "gladly" else 0.0)
    with pytest.raises(AlignError, match=r"reward: row o1"):
        _open(scorer)(ROWS, ["a", "b", "gladly", "c"])


def _spoil(folder: Path, how: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    if how == "labels":
        config |= {"id2label": {"0": "bad", "1": "good"}, "label2id": {"bad": 0, "good": 1}}
    elif how == "no head":
        del weights["score.weight"]
    elif how == "cut":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:2000])
    elif how == "no tokens":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    (folder / "config.json").write_text(json.dumps(config))
    if how != "cut":
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("how", "names"), [("labels", "2 labels"), ("no head", "score.weight"), ("cut", "read"), ("no tokens", "no words")]
)
def test_a_reward_model_that_can_not_be_used(scorer, tmp_path, how, names):
    _spoil(folder := Path(shutil.copytree(scorer, tmp_path / "odd")), how)
    with pytest.raises(ConfigError, match=names):
        _open(folder)


def test_a_hub_id_that_can_not_be_fetched(tmp_path):
    for source in ("edgesafe-nobody/no-such-reward", str(tmp_path / "no" / "such" / "folder"), "not an id"):
        with pytest.raises(ConfigError, match="fetched or read"):
            _open(source)


@pytest.mark.parametrize("weights", [{"harmlessness": 0.0}, {"helpfulness": math.nan}, {"batch_size": 0}], ids=str)
def test_weights_out_of_range(scorer, weights):
    with pytest.raises(ConfigError, match=next(iter(weights))):
        _open(scorer, **weights)


def test_l_ppo_takes_it_and_records_it(tiny_llava, rows, scorer, tmp_path):
    config = AlignConfig(
        method="l-ppo",
        tune="lora",
        data=str(rows),
        steps=2,
        batch_size=4,
        reference_rows=2,
        lr=1e-4,
        precision="fp32",
        optimizer="adamw",
        lora=LoraConfig(r=4, alpha=8),
        sections={"ppo": PpoConfig(epochs=1, minibatches=1, max_new_tokens=6)},
        reward=RewardConfig(model=str(scorer)),
    )
    out = align(tiny_llava, config, tmp_path / "out")
    record = json.loads((out / "edgesafe.json").read_text())
    assert record["reward"]["name"] == "model:reward" and record["reward"]["digest"] == digest_folder(scorer)
    assert all(-6 <= line["exit_score"] <= 1 for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()))
