"""The pieces that are exported, as torch modules over the checkpoint's own weights.

T vision tokens with CLS, W tower width, N image tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class Segment(nn.Module):
    """A run of blocks; the first segment also embeds the picture. pixel_values or hidden_states -> [1, T, W]."""

    def __init__(self, blocks: Sequence[nn.Module], embeddings: nn.Module | None, norm: nn.Module | None) -> None:
        super().__init__()
        self.embeddings, self.norm_before_blocks = embeddings, norm
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        if self.embeddings is not None and self.norm_before_blocks is not None:
            x = self.norm_before_blocks(self.embeddings(x))
        for block in self.blocks:
            out = block(x, attention_mask=None)
            x = out[0] if isinstance(out, tuple) else out
        return x


class Head(nn.Module):
    """Drop the first `drop` tokens, then the projector: hidden_states [1, T, W] -> image_features [N, D]."""

    def __init__(self, projector: nn.Module, drop: int) -> None:
        super().__init__()
        self.projector, self.drop = projector, drop

    def forward(self, x: Tensor) -> Tensor:
        return self.projector(x[:, self.drop :])[0]


class Whole(nn.Module):
    """A standalone exit: segment 0..d and the head in one. pixel_values -> image_features [N, D]."""

    def __init__(self, segment: Segment, head: Head) -> None:
        super().__init__()
        self.segment, self.head = segment, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.segment(x))
