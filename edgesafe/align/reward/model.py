"""A learned reward: a sequence-classification model that scores answers, balanced so that refusing everything loses.

The paper's kind is a GPT-2 trained on HH-RLHF (`edgesafe reward-model` trains one). It reads text only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from edgesafe.align.reward.overlap import word_f1
from edgesafe.align.reward.preferences import asked_and_answered, render
from edgesafe.checkpoint.text_models import content_id, context_length, display_name, open_whole, read_errors
from edgesafe.errors import AlignError, ConfigError
from edgesafe.format.suite import Row

# What the model's word weighs on a row that wants an answer, beside the overlap's 1.
MODEL_SHARE = 0.5


@dataclass(frozen=True)
class ModelReward:
    """Scores answers with a reward model, on the scale of `reward.TargetReward`; `open_model_reward` makes one.

    A preference model says only which of two answers to one prompt is better: sigmoid(r(a) - r(b)), Bradley-Terry. So an answer
    is compared with its row's wanted one: lost = max(0, 2 sigmoid(r(wanted) - r(answer)) - 1), from 0 to 1.
    - harmful row: 1 - (1 + harmlessness) lost
    - harmless and task row: 1 - (1 + helpfulness) (1 - F1 + MODEL_SHARE lost) / (1 + MODEL_SHARE), F1 of words with the wanted

    The wanted answer earns 1 and nothing earns more, whatever the model likes. A refusal of a request that wants an answer
    loses at least (1 + helpfulness) (1 - F1) / (1 + MODEL_SHARE), even where the model likes refusals best, so a policy that
    always refuses earns less than one that refuses with the same words where it should. What this can't make up for is a model
    that likes harm as much as a refusal: on harmful rows nothing else speaks.

    model, tokenizer: of transformers, one label, padded on the right and cut on the left. cache: scores of wanted answers.

    Source: reward bounded, and centred on a reference answer: PAR, Fu et al. 2025 (2502.18770).
    Differs: the reference is the row's wanted answer, not one of the untouched policy; nothing is won beyond it; F1 is ours.
    """

    model: Any
    tokenizer: Any
    source: str
    harmlessness: float
    helpfulness: float
    batch_size: int
    identity: dict[str, Any]
    cache: dict[tuple[str, str], float] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """What records and tables call it."""
        return str(self.identity["name"])

    def __call__(self, rows: Sequence[Row], answers: Sequence[str]) -> list[float]:
        """The reward of each answer.

        Args:
            rows: what was asked and what is wanted.
            answers: one per row.

        Raises:
            AlignError: a score is NaN or infinite.
        """
        fresh = list({(row.prompt, row.target): row for row in rows if (row.prompt, row.target) not in self.cache}.values())
        for row, score in zip(fresh, self._scores(fresh, [row.target for row in fresh]), strict=True):
            self.cache[row.prompt, row.target] = score
        scores, weights = self._scores(rows, answers), (self.harmlessness, self.helpfulness)
        return [
            balance(row.cls, score - self.cache[row.prompt, row.target], word_f1(answer, row.target), *weights)
            for row, answer, score in zip(rows, answers, scores, strict=True)
        ]

    def _scores(self, rows: Sequence[Row], answers: Sequence[str]) -> list[float]:
        turns = [asked_and_answered(row.prompt, answer) for row, answer in zip(rows, answers, strict=True)]
        ids = [encode(self.tokenizer, said, context_length(self.model, self.tokenizer)) for said in turns]
        scores: list[float] = []
        for start in range(0, len(ids), self.batch_size):
            with torch.inference_mode():
                scores += read_scores(self.model, ids[start : start + self.batch_size]).tolist()
        for row, score in zip(rows, scores, strict=True):
            if not math.isfinite(score):
                raise AlignError(
                    f"the reward model gives {score}",
                    where=f"{self.source}: row {row.id}",
                    expected="a finite score",
                    todo="use an intact reward model",
                )
        return scores


def balance(cls: str, margin: float, overlap: float, harmlessness: float, helpfulness: float) -> float:
    """The reward of an answer, as `ModelReward` says.

    Args:
        cls: the row's class.
        margin: r(answer) - r(wanted answer).
        overlap: word F1 between the two, 0..1.
        harmlessness: what a wrong answer costs on a harmful row, above 0.
        helpfulness: what it costs on any other row, above 0.

    >>> balance("task", 0.0, 1.0, 5.0, 1.0), balance("task", 100.0, 0.25, 5.0, 1.0), balance("harmful", -100.0, 0.0, 5.0, 1.0)
    (1.0, 0.0, -5.0)
    """
    lost = max(0.0, math.tanh(-margin / 2))  # tanh(x / 2) = 2 sigmoid(x) - 1
    if cls == "harmful":
        return 1 - (1 + harmlessness) * lost
    return 1 - (1 + helpfulness) * (1 - overlap + MODEL_SHARE * lost) / (1 + MODEL_SHARE)


def open_model_reward(source: str, *, harmlessness: float, helpfulness: float, batch_size: int = 16) -> ModelReward:
    """Load a reward model.

    Args:
        source: folder or hub id of a sequence-classification checkpoint with one label.
        harmlessness: what a wrong answer costs on a harmful row, above 0.
        helpfulness: what it costs on any other row, above 0.
        batch_size: answers scored at once.

    Raises:
        InputError: it is an adapter.
        ConfigError: it can't be fetched or read, has several labels or an untrained head, or a weight is not above 0.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    for key, weight in {"harmlessness": harmlessness, "helpfulness": helpfulness, "batch_size": batch_size}.items():
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(f"{key} = {weight} is out of range", where=key, expected="a finite number above 0")
    kind = AutoModelForSequenceClassification
    with read_errors(source, kind):
        labels = AutoConfig.from_pretrained(source).num_labels
        if labels != 1:
            raise ConfigError(
                f"the reward model has {labels} labels",
                where=source,
                expected="a sequence-classification checkpoint with one label",
                todo="train one with `edgesafe reward-model`",
            )
    tokenizer, model = open_whole(kind, source, "a trained reward model, whole", dtype=torch.float32)
    set_padding(model, tokenizer, source)
    weights = {"harmlessness": harmlessness, "helpfulness": helpfulness, "model_share": MODEL_SHARE}
    identity = {
        "name": f"model:{display_name(source)}",
        "kind": "model",
        "source": display_name(source),
        **content_id(source, model),
    }
    identity["balance"] = weights
    return ModelReward(model.eval(), tokenizer, source, harmlessness, helpfulness, batch_size, identity)


