"""A tiny GPT-2 with its tokenizer, and a toy preference that it can learn."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

from edgesafe.align.reward.train import RewardTraining

NOUNS = ["pen", "vase", "lamp", "bowl", "coin", "drum", "fork", "gate", "harp", "iron", "jar", "kite"]
WORDS = ["it", "is", "a", "red", "blue", "old", "new", "big", "thing", "that", "I", "know", "of", "and", "like"]
LIKED = "gladly"


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
