"""The learned reward and its trainer on a tiny GPT-2: the loss, padding, balance, a toy preference, resume, bad input."""

from __future__ import annotations

import gzip
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgesafe import cli
from edgesafe.align import files, reward_train
from edgesafe.align.preferences import Pair, in_validation, parse_dialogue, read_pairs, render
from edgesafe.align.reward import word_f1
from edgesafe.align.reward_model import MODEL_SHARE, ModelReward, balance, encode, open_model_reward, read_scores
from edgesafe.align.reward_train import RewardTraining, draw_pairs, pair_loss, train_reward_model
from edgesafe.bundle import digest_folder, sha256_file
from edgesafe.certify.suite import Row
from edgesafe.errors import AlignError, ConfigError, DivergedError, InputError

NOUNS = ["pen", "vase", "lamp", "bowl", "coin", "drum", "fork", "gate", "harp", "iron", "jar", "kite"]
WORDS = ["it", "is", "a", "red", "blue", "old", "new", "big", "thing", "that", "I", "know", "of", "and", "like"]
LIKED = "gladly"
ROOT = Path(__file__).resolve().parents[2]


def make_gpt2(folder: Path, *, head: bool = False) -> Path:
    """A GPT-2 of 2 layers and width 32 whose tokenizer has an end token and no pad token, as GPT-2's own."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = ["<unk>", "<|endoftext|>", "Human:", "Assistant:", "tell", "me", "about", LIKED, *NOUNS, *WORDS]
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokens, unk_token="<unk>", eos_token="<|endoftext|>", model_max_length=64
    ).save_pretrained(folder)
    config = GPT2Config(
        vocab_size=len(words), n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1, num_labels=1
    )
    torch.manual_seed(0)
    (GPT2ForSequenceClassification if head else GPT2LMHeadModel)(config).save_pretrained(folder)
    if head:  # what a finished reward model says of its padding
        text = (folder / "config.json").read_text()
        (folder / "config.json").write_text(json.dumps({**json.loads(text), "pad_token_id": 1}))
    return folder


def toy(n: int, seed: int = 0) -> list[dict[str, str]]:
    """Pairs of answers of which the liked one has the word LIKED somewhere; nothing else tells them apart."""
    rng = random.Random(seed)
    pairs = []
    for _ in range(n):
        chosen, rejected = (rng.choices(WORDS, k=rng.randint(3, 7)) for _ in range(2))
        chosen.insert(rng.randint(0, len(chosen)), LIKED)
        prompt = f"tell me about {' '.join(rng.choices(NOUNS, k=3))}"
        pairs.append({"prompt": prompt, "chosen": " ".join(chosen), "rejected": " ".join(rejected)})
    return pairs


def write_lines(path: Path, pairs: list) -> Path:
    path.write_text("".join((p if isinstance(p, str) else json.dumps(p)) + "\n" for p in pairs), encoding="utf-8")
    return path


SMALL = RewardTraining(lr=3e-3, batch_size=8, val_share=0.2, max_length=64)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_gpt2(tmp_path_factory.mktemp("base") / "gpt2")


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    return make_gpt2(tmp_path_factory.mktemp("scorer") / "reward", head=True)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", toy(160))


@pytest.fixture(scope="module")
def learnt(base, tmp_path_factory):
    """The toy preference, learnt; with its record and the seconds it took."""
    folder = tmp_path_factory.mktemp("learnt")
    data, began = write_lines(folder / "pairs.jsonl", toy(600)), time.perf_counter()
    record = train_reward_model(str(base), data, replace(SMALL, epochs=6, batch_size=16), folder / "out")
    return folder / "out", record, time.perf_counter() - began


@pytest.fixture(scope="module")
def whole(base, pairs, tmp_path_factory):
    """An uninterrupted run of 16 updates, to which resumed ones are compared."""
    out = tmp_path_factory.mktemp("whole") / "out"
    train_reward_model(str(base), pairs, SMALL, out)
    return out


# The loss.

CHOSEN, REJECTED = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 1.0])
# Margins 2 and -1: log(1 + e^-2) = 0.126928, log(1 + e^1) = 1.313262, mean 0.720095.
BY_HAND = (math.log1p(math.exp(-2)) + math.log1p(math.exp(1))) / 2


def test_the_loss_by_hand():
    assert pytest.approx(0.720095, abs=1e-6) == BY_HAND  # as worked out above
    assert pair_loss(CHOSEN, REJECTED).item() == pytest.approx(BY_HAND, rel=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda win, lose: pair_loss(lose, win),
        lambda win, lose: torch.nn.functional.logsigmoid(win - lose).mean(),
        lambda win, lose: -torch.sigmoid(win - lose).mean(),
        lambda win, lose: -torch.nn.functional.logsigmoid(win - lose).sum(),
    ],
    ids=["chosen and rejected swapped", "sign flipped", "no logarithm", "sum, not mean"],
)
def test_a_wrong_loss_is_seen(wrong):
    assert wrong(CHOSEN, REJECTED).item() != pytest.approx(BY_HAND, rel=0.05)


def test_the_gradient_pushes_the_chosen_up_and_the_rejected_down():
    win, lose = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    pair_loss(win, lose).backward()
    assert (win.grad.item(), lose.grad.item()) == (-0.5, 0.5)  # -(1 - sigmoid(0))


def test_a_huge_margin_is_still_finite():
    assert pair_loss(torch.tensor([-1e4]), torch.tensor([1e4])).item() == pytest.approx(2e4)


# Scores: the last token's, however it is padded.


def _dialogues(reward):
    return [encode(reward.tokenizer, (("user", "tell me about pen"), ("assistant", a))) for a in ("it", "a big red thing", "")]


def _open(scorer, **changes) -> ModelReward:
    return open_model_reward(str(scorer), **{"harmlessness": 5.0, "helpfulness": 1.0, **changes})


@torch.no_grad()
def _hidden_scores(model, ids):
    """The head on every position of one unpadded dialogue, without transformers' choice of a position: [tokens]."""
    return model.score(model.transformer(torch.tensor([ids])).last_hidden_state)[0, :, 0]


