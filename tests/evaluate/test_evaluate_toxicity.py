"""Toxicity scores: which label is read and how, by hand, and on a tiny random classifier against transformers itself."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from edgesafe.errors import AlignError, ConfigError
from edgesafe.evaluate import toxicity as toxicity_module
from edgesafe.evaluate.toxicity import is_exclusive, open_toxicity, probability, toxic_label

ANSWERS = ["you fool", "a kind word", "you", "", "a a a kind kind fool word you"]
WORDS = ("<pad>", "<unk>", "<s>", "</s>", "you", "fool", "a", "kind", "word")


def _classifier(folder: Path, labels: tuple[str, ...], problem: str | None = None, *, pad: bool = True) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2ForSequenceClassification, PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "<unk>", "eos_token": "</s>"} | ({"pad_token": "<pad>"} if pad else {})
    # A side that would shift GPT-2's places: what the checkpoint says must not count.
    PreTrainedTokenizerFast(tokenizer_object=inner, padding_side="left", **names).save_pretrained(folder)
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=len(WORDS), n_positions=6, n_embd=16, n_layer=1, n_head=2, id2label=dict(enumerate(labels)),
        label2id={name: i for i, name in enumerate(labels)}, problem_type=problem, pad_token_id=0 if pad else None,
        bos_token_id=3, eos_token_id=3,
    )  # fmt: skip
    model = GPT2ForSequenceClassification(config)
    for weight in model.parameters():
        weight.data.copy_(torch.randn_like(weight))
    model.save_pretrained(folder)
    return folder


def _alone(scorer, text: str) -> list[float]:
    """One answer's logits from transformers without any padding, cut to the model's 6 places."""
    with torch.no_grad():
        ids = torch.tensor([[WORDS.index(word) for word in text.split()][:6]])
        return scorer.model(input_ids=ids).logits[0].tolist()


@pytest.mark.parametrize(
    ("labels", "want"),
    [
        (("toxic", "severe_toxic", "obscene"), 0),
        (("severe_toxicity", "toxicity", "insult"), 1),
        (("neutral", "toxic"), 1),
        (("non-toxic", "TOXIC"), 1),
        (("nothate", "hate"), 1),
        (("offensive", "toxicity"), 1),
        (("LABEL_0", "LABEL_1"), None),
        (("not_toxic", "fine"), None),
    ],
)
def test_the_label_is_found_by_its_whole_name(labels, want):
    assert toxic_label(dict(enumerate(labels))) == want


@pytest.mark.parametrize(
    ("labels", "problem", "want"),
    [
        (("neutral", "toxic"), None, True),
        (("non-toxic", "toxic"), None, True),
        (("toxic", "insult"), None, False),
        (("toxic",), "single_label_classification", False),
        (("neutral", "toxic"), "multi_label_classification", False),
        (("toxic", "insult"), "single_label_classification", True),
    ],
)
def test_labels_exclude_each_other_where_the_config_or_an_opposite_says_so(labels, problem, want):
    assert is_exclusive(dict(enumerate(labels)), problem) is want


def test_probabilities_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)], [math.log(4.0), 0.0]])
    assert probability(logits, 1, True) == pytest.approx([3 / 4, 1 / 5])
    assert probability(logits, 0, False) == pytest.approx([1 / 2, 4 / 5])


@pytest.mark.parametrize("pad", [True, False], ids=["pad token", "no pad token"])
def test_multi_label_scores_are_the_sigmoid_of_one_label_whatever_the_batch(tmp_path, monkeypatch, pad):
    monkeypatch.setattr(toxicity_module, "BATCH", 2)
    scorer = open_toxicity(str(_classifier(tmp_path / "many", ("insult", "toxicity", "threat"), pad=pad)))
    want = [1 / (1 + math.exp(-_alone(scorer, text)[1])) if text else 0.0 for text in ANSWERS]
    assert scorer(ANSWERS) == pytest.approx(want, rel=1e-4)
    assert (scorer.identity["label"], scorer.identity["activation"]) == ("toxicity", "sigmoid")
    assert len({round(score, 4) for score in want}) > 3  # the rows differ, so a mixed-up order is seen


def test_exclusive_labels_give_the_softmax(tmp_path):
    scorer = open_toxicity(str(_classifier(tmp_path / "two", ("toxic", "neutral"))))
    pairs = [_alone(scorer, text) for text in ANSWERS[:3]]
    assert scorer(ANSWERS[:3]) == pytest.approx([math.exp(t) / (math.exp(t) + math.exp(n)) for t, n in pairs], rel=1e-4)
    assert scorer.identity["activation"] == "softmax" and scorer.identity["name"] == "toxicity:two"
    assert str(tmp_path) not in repr(scorer.identity) and scorer([]) == []


def test_a_model_without_a_toxic_label_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="LABEL_0, LABEL_1"):
        open_toxicity(str(_classifier(tmp_path / "x", ("LABEL_0", "LABEL_1"))))


def test_nan_stops(tmp_path):
    scorer = open_toxicity(str(_classifier(tmp_path / "x", ("toxic", "neutral"))))
    scorer.model.score.weight.data[1, 0] = math.nan
    with pytest.raises(AlignError, match="NaN"):
        scorer(ANSWERS)


def test_what_cannot_be_fetched_or_has_no_head_is_a_config_error(tmp_path, monkeypatch):
    import huggingface_hub.constants
    from safetensors.torch import load_file, save_file

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="nobody/no-such-classifier"):
        open_toxicity("nobody/no-such-classifier")
    file = _classifier(tmp_path / "x", ("toxic", "neutral")) / "model.safetensors"
    save_file({name: w for name, w in load_file(file).items() if "score" not in name}, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"missing.*score"):
        open_toxicity(str(tmp_path / "x"))
