"""Weights that are not there: each row of each weight is a number of its own.

So a traced graph shows where its constants come from, whatever the exporter joined, turned or shared on the way.

A marked weight takes the memory of one column: all numbers of a row are the row's own. After tracing, a constant whose numbers
are such marks is a list of rows along one axis, and the weights themselves are filled in from the checkpoint later, a few
blocks at a time.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from edgesafe.errors import ExportError
from edgesafe.format.specs import GraphSpec

# Float32 holds whole numbers up to 2^24 exactly. Other constants of a graph (scales, small shapes) are far below the first
# mark.
_FIRST, _END = 2**22, 2**24
_TODO = "report this checkpoint's config: its weights are used in a way that this exporter does not know"


@dataclass(frozen=True)
class Rows:
    """Rows start..stop of a weight, by its name in transformers' model."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Source:
    """A constant's rows, joined along `axis` of `dims` axes."""

    axis: int
    dims: int
    rows: tuple[Rows, ...]


@dataclass(frozen=True)
class Blueprint:
    """A traced graph whose weights are named and not there: `sources` by the constant's name."""

    proto: onnx.ModelProto
    spec: GraphSpec
    sources: Mapping[str, Source]

    @property
    def names(self) -> list[str]:
        """The weights that it is filled from."""
        return sorted({rows.name for source in self.sources.values() for rows in source.rows})

    def renamed(self, name_of: Callable[[str], str]) -> Blueprint:
        """The same graph filled from other weights of the same shapes."""
        sources = {
            key: replace(source, rows=tuple(replace(rows, name=name_of(rows.name)) for rows in source.rows))
            for key, source in self.sources.items()
        }
        return replace(self, sources=sources)


@torch.no_grad()
def mark(model: nn.Module) -> dict[int, str]:
    """Put marks in the place of every weight.

    Returns:
        The first mark of each weight, ascending, and the weight's name.

    Raises:
        ExportError: the model has more rows than there are marks.
    """
    starts: dict[int, str] = {}
    marked: dict[int, nn.Parameter] = {}
    at = _FIRST
    for name, weight in list(model.named_parameters(remove_duplicate=False)):
        if id(weight) not in marked:
            rows = weight.shape[0] if weight.dim() else 1
            column = torch.arange(at, at + rows, dtype=torch.float32).reshape(-1, *[1] * max(0, weight.dim() - 1))
            marked[id(weight)] = nn.Parameter(column.expand(weight.shape), requires_grad=False)
            starts[at] = name
            at += rows
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, marked[id(weight)])
    if at > _END:
        raise ExportError(f"the model has {at - _FIRST} rows of weights", expected=f"at most {_END - _FIRST}", todo=_TODO)
    return starts


def thin(array: np.ndarray) -> np.ndarray | None:
    """A marked constant with one number along every axis but its rows'; None for any other constant.

    >>> thin(np.array([[4194304.0, 4194305.0], [4194304.0, 4194305.0]], np.float32)).tolist()
    [[4194304.0, 4194305.0]]
    >>> thin(np.array([1.0], np.float32)) is None
    True
    """
    if array.dtype != np.float32 or array.size == 0 or not array.min() >= _FIRST or not array.max() < _END:
        return None
    for axis in range(array.ndim):
        first = array.take([0], axis)
        if (array == first).all():
            array = first
    if sum(n > 1 for n in array.shape) > 1:
        raise ExportError("a constant mixes weights along two axes", where=f"shape {list(array.shape)}", todo=_TODO)
    return np.ascontiguousarray(array)


def thin_constants(program: Any) -> None:
    """Thin a traced `onnx_ir.Model`'s marked constants in place."""
    import onnx_ir

    for value in program.graph.initializers.values():
        small = thin(value.const_value.numpy())
        if small is not None:
            value.const_value = onnx_ir.tensor(small, name=value.name)
            value.shape = onnx_ir.Shape(small.shape)


def read_marks(proto: onnx.ModelProto, spec: GraphSpec, starts: Mapping[int, str]) -> Blueprint:
    """The blueprint of a graph that was traced over marked weights.

    Raises:
        ExportError: a constant holds marks that aren't rows.
    """
    sources = {}
    for tensor in proto.graph.initializer:
        small = thin(onnx.numpy_helper.to_array(tensor))
        if small is not None:
            axis = int(np.argmax(small.shape)) if small.ndim else 0
            sources[tensor.name] = Source(axis, small.ndim, tuple(_runs(small.ravel(), starts)))
    thinned = [value for value in proto.graph.value_info if value.name in sources]
    for value in thinned:  # its shape is not the weight's
        proto.graph.value_info.remove(value)
    return Blueprint(proto, spec, sources)


def _runs(marks: np.ndarray, starts: Mapping[int, str]) -> Iterable[Rows]:
    """Consecutive marks of one weight, as rows."""
    firsts = list(starts)
    ids = marks.astype(np.int64)
    if (ids != marks).any():
        raise ExportError("a constant was computed from weights", todo=_TODO)
    cuts: list[int] = [0, *(np.flatnonzero(np.diff(ids) != 1) + 1).tolist(), len(ids)]
    for low, high in zip(cuts, cuts[1:], strict=False):
        first, last = int(ids[low]), int(ids[high - 1])
        while first <= last:  # weights that follow each other in the model look like one run
            at = bisect.bisect_right(firsts, first) - 1
            end = min(last + 1, firsts[at + 1] if at + 1 < len(firsts) else _END)
            yield Rows(starts[firsts[at]], first - firsts[at], end - firsts[at])
            first = end


def fill(blueprint: Blueprint, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The blueprint's constants from the weights that it names, float32."""
    return {key: _filled(source, weights) for key, source in blueprint.sources.items()}


def _filled(source: Source, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    parts = [
        weights[rows.name][rows.start : rows.stop] if weights[rows.name].ndim else weights[rows.name] for rows in source.rows
    ]
    joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if not source.dims:
        return joined.reshape(())
    rest = joined.shape[1:] if source.dims > len(joined.shape[1:]) else (-1,)
    ones = (1,) * (source.dims - 1 - len(rest))
    return np.ascontiguousarray(np.moveaxis(joined.reshape(len(joined), *ones, *rest), 0, source.axis))


def with_weights(blueprint: Blueprint, constants: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """The whole graph, its weights inside."""
    whole = onnx.ModelProto()
    whole.CopyFrom(blueprint.proto)
    for tensor in whole.graph.initializer:
        if tensor.name in constants:
            tensor.dims[:] = constants[tensor.name].shape
            tensor.raw_data = constants[tensor.name].tobytes()
    return whole
