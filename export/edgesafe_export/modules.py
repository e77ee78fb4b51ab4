"""The pieces that are exported, as torch modules over the checkpoint's own weights.

T vision tokens with CLS, W tower width, N image tokens of a picture or tile, D text width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


class Segment(nn.Module):
    """A run of blocks; the first segment also embeds the picture. pixel_values or hidden_states -> [1, T, W]."""

    def __init__(self, blocks: Sequence[nn.Module], embeddings: nn.Module | None, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.embeddings, self.norm_before_blocks = embeddings, norm
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Pixel values [1, 3, H, W] of the first segment, else hidden states [1, T, W], to hidden states."""
        if self.embeddings is not None:
            x = self.embeddings(x)
        if self.norm_before_blocks is not None:
            x = self.norm_before_blocks(x)
        for block in self.blocks:
            out = block(x, attention_mask=None)
            x = out[0] if isinstance(out, tuple) else out
        return x


class MaskedEmbeddings(nn.Module):
    """Embeddings that place their patches by a mask, for a picture that fills its square: pixel_values -> [1, T, W].

    The places are transformers' own, taken once from its module: it finds them by comparing fractions, which an ONNX graph
    need not do at each run.
    """

    patches: nn.Module
    positions: nn.Module
    places: Tensor

    def __init__(self, embeddings: nn.Module, side: int, patch: int) -> None:
        super().__init__()
        seen: list[Tensor] = []
        self.patches = embeddings.get_submodule("patch_embedding")
        self.positions = embeddings.get_submodule("position_embedding")
        hook = self.positions.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            with torch.no_grad():
                everywhere = torch.ones(1, side // patch, side // patch, dtype=torch.bool)
                embeddings(pixel_values=torch.zeros(1, 3, side, side), patch_attention_mask=everywhere)
        finally:
            hook.remove()
        self.register_buffer("places", seen[0], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Pixel values [1, 3, H, W] to the tower's first state [1, T, W]."""
        embedded: Tensor = self.patches(x).flatten(2).transpose(1, 2) + self.positions(self.places)
        return embedded


class ExitMap(nn.Module):
    """What one exit runs between its blocks and the shared head: hidden_states [1, T, W] -> [1, T, W], token by token."""

    def __init__(self, steps: Sequence[nn.Module]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [1, T, W] as the exit's blocks leave them, to what the head reads."""
        for step in self.steps:
            x = step(x)
        return x


class Head(nn.Module):
    """What follows an exit: hidden_states [1, T, W] -> image_features [N, D], one row more where there is a newline.

    The first `drop` tokens are dropped; the norm, where there is one, and the projector run; the newline's row is added.
    """

    def __init__(
        self, projector: nn.Module, drop: int, norm: nn.Module | None = None, newline: nn.Parameter | None = None
    ) -> None:
        super().__init__()
        self.projector, self.drop, self.norm, self.newline = projector, drop, norm, newline

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [1, T, W] to image features [N, D]."""
        x = x[:, self.drop :]
        out = self.projector(x if self.norm is None else self.norm(x))[0]
        return out if self.newline is None else torch.cat([out, self.newline[None]])


class FewerTokens(nn.Module):
    """What an exit with fewer visual tokens runs last: image_features [N, D] -> [n, D], means over windows of the square."""

    def __init__(self, side: int, windows: Sequence[tuple[int, int]]) -> None:
        """Take the square's side s, and which of it each of the t tokens of a side is the mean of (`pool_windows`)."""
        super().__init__()
        self.side, self.windows = side, windows

    def forward(self, x: Tensor) -> Tensor:
        """Image features [s x s, D] to their means [t x t, D]: over rows, then over columns."""
        rows = torch.stack([part.mean(0) for part in self._parts(x.reshape(self.side, self.side, -1))])
        return torch.stack([part.mean(0) for part in self._parts(rows.movedim(1, 0))], 1).flatten(0, 1)

    def _parts(self, x: Tensor) -> Iterator[Tensor]:
        return (x[first:end] for first, end in self.windows)


class Whole(nn.Module):
    """A standalone exit: segment 0..d, the exit's map and the head in one. pixel_values -> image_features [N, D]."""

    def __init__(self, segment: Segment, head: Head, exit_map: ExitMap | None = None) -> None:
        super().__init__()
        self.segment, self.head, self.exit_map = segment, head, exit_map

    def forward(self, x: Tensor) -> Tensor:
        """Pixel values [1, 3, H, W] to image features [N, D]."""
        x = self.segment(x)
        features: Tensor = self.head(x if self.exit_map is None else self.exit_map(x))
        return features