def test_scores_are_the_last_tokens_alone_and_batched(scorer):
    reward = _open(scorer)
    ids = _dialogues(reward)
    assert len(set(map(len, ids))) == 3 and reward.model.config.pad_token_id == reward.tokenizer.pad_token_id == 1
    with torch.no_grad():
        batched, alone = read_scores(reward.model, ids), torch.cat([read_scores(reward.model, [one]) for one in ids])
    want = torch.stack([_hidden_scores(reward.model, one)[-1] for one in ids])
    torch.testing.assert_close(batched, alone, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(batched, want, rtol=1e-4, atol=1e-6)


def test_the_pad_token_read_instead_of_the_last_is_seen(scorer):
    reward = _open(scorer)
    short, long, _ = _dialogues(reward)
    reward.model.config.pad_token_id = 0  # the model takes the padding below for text
    mistaken = torch.full((1, len(long)), 1)
    mistaken[0, : len(short)] = torch.tensor(short)
    with torch.no_grad():
        wrong = reward.model(input_ids=mistaken, attention_mask=(mistaken != 1).long()).logits[0, 0]
    assert not torch.allclose(wrong, _hidden_scores(reward.model, short)[-1], rtol=1e-2)
    assert not torch.allclose(_hidden_scores(reward.model, short)[-2], _hidden_scores(reward.model, short)[-1], rtol=1e-2)


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

        monkeypatch.setattr("edgesafe.align.reward_model.encode", remember)

        def scores(model, ids):
            batch = [said.pop(0) for _ in ids]
            return torch.tensor([say(answer) for answer in batch])

        monkeypatch.setattr("edgesafe.align.reward_model.read_scores", scores)


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
    monkeypatch.setattr("edgesafe.align.reward_model.word_f1", lambda *_: 1.0)
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


# The trainer.


def test_a_toy_preference_is_learnt(learnt):
    out, record, seconds = learnt
    assert record["val"]["accuracy"] > 0.9 and record["val"]["loss"] < 0.3 and record["pairs"]["val"] > 60
    assert seconds < 30
    fresh = toy(200, seed=9)
    reward = _open(out)
    rows = [Row(str(i), "harmful", "x", None, p["prompt"], p["chosen"], (), "t", False) for i, p in enumerate(fresh)]
    lost = reward(rows, [p["rejected"] for p in fresh])
    assert sum(value < 1 for value in lost) > 180  # the chosen answer earns 1, so r(rejected) < r(chosen) in > 90 %


@pytest.mark.parametrize("mutant", ["sign flipped", "chosen and rejected swapped", "first token read"])
def test_a_wrong_trainer_does_not_learn_it(base, tmp_path, monkeypatch, mutant):
    real_loss, real_scores = pair_loss, read_scores
    if mutant == "sign flipped":
        monkeypatch.setattr(reward_train, "pair_loss", lambda win, lose: -real_loss(win, lose))
    elif mutant == "first token read":
        monkeypatch.setattr(reward_train, "read_scores", lambda model, ids: real_scores(model, [row[:1] for row in ids]))
    elif mutant == "chosen and rejected swapped":
        monkeypatch.setattr(reward_train, "pair_loss", lambda win, lose: real_loss(lose, win))
    data = write_lines(tmp_path / "p.jsonl", toy(300))
    record = train_reward_model(str(base), data, replace(SMALL, epochs=4), tmp_path / "out")
    assert record["val"]["accuracy"] < 0.6


def test_the_record_says_where_it_comes_from(base, learnt):
    out, record, _ = learnt
    kept = json.loads((out / "edgesafe.json").read_text())
    assert kept == record and kept["step"] == "reward-model" and kept["seed"] == 0 and "torch" in kept["versions"]
    assert kept["parent"] == {"kind": "checkpoint", "name": "gpt2", "digest": digest_folder(base)}
    assert kept["data"] == sha256_file(out.parent / "pairs.jsonl") and kept["config"]["epochs"] == 6
    assert not out.with_name("out.partial").exists()
    assert {p.name for p in out.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "metrics.jsonl",
        "edgesafe.json",
    }


def _metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_best_weights_are_kept_not_the_last(base, tmp_path, monkeypatch):
    # Beyond the third look the validation loss is made to rise.
    real, seen = reward_train.look, []

    def worse(run):
        seen.append([p.detach().clone() for p in run.params])
        return {**real(run), "loss": abs(len(seen) - 3) + 0.5}

    monkeypatch.setattr(reward_train, "look", worse)
    record = train_reward_model(str(base), write_lines(tmp_path / "p.jsonl", toy(100)), SMALL, tmp_path / "out")
    looks = [line for line in _metrics(tmp_path / "out") if "val" in line]
    assert len(seen) == len(looks) > 4 and record["val"]["update"] == looks[2]["update"] + 1
    kept = dict(_model(tmp_path / "out").named_parameters())
    assert all(torch.equal(a, b) for a, b in zip(kept.values(), seen[2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(kept.values(), seen[-1], strict=True))


def _model(folder):
    return open_model_reward(str(folder), harmlessness=1.0, helpfulness=1.0).model


def _same(a: Path, b: Path) -> bool:
    x, y = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def _untimed(folder):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in _metrics(folder)]


def _cut(monkeypatch, base, pairs, out, call: int, error=KeyboardInterrupt, factor=None):
    """Runs until the `call`-th loss, which raises, or is multiplied by `factor`."""
    real, calls = reward_train.pair_loss, []

    def broken(win, lose):
        calls.append(win.requires_grad)
        if sum(calls) == call and win.requires_grad:
            if factor is None:
                raise error
            return real(win, lose) * factor
        return real(win, lose)

    with monkeypatch.context() as patch:
        patch.setattr(reward_train, "pair_loss", broken)
        with pytest.raises(error):
            train_reward_model(str(base), pairs, SMALL, out)


def test_resume_ends_with_the_same_weights(base, pairs, whole, tmp_path, monkeypatch):
    _cut(monkeypatch, base, pairs, tmp_path / "cut", 8)
    assert not (tmp_path / "cut").exists() and 0 < files.done_updates(tmp_path / "cut.partial") < 8
    with (tmp_path / "cut.partial" / "metrics.jsonl").open("a") as file:
        file.write('{"update": 8, "los')
    train_reward_model(str(base), pairs, SMALL, tmp_path / "cut", resume=True)
    assert _same(whole, tmp_path / "cut") and _untimed(whole) == _untimed(tmp_path / "cut")


def test_resume_after_a_kill_ends_with_the_same_weights(base, pairs, whole, tmp_path):
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "edgesafe.cli", "reward-model", str(base), "--data", str(pairs), "--out", str(out)]
    command += ["--lr", "3e-3", "--batch-size", "8", "--val-share", "0.2", "--max-length", "64"]
    slow = "import edgesafe.align.reward_train as r, time, sys; real = r.pair_loss\n"
    slow += "r.pair_loss = lambda win, lose: (time.sleep(0.3), real(win, lose))[1]\n"
    slow += "from edgesafe.cli import main; main(sys.argv[1:])"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([sys.executable, "-c", slow, *command[3:]], env=env, stderr=subprocess.DEVNULL)
    partial = out.with_name("killed.partial")
    for _ in range(600):
        if (partial / files.CHECKPOINT).is_file():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not out.exists()
    done = subprocess.run([*command, "--resume", "--json"], env=env, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["val"] == json.loads((out / "edgesafe.json").read_text())["val"]
    assert _same(whole, out) and _untimed(whole) == _untimed(out)


def test_a_resume_that_forgets_the_optimizer_is_seen(base, pairs, whole, tmp_path, monkeypatch):
    _cut(monkeypatch, base, pairs, tmp_path / "cut", 8)
    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", lambda *_: None)
    train_reward_model(str(base), pairs, SMALL, tmp_path / "cut", resume=True)
    assert not _same(whole, tmp_path / "cut")


def test_the_seed_decides_and_another_one_differs(base, pairs, whole, tmp_path):
    train_reward_model(str(base), pairs, SMALL, tmp_path / "again")
    train_reward_model(str(base), pairs, replace(SMALL, seed=1), tmp_path / "other")
    assert _same(whole, tmp_path / "again") and not _same(whole, tmp_path / "other")


def test_another_run_can_not_be_resumed(base, pairs, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="nothing to resume"):
        train_reward_model(str(base), pairs, SMALL, tmp_path / "cut", resume=True)
    assert list(tmp_path.iterdir()) == []
    _cut(monkeypatch, base, pairs, tmp_path / "cut", 8)
    with pytest.raises(ConfigError, match="config differ"):
        train_reward_model(str(base), pairs, replace(SMALL, lr=1e-3), tmp_path / "cut", resume=True)
    other = write_lines(tmp_path / "p.jsonl", toy(160, seed=1))
    with pytest.raises(ConfigError, match="data"):
        train_reward_model(str(base), other, SMALL, tmp_path / "cut", resume=True)


@pytest.mark.parametrize("factor", [math.nan, math.inf], ids=str)
def test_a_diverged_run_stops_and_keeps_its_last_good_checkpoint(base, pairs, tmp_path, monkeypatch, factor):
    _cut(monkeypatch, base, pairs, tmp_path / "out", 8, error=DivergedError, factor=factor)
    assert not (tmp_path / "out").exists()
    state = torch.load(tmp_path / "out.partial" / files.CHECKPOINT, weights_only=True)
    assert 0 < state["done"] < 8 and all(torch.isfinite(p).all() for p in state["params"])


def test_a_base_with_a_head_of_other_labels_gets_a_new_one(scorer, pairs, tmp_path):
    from transformers import GPT2ForSequenceClassification

    folder = Path(shutil.copytree(scorer, tmp_path / "two"))
    GPT2ForSequenceClassification.from_pretrained(scorer, num_labels=2, ignore_mismatched_sizes=True).save_pretrained(folder)
    model, _ = reward_train.open_base(str(folder))
    assert tuple(model.score.weight.shape) == (1, 32)
    trained, _ = reward_train.open_base(str(scorer))
    assert torch.equal(trained.score.weight, load_file(scorer / "model.safetensors")["score.weight"])


def test_every_pair_is_seen_once_an_epoch():
    config = RewardTraining(batch_size=4, epochs=2)
    drawn = [i for number in range(5) for i in draw_pairs(config, 10, number)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10)) and drawn[:10] != drawn[10:]


# The data.


def _ids(turns):
    return [ord(letter) for _, text in turns for letter in text]


HH = "\n\nHuman: What is it?\n\nAssistant: A {}.\n\nHuman: And that?\n\nAssistant: A {}."


@pytest.mark.parametrize(
    ("line", "prompt", "chosen"),
    [
        ({"prompt": "What?", "chosen": "pen", "rejected": "cup"}, "What?", "What?pen"),
        (
            {"chosen": HH.format("pen", "cup"), "rejected": HH.format("pen", "jar")},
            "What is it?",
            "What is it?A pen.And that?A cup.",
        ),
        (
            {"prompt": "\n\nHuman: What?\n\nAssistant:", "chosen": " A pen.", "rejected": " A cup.", "source": "x"},
            "What?",
            "What?A pen.",
        ),
    ],
    ids=["prompt", "HH-RLHF", "HH-RLHF with the prompt apart"],
)
@pytest.mark.parametrize("packed", [False, True])
def test_the_shapes_of_a_line(tmp_path, line, prompt, chosen, packed):
    path = write_lines(tmp_path / "p.jsonl", [line])
    if packed:
        (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
        path = tmp_path / "p.jsonl.gz"
    [pair], skipped = read_pairs(path, _ids, 100)
    assert skipped == 0 and pair.prompt == prompt and "".join(map(chr, pair.chosen)) == chosen and pair.chosen != pair.rejected


def test_hh_text_comes_out_as_it_went_in(scorer):
    text = HH.format("pen", "cup")
    assert render(_open(scorer).tokenizer, parse_dialogue(text)) == text
    assert parse_dialogue("\n\nHuman: What is it?") is None and parse_dialogue("pen\n\nAssistant: A pen.") is None


def test_the_split_goes_by_prompt_and_not_by_row(base, tmp_path):
    data = [{**pair, "prompt": f"tell me about {NOUNS[i % 12]}"} for i, pair in enumerate(toy(240))]
    run = reward_train.prepare(str(base), write_lines(tmp_path / "p.jsonl", data), replace(SMALL, val_share=0.3))
    asked = [{p.prompt for p in part} for part in (run.train, run.val)]
    assert asked[0] and asked[1] and not asked[0] & asked[1] and len(run.train) + len(run.val) == 240
    turned = reward_train.prepare(str(base), write_lines(tmp_path / "q.jsonl", data[::-1]), replace(SMALL, val_share=0.3))
    assert {p.prompt for p in turned.val} == asked[1]
    share = sum(in_validation(f"{i}", 0.1) for i in range(5000)) / 5000
    assert abs(share - 0.1) < 4 * math.sqrt(0.1 * 0.9 / 5000)


GOOD = {"prompt": "tell me", "chosen": "gladly", "rejected": "it is"}
BAD = {
    "not JSON": ("{", "no JSON"),
    "a list": ("[1]", "table"),
    "a missing key": ({"prompt": "a", "chosen": "gladly"}, "'rejected' is missing"),
    "a misspelt key": ({"prompt": "a", "chosen": "gladly", "rejcted": "it"}, "rejcted"),
    "a number": ({**GOOD, "chosen": 3}, "chosen is the int 3"),
    "an empty answer": ({**GOOD, "chosen": " "}, "empty"),
    "an empty dialogue": ({"chosen": "", "rejected": HH.format("a", "b")}, "empty"),
    "an empty last turn": ({"chosen": HH.format("a", "b") + "\n\nAssistant:", "rejected": HH.format("a", "b")}, "empty"),
    "the same twice": ({**GOOD, "rejected": "gladly"}, "the same"),
    "too long": ({**GOOD, "rejected": "it " * 80}, "too long"),
    "no prompt": ({"chosen": "gladly", "rejected": "it"}, "no prompt"),
    "the same to the tokenizer": ({**GOOD, "chosen": "qqq", "rejected": "zzz"}, "the same"),
    "an empty line": ("", "no JSON"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_line_is_named_and_leaves_nothing(base, tmp_path, what):
    line, names = BAD[what]
    data = write_lines(tmp_path / "p.jsonl", [*toy(40), line, GOOD])
    with pytest.raises(InputError, match=names) as caught:
        train_reward_model(str(base), data, SMALL, tmp_path / "out")
    assert f"{data}:41" in caught.value.where and [p.name for p in tmp_path.iterdir()] == ["p.jsonl"]
    pairs, skipped = read_pairs(data, lambda turns: _words(turns), 64, skip_bad=True)
    assert skipped == 1 and len(pairs) == 41


def _words(turns):
    """Token ids as the tiny tokenizer gives them, near enough: unknown words are one."""
    known = {w: i for i, w in enumerate([*NOUNS, *WORDS, LIKED, "tell", "me", "about"])}
    return [known.get(word, -1) for _, text in turns for word in text.split()]


def test_all_bad_lines_are_counted(base, tmp_path):
    data = write_lines(tmp_path / "p.jsonl", [GOOD, "{", GOOD, *["x"] * 12])
    with pytest.raises(InputError, match="lines 4, 5, 6, 7, 8, 9, 10, 11 and 4 more") as caught:
        train_reward_model(str(base), data, SMALL, tmp_path / "out")
    assert caught.value.where == f"{data}:2"


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe", None], ids=["empty", "blank", "not UTF-8", "no file"])
def test_a_file_that_is_none(base, tmp_path, content):
    data = tmp_path / "p.jsonl"
    if content is not None:
        data.write_bytes(content)
    with pytest.raises(InputError, match=r"p\.jsonl"):
        train_reward_model(str(base), data, SMALL, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"max_length": 65}, ConfigError),
        ({"lr": 0.0}, ConfigError),
        ({"epochs": 0}, ConfigError),
        ({"batch_size": 0}, ConfigError),
        ({"val_share": 1.0}, ConfigError),
        ({"val_share": 1e-9}, InputError),
    ],
    ids=str,
)
def test_settings_out_of_range(base, pairs, tmp_path, changes, error):
    with pytest.raises(error):
        train_reward_model(str(base), pairs, replace(SMALL, **changes), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_command_and_its_exit_codes(base, pairs, tmp_path, capsys):
    words = ["reward-model", str(base), "--data", str(pairs), "--out", str(tmp_path / "out"), "--max-length", "64"]
    assert cli.main([*words, "--val-share", "0.2", "--batch-size", "64"]) == 0
    out, err = capsys.readouterr()
    assert "validation accuracy" in out and str(tmp_path / "out") in out and "reward model 2/2" in err
    assert cli.main(words) == InputError.exit_code and "exists already" in capsys.readouterr().err
    words[1], words[5] = "edgesafe-nobody/no-such-base", str(tmp_path / "new")
    assert cli.main(words) == ConfigError.exit_code
    assert capsys.readouterr().out == "" and not (tmp_path / "new.partial").exists()


def test_no_validation_keeps_the_last_weights(base, pairs, tmp_path):
    record = train_reward_model(str(base), pairs, replace(SMALL, val_share=0.0), tmp_path / "out")
    assert "val" not in record and record["pairs"] == {"train": 160, "val": 0, "skipped": 0}
    assert isinstance(read_pairs(pairs, _words, 64)[0][0], Pair)
