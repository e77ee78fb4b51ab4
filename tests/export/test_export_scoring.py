"""What the checkpoint thinks of an answer, piece by piece, is what transformers' whole model thinks of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from edgesafe.format.exits import Exit
from edgesafe_export import export as export_module
from edgesafe_export import parity_answers, scoring
from edgesafe_export import parity_model as parity
from edgesafe_export.export import write
from edgesafe_export.parity_answers import Compared, changed, figures
from edgesafe_export.scoring import Answered, Score, score
from edgesafe_export.skeleton import open_sketch
from mutants import wrong
from tiny_families import NAMES

TOKENS = 5
FP32 = {"vision": "fp32", "text": "fp32"}


def _answered(job, parts, folder) -> list[Answered]:
    """A float bundle's answers to a few requests at every exit, two of them about one picture."""
    write(job, folder, parts, FP32, {})
    rows = parity.probes([], 3, job.family.geometry.image_size)
    with parity.open_session(folder) as session:
        asked = [(row, job.ladder) for row in [*rows, (rows[0][0], "And now?")]]
        return parity_answers.ask(session, asked, TOKENS)


def _pieces(job):
    sketch = open_sketch(job.model_dir)
    return sketch, export_module.trace_pieces(sketch, job.ladder, job.layout)


def _by_transformers(family, one: Answered) -> Score:
    """The oracle: transformers' whole model reads prompt and answer in one go, uncached."""
    ids = torch.tensor([[*one.prompt_ids, *one.ids[:-1]]])
    logits = family.oracle_logits(ids, parity.processed(family, one.image, one.prompt, one.exit), one.exit)
    said = torch.log_softmax(logits[len(one.prompt_ids) - 1 :].double(), dim=-1)
    losses = said.max(dim=-1).values - said[torch.arange(len(one.ids)), torch.tensor(one.ids)]
    bundle = torch.log_softmax(torch.from_numpy(one.logits).double(), dim=-1)
    apart = torch.nn.functional.kl_div(bundle, said, reduction="none", log_target=True).sum(dim=-1)
    return Score(tuple(said.argmax(dim=-1).tolist()), tuple(losses.tolist()), tuple(apart.tolist()))


def _agree(family, answers: Sequence[Answered], found: Sequence[Score]) -> bool:
    for one, ours in zip(answers, found, strict=True):
        theirs = _by_transformers(family, one)
        pairs = ((ours.losses, theirs.losses), (ours.divergence, theirs.divergence))
        if ours.best != theirs.best or not all(np.allclose(*pair, atol=1e-4) for pair in pairs):
            return False
    return True


def _other(one: Answered) -> Answered:
    """An answer that nobody gave, of logits that no model gave."""
    ids = tuple((token + 3) % 200 for token in one.ids)
    return replace(one, ids=ids, logits=np.roll(one.logits, 3, axis=1))


@pytest.mark.parametrize("name", ["llava", *NAMES])
def test_every_family_is_scored_as_by_transformers(cases, tmp_path, name):
    case = cases(name)
    answers = _answered(case.job, case.parts, tmp_path / "b")
    sketch, pieces = _pieces(case.job)
    own = score(sketch, pieces, answers, tmp_path / "own")
    assert _agree(case.family, answers, own)
    assert all(one.ids == ours.best for one, ours in zip(answers, own, strict=True))  # a float bundle's greedy answers
    assert max(max(one.divergence) for one in own) < 1e-6
    other = list(map(_other, answers))
    found = score(sketch, pieces, other, tmp_path / "other")
    assert _agree(case.family, other, found)
    assert min(min(max(one.losses), max(one.divergence)) for one in found) > 0.01  # a hundred times what is called close


@pytest.mark.parametrize("name", ["smolvlm", "llava_next"])
def test_what_exits_see_of_a_picture_is_scored_apart(cases, tmp_path, name):
    job = replace(cases(name).job, ladder=tuple(map(Exit.parse, ("1", "2x1", "2", "3"))))
    answers = [one for one in _answered(job, cases(name).parts, tmp_path / "b")[:8] if one.exit.depth == 2]
    assert {str(one.exit) for one in answers} == {"2x1", "2"}
    assert _agree(job.family, answers, score(*_pieces(job), answers, tmp_path / "s"))


WRONG = [
    (scoring._Reading, "places", ("slice(end - count, end)", "slice(end - count - 1, end - 1)")),
    (scoring._Reading, "places", ("nth + 1", "nth")),
    (scoring._Reading, "order", ("(owner == -1) | (owner == owner[:, None])", "True")),
    (scoring._Reading, "order", ("first, first + len(rest)", "0, len(rest)")),
    (scoring, "_readings", ("one.ids[:-1]", "one.ids[1:]")),
    (scoring, "_readings", ("(picture, one.exit), []", "(picture, 0), []")),
    (scoring.Desk, "features", ("{self.picture_of[number]}_{one.exit.depth}", "0_{one.exit.depth}")),
    (scoring.Desk, "features", ("_{one.exit.depth}", "_{min(self.depths[0])}")),
    (scoring, "_score", ("float_[places, best] - ", "float_[places, best] + ")),
    (scoring, "_score", ("np.exp(float_) * (float_ - bundle)", "np.exp(bundle) * (bundle - float_)")),
    (scoring, "see", ("desk.vision(picture, start)", "desk.vision(0, start)")),
]


