"""SmolLM2-135M-Instruct out of its GGUF file: the dequantized decoder, and the tokenizer.

Source: the file's own numbers (Q4_1, the embedding Q8_0), which transformers dequantizes with the package gguf.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

IMAGE = "<image>"
# The token that gives its number to the image token: one of 14 for code and notebooks, which no request or answer holds. The
# vocabulary keeps its 49,152 rows, so that logits can be compared with other engines' one by one.
GIVEN = "<empty_output>"
_SPECIAL = 17  # the file's control tokens come first


def read_decoder(gguf: Path) -> Any:
    """The model as transformers' LlamaForCausalLM in float32."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = read.config.to_dict()
    del config["quantization_config"]  # transformers can't save what it read: the weights go into a fresh model
    for key in ("_name_or_path", "dtype"):  # a path of this machine; and what it was read in, not what it will be stored in
        config.pop(key, None)
    fresh = LlamaForCausalLM(LlamaConfig(**config))
    fresh.load_state_dict(read.state_dict())
    return fresh


def read_tokenizer(gguf: Path) -> Any:
    """The file's tokenizer; its 17 control tokens are special ones."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers' conversion knows no difference between GPT-2's way to split a text and SmolLM's: every digit stands alone.
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.add_special_tokens({"additional_special_tokens": [tokenizer.convert_ids_to_tokens(i) for i in range(_SPECIAL)]})
    return tokenizer


def with_image_token(plain: Any) -> Any:
    """The tokenizer with an image token in the place of one that it does not need."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    table = json.loads(plain.backend_tokenizer.to_str())
    table["model"]["vocab"][IMAGE] = table["model"]["vocab"].pop(GIVEN)
    for token in table["added_tokens"]:
        token["content"] = IMAGE if token["content"] == GIVEN else token["content"]
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        tokenizer_object=Tokenizer.from_str(json.dumps(table)),
        **{f"{name}_token": getattr(plain, f"{name}_token") for name in ("bos", "eos", "unk", "pad")},
        extra_special_tokens={"image_token": IMAGE},
        model_max_length=8192,
        padding_side="left",
    )
