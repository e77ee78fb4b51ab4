"""What a family is: where its vision tower and exit sit, what follows the exit, how a picture becomes tokens.

The only module that knows LLaVA-1.5 by name. A second family adds a class like `Llava` and a line in `FAMILIES`.
T tokens with CLS, N image tokens, W tower width, D text width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgesafe.checkpoint import read_checkpoint
from edgesafe.errors import ExportError
from edgesafe.exits import reference_depth


class Segment(nn.Module):
    """Blocks start..end of the tower; the first segment also embeds the picture. pixel_values or hidden_states -> [1, T, W]."""

    def __init__(self, tower: nn.Module, start: int, end: int) -> None:
        super().__init__()
        self.embeddings = tower.embeddings if start == 0 else None
        self.pre_layrnorm = tower.pre_layrnorm if start == 0 else None
        self.blocks = nn.ModuleList(tower.encoder.layers[start:end])

    def forward(self, x: Tensor) -> Tensor:
        if self.embeddings is not None and self.pre_layrnorm is not None:
            x = self.pre_layrnorm(self.embeddings(x))
        for block in self.blocks:
            out = block(x, attention_mask=None)
            x = out[0] if isinstance(out, tuple) else out
        return x


class Head(nn.Module):
    """Drop CLS (select strategy "default"), then the projector: hidden_states [1, T, W] -> image_features [N, D]."""

    def __init__(self, projector: nn.Module, keep_cls: bool) -> None:
        super().__init__()
        self.projector, self.first = projector, 0 if keep_cls else 1

    def forward(self, x: Tensor) -> Tensor:
        return self.projector(x[:, self.first :])[0]


class Whole(nn.Module):
    """A standalone exit: segment 0..d and the head in one. pixel_values -> image_features [N, D]."""

    def __init__(self, segment: Segment, head: Head) -> None:
        super().__init__()
        self.segment, self.head = segment, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.segment(x))


class Llava:
    """LLaVA-1.5: CLIP tower, raw residual state after d blocks (no norm follows), CLS dropped, two-layer MLP, Llama."""

    name = "llava"

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        config = self.model.config
        self.n_blocks = int(config.vision_config.num_hidden_layers)
        self.reference_depth = reference_depth(self.n_blocks, config.vision_feature_layer)
        self.image_size = int(config.vision_config.image_size)
        self.vision_width = int(config.vision_config.hidden_size)
        patches = (self.image_size // int(config.vision_config.patch_size)) ** 2
        self.keep_cls = config.vision_feature_select_strategy == "full"
        self.tokens = patches + 1
        self.image_tokens = self.tokens if self.keep_cls else patches
        self.image_token_id = int(config.image_token_id)
        self.text_config = config.text_config

    def segment(self, start: int, end: int) -> Segment:
        """Blocks start..end."""
        return Segment(self.model.model.vision_tower, start, end).eval()

    def head(self) -> Head:
        """What follows an exit."""
        return Head(self.model.model.multi_modal_projector, self.keep_cls).eval()

    def embed_tokens(self) -> nn.Module:
        """The token embedding."""
        return self.model.get_input_embeddings()

    def decoder(self) -> Any:
        """The language model with its head, as transformers' own causal model over the same weights."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            causal = AutoModelForCausalLM.from_config(self.text_config)
        causal.model, causal.lm_head = self.model.model.language_model, self.model.lm_head
        return causal.eval()

    @torch.no_grad()
    def oracle(self, pixels: Tensor, depth: int) -> Tensor:
        """transformers' own image features at an exit depth, [N, D]: the untruncated model, `vision_feature_layer=depth`."""
        out = self.model.model.get_image_features(pixel_values=pixels, vision_feature_layer=depth)
        out = getattr(out, "pooler_output", out)
        return out[0] if isinstance(out, list | tuple) or out.dim() == 3 else out

    def chat(self) -> tuple[str, str]:
        """Text before and after the user's own, rendered from the checkpoint's chat template."""
        marks = ("@@first mark@@", "@@other mark@@")
        texts = []
        for mark in marks:
            content = [{"type": "image"}, {"type": "text", "text": mark}]
            texts.append(self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
        parts = [t.split(m) for t, m in zip(texts, marks, strict=True)]
        if any(len(p) != 2 for p in parts) or parts[0] != parts[1]:
            raise ExportError(
                "the chat template changes the user's text",
                where="chat_template",
                expected="text inserted as it is",
                todo="use a template that does not edit what the user says",
            )
        return parts[0][0], parts[0][1]


FAMILIES = {"llava": Llava}


def load_family(folder: Path) -> Llava:
    """Load a checkpoint folder by its family.

    Raises:
        InputError: not a whole checkpoint folder.
        UnsupportedModelError: a family that edgesafe can't cut.
    """
    family, model, processor = read_checkpoint(folder, tuple(FAMILIES))
    return FAMILIES[family](model, processor)