@pytest.mark.parametrize("edit", WRONG, ids=[f"{name}: {edit[1]}" for _, name, edit in WRONG])
def test_wrong_scores_are_seen(job, parts, tmp_path, monkeypatch, edit):
    module, name, change = edit
    answers = list(map(_other, _answered(job, parts, tmp_path / "b")))
    sketch, pieces = _pieces(job)
    assert _agree(job.family, answers, score(sketch, pieces, answers, tmp_path / "right"))
    monkeypatch.setattr(module, name, wrong(getattr(module, name), change))
    assert not _agree(job.family, answers, score(sketch, pieces, answers, tmp_path / "wrong"))


def test_an_answer_may_hold_the_image_token(job, parts, tmp_path):
    one = _answered(job, parts, tmp_path / "b")[0]
    answers = [replace(one, ids=(first, *one.ids[1:])) for first in (7, job.family.geometry.image_token_id)]
    plain, odd = score(*_pieces(job), answers, tmp_path / "states")
    assert plain.best[0] == odd.best[0] and plain.losses[0] != odd.losses[0]


def test_standalone_exits_are_scored_alike(job, parts, standalone_parts, tmp_path):
    answers = _answered(job, parts, tmp_path / "b")
    found = [score(*_pieces(one), answers, tmp_path / one.layout) for one in (job, replace(job, layout="standalone"))]
    for chain, alone in zip(*found, strict=True):
        assert chain.best == alone.best and np.allclose(chain.losses, alone.losses, atol=1e-4)


def test_the_states_of_a_picture_do_not_pile_up(job, parts, tmp_path):
    answers = [one for one in _answered(job, parts, tmp_path / "b") if one.exit == Exit(3)]
    score(*_pieces(job), answers, tmp_path / "states")
    kept = {path.name.split("_")[-1] for path in (tmp_path / "states").glob("vision_*")}
    assert kept == {"3.npy"}  # the exit's own state alone, of three depths


def _compared(ids: Sequence[int], best: Sequence[int], losses, divergence, text: str) -> Compared:
    answered = Answered(None, "What is this?", Exit(2), None, (1,), tuple(ids), text, np.zeros((2, 9)))
    return Compared(answered, Score(tuple(best), tuple(losses), tuple(divergence)), "A red cup.", whole=True)


SAME = _compared([5, 2], [5, 2], [0.0, 0.0], [0.01, 0.0], "A red cup.")
NEAR = _compared([6, 2], [5, 2], [0.5, 0.0], [0.2, 0.01], "A red mug.")
FAR = _compared([7, 8], [5, 2], [9.5, 6.0], [7.09, 4.0], "I'm sorry, I can't help with that.")


def test_figures_by_hand():
    found = figures([SAME, NEAR, FAR])["2"]
    assert found["equal"] == pytest.approx(1 / 3, abs=1e-4) and found["same_class"] == pytest.approx(2 / 3, abs=1e-4)
    assert found["token_agreement"] == 0.5 and found["token_loss"] == pytest.approx(16 / 6, abs=1e-4)
    assert found["divergence"] == pytest.approx((0.01 + 0.2 + 7.09) / 3, abs=1e-4)
    assert found["kept"] == pytest.approx(2 / 3, abs=1e-4) and found["diverged_tokens"] == pytest.approx(2 / 6, abs=1e-4)


def test_what_is_refused_names_the_requests_and_both_answers():
    why = changed([SAME, FAR, NEAR])
    assert why.startswith("exit 2 keeps 67 % of its answers, below 90 %: 'What is this?': ")
    assert why.endswith("\"I'm sorry, I can't help with that.\" in place of 'A red cup.'")


# A long answer of which one token diverges a lot, and one of which a few diverge a little.
TURNED = _compared([5] * 100, [5] * 100, [0.0] * 100, [3.0] + [0.0] * 99, "A red cup.")
WORN = _compared([5] * 100, [5] * 100, [0.0] * 100, [0.4] * 2 + [0.0] * 98, "A red cup.")
PLAIN = _compared([5] * 100, [5] * 100, [0.0] * 100, [0.0] * 100, "A red cup.")


def test_each_limit_is_held():
    assert changed([PLAIN] * 9 + [TURNED]) == "" and changed([PLAIN] * 10 + [WORN] * 10) == ""
    assert "keeps 80 % of its answers, below 90 %" in changed([PLAIN] * 8 + [TURNED] * 2)
    assert "2.0 % of its tokens diverge, not below 1.5 %" in changed([WORN] * 10)
