"""Tiny random checkpoints of the families, in transformers' own layout: a byte a token, tiles of 24 px in patches of 6."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TILE, PATCH, WIDTH, TEXT_WIDTH, BLOCKS = 24, 6, 32, 64, 3
CANVASES = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]
MANY = [[h, w] for h in (24, 48, 72) for w in (24, 48, 72)]
SPECIAL = ["<fake_token_around_image>", "<global-img>", "<|im_start|>", "<|im_end|>", "<end_of_utterance>", "<video>"]
_TURN = "{% for m in messages %}PREFIX{% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}"
_TURN += "{% endif %}{% endfor %}SUFFIX{% endfor %}{% if add_generation_prompt %}ANSWER{% endif %}"
# The words around a question, as the families' published templates have them.
CHATS = {
    "llava_next": ("USER: ", "<image>\n", " ", "ASSISTANT:"),
    "llava_next mistral": ("[INST] ", "<image>\n", " ", "[/INST]"),
    "llava_onevision": ("<|im_start|>user ", "<image>\n", "<|im_end|>", "<|im_start|>assistant\n"),
    "idefics3": ("<|im_start|>User:", "<image>", "<end_of_utterance>\n", "Assistant:"),
    "smolvlm": ("<|im_start|>User:", "<image>", "<end_of_utterance>\n", "Assistant:"),
}
NAMES = tuple(CHATS)
# One square a picture, as LLaVA-1.5 has it; its positions are for more patches than a picture gives.
DINOV2, POSITIONS = "llava dinov2", 6 * PATCH
CHATS[DINOV2] = CHATS["llava_next"]


@dataclass(frozen=True)
class Case:
    """A tiny checkpoint of a family, traced: the export's plan and its float graphs."""

    job: Any
    parts: dict[str, Any]

    @property
    def family(self) -> Any:
        return self.job.family


@contextmanager
def truncated(family: Any, depth: int) -> Iterator[dict[str, int]]:
    """The family's model with no more than `depth` blocks in its tower; yields the arguments to read it at its last one.

    transformers hangs its hooks on the blocks that are there when hidden states are first asked for: not on too few.
    """
    from transformers.utils.output_capturing import maybe_install_capturing_hooks

    tower = family.model.get_submodule(family.recipe.tower)
    maybe_install_capturing_hooks(tower)
    encoder = tower.encoder
    blocks, count = encoder.layers, tower.config.num_hidden_layers
    encoder.layers, tower.config.num_hidden_layers = blocks[:depth], depth
    try:
        yield {family.recipe.reference: -1} if family.recipe.reference else {}
    finally:
        encoder.layers, tower.config.num_hidden_layers = blocks, count


def make_tiny(name: str, folder: Path, seed: int = 0, *, tied: bool = False, **pictures: Any) -> Path:
    """Write a checkpoint of a family; `pictures` replace entries of its preprocessor_config.json.

    `tied` puts one weight behind the embedding and the head, as LLaVA-OneVision-0.5B has it.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    family, folder = name.split()[0], Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = write_text(name, folder)
    config = _config(name, tokenizer)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config)
    for parameter, weight in model.named_parameters():
        if weight.dim() > 1 and "embed_tokens" not in parameter and "lm_head" not in parameter:
            weight.data.mul_(3.0)  # far enough from zero that depths and answers differ
        elif "layernorm" in parameter and weight.dim() == 1:
            weight.data.add_(0.3 * torch.randn_like(weight))  # a norm left out must show
        elif "lambda" in parameter:
            weight.data.mul_(3.0).add_(torch.randn_like(weight))  # likewise a layer scale
    model.save_pretrained(folder)
    made, processor = _pictures(family)
    (folder / "preprocessor_config.json").write_text(json.dumps({**made, **pictures}))
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder


def write_text(name: str, folder: Path, grid: int = 3) -> Any:
    """A family's tokenizer, which is returned, and chat template; `grid` rows and columns of tiles have tokens of their own."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    from handmade import make_tokenizer

    plain = make_tokenizer()
    places = [f"<row_{row}_col_{column}>" for row in range(1, grid + 1) for column in range(1, grid + 1)]
    plain.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*places, *SPECIAL)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token="</s>", pad_token="<|im_end|>", extra_special_tokens={"image_token": "<image>"}
    )
    tokenizer.save_pretrained(folder)
    chat = _TURN
    for key, text in zip(("PREFIX", "IMAGE", "SUFFIX", "ANSWER"), CHATS[name], strict=True):
        chat = chat.replace(key, "{{ " + json.dumps(text) + " }}")
    (folder / "chat_template.jinja").write_text(chat)
    return tokenizer


def picture(width: int = 70, height: int = 40) -> Any:
    """A picture of noise, neither square nor of the tower's size."""
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def edit(folder: Path, file: str, **changes: Any) -> Path:
    """Replace entries of a JSON file of a checkpoint; the folder is returned."""
    path = folder / file
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps({**found, **changes}), encoding="utf-8")
    return folder