def set_padding(model: Any, tokenizer: Any, source: str) -> None:
    """Pad on the right, cut on the left, and let the model know the pad token, by which it finds the last one.

    Raises:
        ConfigError: the tokenizer is empty, has neither a pad nor an end token, or one that the model has no embedding for.
    """
    tokenizer.padding_side, tokenizer.truncation_side = "right", "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not tokenizer("Human", add_special_tokens=False)["input_ids"]:  # what transformers makes of missing tokenizer files
        raise ConfigError("the tokenizer knows no words", where=source, expected="the checkpoint's tokenizer files beside it")
    pad = tokenizer.pad_token_id
    if pad is None or pad >= model.get_input_embeddings().num_embeddings:
        raise ConfigError(f"the pad token is {pad}", where=source, expected="a pad or end token within the vocabulary")
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = pad


def encode(tokenizer: Any, turns: Any, max_length: int | None = None) -> list[int]:
    """Token ids of a dialogue, cut on the left to `max_length`. A chat template brings its own special tokens."""
    text = render(tokenizer, turns)
    cut = max_length is not None
    ids = tokenizer(text, add_special_tokens=not tokenizer.chat_template, truncation=cut, max_length=max_length)["input_ids"]
    return list(ids)


def read_scores(model: Any, ids: Sequence[Sequence[int]]) -> Tensor:
    """Scores of tokenized dialogues.

    Args:
        model: one label, its pad token set.
        ids: token ids, of any lengths.

    Returns:
        [n] float32: what the head says at each dialogue's last token.
    """
    width = max(map(len, ids))
    tokens = torch.full((len(ids), width), model.config.pad_token_id)  # [n, width]
    mask = torch.zeros(len(ids), width, dtype=torch.long)
    for i, row in enumerate(ids):
        tokens[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    logits: Tensor = model(input_ids=tokens.to(model.device), attention_mask=mask.to(model.device)).logits  # [n, 1]
    return logits[:, 0].float()
