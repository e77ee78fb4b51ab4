"""Judges, classifiers, reward models and their bases by their folders: an adapter is refused with what to do, and it works."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from edgesafe.align.reward.model import open_model_reward
from edgesafe.align.reward.train import open_base
from edgesafe.errors import InputError
from edgesafe.evaluate.guard_judge import open_guard
from edgesafe.evaluate.toxicity import open_toxicity
from tiny_reward import make_gpt2


def _reward(source: str) -> object:
    return open_model_reward(source, harmlessness=1.0, helpfulness=1.0)


OPENED = {"guard": open_guard, "toxicity": open_toxicity, "reward": _reward, "base of a reward": open_base}


def _adapter(base: Path, folder: Path, *, classifies: bool) -> Path:
    """A LoRA adapter of a text model, as peft writes it."""
    if classifies:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
    kind = "SEQ_CLS" if classifies else "CAUSAL_LM"
    torch.manual_seed(1)
    get_peft_model(model, LoraConfig(r=2, task_type=kind, init_lora_weights=False)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("what", OPENED)
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside the weights"])
def test_an_adapter_is_refused(tmp_path, what, beside):
    base = make_gpt2(tmp_path / "base", head=what != "guard")
    adapter = _adapter(base, tmp_path / "adapter", classifies=what != "guard")
    if beside:
        shutil.copytree(base, adapter, dirs_exist_ok=True)
    with pytest.raises(
        InputError, match="an adapter lies beside" if beside else "this is an adapter for .*base, not"
    ) as caught:
        OPENED[what](str(adapter))
    assert "merge it first" in caught.value.todo and "ImageTextToText" not in caught.value.todo


def test_a_reward_models_adapter_is_merged_as_the_error_says(tmp_path):
    # From a base without a head, so that the head comes with the adapter.
    base, merged = make_gpt2(tmp_path / "base"), tmp_path / "merged"
    adapter = _adapter(base, tmp_path / "adapter", classifies=True)
    with pytest.raises(InputError) as caught:
        _reward(str(adapter))
    steps = re.findall(r"\w+\.from_pretrained\(.*?\.save_pretrained\(OUT\)", caught.value.todo.partition("merge it first")[2])
    assert len(steps) == 2
    names = {"BASE": base, "ADAPTER": adapter, "DIR": base, "OUT": merged, "LABELS": 1, "PeftModel": PeftModel}
    for step in steps:
        eval(step, vars(transformers) | names)
    ids = torch.tensor([[4, 5, 6]])
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.config.pad_token_id = 1
    wanted = PeftModel.from_pretrained(model, adapter).eval()(input_ids=ids).logits
    found = _reward(str(merged)).model.eval()(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