def add_tokens(folder: Path, around: str, *, write_bos: bool = False, plain: tuple[str, ...] = ()) -> Path:
    """Let a checkpoint's tokenizer put tokens around a text.

    Args:
        folder: The checkpoint, which is changed in place.
        around: What its post-processor makes of a text `$A`, such as `<s> $A </s>`.
        write_bos: Whether the chat template writes BOS too.
        plain: Tokens to add that are not flagged special.
    """
    from tokenizers import AddedToken, Tokenizer, processors

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<s>", special=True, normalized=False)])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    ends = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(single=around, special_tokens=ends)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    edit(folder, "tokenizer_config.json", bos_token="<s>")
    template = folder / "chat_template.jinja"
    template.write_text(("{{ bos_token }}" if write_bos else "") + template.read_text(encoding="utf-8"), encoding="utf-8")
    return folder


def _config(name: str, tokenizer: Any) -> Any:
    from transformers import AutoConfig

    family, image = name.split()[0], tokenizer.convert_tokens_to_ids("<image>")
    text: dict[str, Any] = {
        "model_type": {"llava_next mistral": "mistral", "llava_onevision": "qwen2"}.get(name, "llama"),
        "vocab_size": 288,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if text["model_type"] == "mistral":
        text["sliding_window"] = None
    tower = {"llava_next": "clip_vision_model", "llava_onevision": "siglip_vision_model", "idefics3": "idefics3_vision"}
    tower["llava"] = "dinov2"
    vision = {
        "model_type": tower.get(family, "smolvlm_vision"),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "image_size": TILE,
        "patch_size": PATCH,
        "num_hidden_layers": BLOCKS + (family in ("llava", "llava_next")),
        "num_attention_heads": 2,
    }
    if family == "llava":
        vision = {**vision, "image_size": POSITIONS, "mlp_ratio": 2}
        del vision["intermediate_size"]
        return AutoConfig.for_model(family, vision_config=vision, text_config=text, image_token_index=image)
    if family in ("idefics3", "smolvlm"):
        return AutoConfig.for_model(family, vision_config=vision, text_config=text, image_token_id=image, scale_factor=2)
    options: dict[str, Any] = {"image_token_index": image, "image_grid_pinpoints": CANVASES}
    if family == "llava_onevision":
        vision["vision_use_head"] = False
        video = tokenizer.convert_tokens_to_ids("<video>")
        options |= {"image_grid_pinpoints": MANY, "vision_aspect_ratio": "anyres_max_2", "video_token_index": video}
    return AutoConfig.for_model(family, vision_config=vision, text_config=text, **options)


def _pictures(family: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The family's preprocessor_config.json and processor_config.json."""
    plain = {"do_convert_rgb": True, "do_normalize": True, "do_pad": True, "do_rescale": True, "do_resize": True}
    plain |= {"rescale_factor": 1 / 255, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    if family in ("idefics3", "smolvlm"):
        kind = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}[family]
        sizes = {"size": {"longest_edge": 3 * TILE}, "max_image_size": {"longest_edge": TILE}, "do_image_splitting": True}
        made = {**plain, **sizes, "image_processor_type": f"{kind}ImageProcessor", "resample": 1}
        return made, {"processor_class": f"{kind}Processor", "image_seq_len": (TILE // PATCH // 2) ** 2}
    if family == "llava":
        sizes = {"size": {"shortest_edge": TILE + 4}, "crop_size": {"height": TILE, "width": TILE}, "do_center_crop": True}
        norm = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
        made = {**plain, **sizes, **norm, "do_pad": False, "image_processor_type": "BitImageProcessor", "resample": 3}
        more = {"patch_size": PATCH, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
        return made, {"processor_class": "LlavaProcessor", "image_token": "<image>", **more}
    if family == "llava_next":
        sizes = {"size": {"shortest_edge": TILE}, "crop_size": {"height": TILE, "width": TILE}, "do_center_crop": True}
        clip = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
        made = {**plain, **sizes, **clip, "image_processor_type": "LlavaNextImageProcessor", "resample": 3}
        made["image_grid_pinpoints"] = CANVASES
        more = {"patch_size": PATCH, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
        return made, {"processor_class": "LlavaNextProcessor", "image_token": "<image>", **more}
    sizes = {"size": {"height": TILE, "width": TILE}, "image_grid_pinpoints": MANY}
    made = {**plain, **sizes, "image_processor_type": "LlavaOnevisionImageProcessor", "resample": 3}
    more = {"num_image_tokens": (TILE // PATCH) ** 2, "vision_aspect_ratio": "anyres_max_2"}
    return made, {"processor_class": "LlavaOnevisionProcessor", "vision_feature_select_strategy": "full", **more}
