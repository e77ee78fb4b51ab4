"""Matrices as whole numbers in blocks: rounded to nearest, or with each error made up for by the weights behind it (GPTQ).

N outputs, K inputs. A row is cut into blocks along its inputs; each block has a scale, and where it is not symmetric a zero
point. Scales are rounded to float16 before a weight is, so that storing them so costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from edgesafe.errors import ExportError

# Shares of a block's own range that the search tries; the narrowest clips its largest weights and rounds the others finer.
_SHARES = tuple(1 - 0.02 * i for i in range(21))
# Rows at a time: a large vocabulary's head needs no second copy of itself.
_ROWS = 4096
# Columns whose errors are handed on to the ones behind them at once, and what is added to the Hessian's diagonal, as a share
# of its mean; more where float32 can't factor it. Source: Frantar et al. 2023, GPTQ, sections 3.3 (step 2 and 3) and 4.
_COLUMNS = 128
_DAMPING = (0.01, 0.1, 1.0)
# Scales of a matrix are kept in float16 where the largest of them lies in this range; the least number that it holds is then
# thousands of times smaller.
_HALF_RANGE, _LEAST_HALF = (2.0**-13, 65504.0), 2.0**-24


@dataclass(frozen=True)
class Format:
    """How a matrix is stored: bits of a weight, weights of a block, and whether a block's numbers lie evenly around zero."""

    bits: int
    size: int
    symmetric: bool = False

    @property
    def middle(self) -> int:
        """The number that stands for zero in a symmetric block."""
        return int(2 ** (self.bits - 1))

    def bytes(self, inputs: int, outputs: int) -> int:
        """A matrix's bytes, with its scales and zero points.

        >>> Format(4, 32).bytes(64, 10), Format(8, 64, symmetric=True).bytes(64, 10)
        (370, 660)
        """
        blocks = -(-inputs // self.size)
        zeros = 0 if self.symmetric else -(-blocks * self.bits // 8)
        return outputs * (blocks * self.size * self.bits // 8 + 2 * blocks + zeros)


@dataclass(frozen=True)
class Blocked:
    """A matrix in blocks.

    Attributes:
        codes: uint8 [N, blocks, size], one number a weight; the last block is filled up with zeros of the matrix.
        scales: float32 [N, blocks].
        zeros: uint8 [N, blocks], the number that stands for zero; None where that is the middle.
    """

    format: Format
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None

    def packed(self) -> np.ndarray:
        """`codes` as they are stored [N, blocks, size x bits / 8]; of two 4-bit numbers the first one is the low half."""
        return self.codes if self.format.bits == 8 else self.codes[..., ::2] | self.codes[..., 1::2] << 4

    def packed_zeros(self) -> np.ndarray | None:
        """`zeros` as they are stored, each row [blocks x bits / 8] rounded up."""
        if self.zeros is None or self.format.bits == 8:
            return self.zeros
        even = np.pad(self.zeros, ((0, 0), (0, self.zeros.shape[1] % 2)))
        return np.asarray(even[:, ::2] | even[:, 1::2] << 4)

    def stored_scales(self) -> np.ndarray:
        """`scales` in float16, or as they are where that would change them."""
        with np.errstate(over="ignore"):
            half = self.scales.astype(np.float16)
        return half if (half.astype(np.float32) == self.scales).all() else self.scales

    def values(self, inputs: int) -> np.ndarray:
        """The matrix that is meant [N, inputs], float32."""
        zeros = self.format.middle if self.zeros is None else self.zeros[..., None].astype(np.float32)
        whole = (self.codes.astype(np.float32) - zeros) * self.scales[..., None]
        return np.asarray(whole.reshape(len(whole), -1)[:, :inputs])


def round_nearest(matrix: np.ndarray, form: Format) -> Blocked:
    """A matrix [N, K], each weight rounded on its own over its block's whole range."""
    parts = [_nearest(torch.tensor(matrix[at : at + _ROWS]), form) for at in range(0, len(matrix), _ROWS)]
    codes, scales, zeros = (torch.cat(column) for column in zip(*parts, strict=True))
    return _blocked(form, codes, scales, zeros)


def _nearest(rows: Tensor, form: Format) -> tuple[Tensor, Tensor, Tensor]:
    blocks = _cut(rows, form)
    scales, zeros = _steps(*_range(blocks), form)
    return _codes(blocks, scales[..., None], zeros[..., None], form).to(torch.uint8), scales, zeros


@torch.no_grad()
def compensate(matrix: np.ndarray, hessian: Tensor, form: Format) -> Blocked:
    """A matrix rounded input by input; what each rounding adds to the outputs is made up for by the inputs that follow.

    Args:
        matrix: the weights [N, K], float32.
        hessian: of the outputs' squared error, up to a factor: the sum of x x^T over calibration inputs x, float32 [K, K].
        form: how it is stored.

    Source: Frantar et al. 2023 (arXiv 2210.17323), algorithm 1, with the inputs of largest activation first and the blocks'
        steps fixed beforehand, as the authors' code has it (`act-order`, `static-groups`).
    Differs: each block's range is searched, weighing its errors by the Hessian's diagonal; an input that calibration never saw
        keeps its weights.
    """
    weights = _cut(torch.tensor(matrix), form)
    count, inputs = len(weights), weights[0].numel()
    hessian = pad(hessian, (0, inputs - matrix.shape[1]) * 2)
    costs = _damped(hessian, _DAMPING[0]).diagonal()
    steps = [_search(*block, form) for block in zip(weights.unbind(1), costs.reshape(-1, form.size), strict=True)]
    scales, zeros = (torch.stack(column, 1) for column in zip(*steps, strict=True))
    order = torch.argsort(costs, descending=True, stable=True)
    blocks, factor = (order // form.size).tolist(), _inverse_factor(hessian[order][:, order])
    rest, codes = weights.flatten(1)[:, order], torch.empty(count, inputs, dtype=torch.uint8)
    for start in range(0, inputs, _COLUMNS):
        end = min(start + _COLUMNS, inputs)
        part, errors = rest[:, start:end], torch.empty(count, end - start)
        for at in range(start, end):
            column, scale, zero = part[:, at - start], scales[:, blocks[at]], zeros[:, blocks[at]]
            code = _codes(column, scale, zero, form)
            codes[:, order[at]] = code.to(torch.uint8)
            error = (column - (code - zero) * scale) / factor[at, at]
            part[:, at - start + 1 :] -= error[:, None] * factor[at, at + 1 : end]
            errors[:, at - start] = error
        rest[:, end:] -= errors @ factor[start:end, end:]
    return _blocked(form, codes.reshape(count, -1, form.size), scales, zeros)


def _damped(hessian: Tensor, share: float) -> Tensor:
    """A Hessian whose diagonal is larger by a share of its mean [K, K]; an input that was never read counts as the mean."""
    damped = hessian.clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = max(float(diagonal.mean()), 1e-12)
    diagonal += share * diagonal.mean()
    return damped


def _inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of a damped Hessian's inverse [K, K].

    Raises:
        ExportError: there is none, as the inputs weren't finite.
    """
    for share in _DAMPING:
        lower, failed = torch.linalg.cholesky_ex(_damped(hessian, share))
        upper, again = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and not again and bool(upper.isfinite().all()):
            factor: Tensor = upper
            return factor
    raise ExportError(
        "a layer's inputs on calibration text can't be used",
        expected="finite numbers of a few magnitudes",
        todo="use a scheme without calibration: --text-scheme int8-block32",
    )


def _search(block: Tensor, weight_of: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """Scale and zero point [N] of a block [N, size], of the share of its range with the least weighted squared error."""
    low, high = _range(block)
    best = torch.full((len(block),), float("inf"))
    scale, zero = torch.ones_like(best), torch.zeros_like(best)
    for share in _SHARES:
        some, middle = _steps(low * share, high * share, form)
        codes = _codes(block, some[:, None], middle[:, None], form)
        error = (((codes - middle[:, None]) * some[:, None] - block).square() * weight_of).sum(1)
        less = error < best
        best, scale, zero = torch.where(less, error, best), torch.where(less, some, scale), torch.where(less, middle, zero)
    return scale, zero


def _cut(rows: Tensor, form: Format) -> Tensor:
    """Rows [N, K] as blocks [N, blocks, size]."""
    return pad(rows, (0, -rows.shape[1] % form.size)).reshape(len(rows), -1, form.size)


def _range(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Least and largest weight of each block, zero among them."""
    return blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)


def _steps(low: Tensor, high: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """Scales and zero points that span ranges."""
    most = 2**form.bits - 1
    if form.symmetric:
        scales = _half(torch.maximum(-low, high) / (form.middle - 1))
        return scales, torch.full_like(scales, form.middle)
    scales = _half((high - low) / most)
    return scales, torch.round(-low / scales).clamp(0, most)


def _half(scales: Tensor) -> Tensor:
    """Scales as float16 holds them, or as they are where it is too coarse; a scale of nothing is 1."""
    scales = torch.where(scales > 0, scales, 1.0)
    fits = _HALF_RANGE[0] <= float(scales.max()) <= _HALF_RANGE[1]
    return scales.clamp(min=_LEAST_HALF).half().float() if fits else scales


def _codes(weights: Tensor, scales: Tensor, zeros: Tensor, form: Format) -> Tensor:
    return (torch.round(weights / scales) + zeros).clamp(0, 2**form.bits - 1)


def _blocked(form: Format, codes: Tensor, scales: Tensor, zeros: Tensor) -> Blocked:
    return Blocked(form, codes.numpy(), scales.numpy(), None if form.symmetric else zeros.to(torch.uint8).numpy())
