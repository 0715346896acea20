"""Subgraphs for the XNNPACK delegate, written node by node.

ExecuTorch's own way to them (torch.export, a partitioner, seventeen passes over each of some hundred partitions) takes
minutes, and rounds weights again. Here the integers of core's layers go into the subgraph as they are, and what lies
between two attentions is one subgraph. The format is that of executorch/backends/xnnpack/serialization/schema.fbs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as schema
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import serialize_xnnpack_binary
from torch import Tensor

from tc_executorch.constants import Constant, constant

INVALID = 0xFFFFFFFF  # XNN_INVALID_VALUE_ID
EXTERNAL_INPUT, EXTERNAL_OUTPUT, KEEP_DIMS = 1, 2, 0x40  # flags of xnnpack.h
IN_NAMED_DATA = 0xFFFFFFFFFFFFFFFF  # offset of a constant that stands outside the subgraph
Type = schema.XNNDatatype


@dataclass(frozen=True)
class Value:
    """A value of a subgraph, of dtype float32 unless it is of a quantised kind."""

    id: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Rows:
    """A linear layer, or some of its rows in another order."""

    layer: Any  # nn.Linear or QuantizedLinear
    rows: Tensor | None = None

    @property
    def count(self) -> int:
        return int(self.layer.out_features) if self.rows is None else len(self.rows)

    def of(self, tensor: Tensor) -> Tensor:
        """The same rows of a tensor that has one for each of the layer's."""
        return tensor if self.rows is None else tensor[self.rows]


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """One below the other; one alone is not copied."""
    return torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]


def _of_all(parts: Sequence[Rows], name: str) -> Tensor:
    return stacked([part.of(getattr(part.layer, name)) for part in parts])


@dataclass
class Subgraph:
    """One delegate in the making: values, nodes, and the constants that it refers to by name.

    Inputs come before anything else; the delegate is called with them in their order, then the outputs in theirs.
    """

    constants: dict[str, Constant]  # of the whole program, by name
    values: list[schema.XValue] = field(default_factory=list)
    nodes: list[schema.XNode] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    data: list[schema.ConstantDataOffset] = field(default_factory=lambda: [schema.ConstantDataOffset(0, 0)])
    scalars: dict[float, Value] = field(default_factory=dict)

    # ---- values ---------------------------------------------------------------------------------------------------

    def input(self, shape: Sequence[int]) -> Value:
        value = self._define(shape, external=len(self.inputs), flags=EXTERNAL_INPUT)
        self.inputs.append(value.id)
        return value

    def output(self, shape: Sequence[int]) -> Value:
        """What a node is to write to; all inputs are there."""
        value = self._define(shape, external=len(self.inputs) + len(self.outputs), flags=EXTERNAL_OUTPUT)
        self.outputs.append(value.id)
        return value

    def scalar(self, number: float) -> Value:
        if number not in self.scalars:
            self.scalars[number] = self.constant(torch.tensor([number], dtype=torch.float32))
        return self.scalars[number]

    def constant(self, tensor: Tensor) -> Value:
        """float32, of whatever dtype the tensor is."""
        return self._define(tensor.shape, data=self._put(constant(tensor.float)))

    def _define(self, shape: Sequence[int], kind: schema.XNNDatatype = Type.xnn_datatype_fp32, data: int = 0,
                external: int = INVALID, flags: int = 0, quantised: Any = None) -> Value:
        value = Value(len(self.values), tuple(int(size) for size in shape))
        tensor = schema.XNNTensorValue(datatype=kind, num_dims=len(value.shape), dims=list(value.shape),
                                       constant_buffer_idx=data, external_id=external, flags=flags, id_out=value.id)
        union = tensor if quantised is None else schema.XNNQuantizedTensorValue(tensor, quantised)
        self.values.append(schema.XValue(xvalue_union=union))
        return value

    def _put(self, content: Constant) -> int:
        """Index of the constant, which is named by its bytes: the runtime shares those of one name among programs."""
        name = content.digest()
        self.constants.setdefault(name, content)
        self.data.append(schema.ConstantDataOffset(offset=IN_NAMED_DATA, size=len(content), named_key=name))
        return len(self.data) - 1

    # ---- nodes ----------------------------------------------------------------------------------------------------

    def unary(self, node: type, value: Value, into: Value | None = None, **more: int) -> Value:
        """A node of one input whose output has the input's shape."""
        out = into or self._define(value.shape)
        self._add(node(input_id=value.id, output_id=out.id, flags=more.get("flags", 0)))
        return out

    def binary(self, node: type, first: Value, second: Value, into: Value | None = None) -> Value:
        """A node of two inputs, which are broadcast as PyTorch does."""
        out = into or self._define(torch.broadcast_shapes(first.shape, second.shape))
        self._add(node(input1_id=first.id, input2_id=second.id, output_id=out.id, flags=0))
        return out

    def add(self, first: Value, second: Value, into: Value | None = None) -> Value:
        return self.binary(schema.XNNAdd, first, second, into)

    def multiply(self, first: Value, second: Value, into: Value | None = None) -> Value:
        return self.binary(schema.XNNMultiply, first, second, into)

    def subtract(self, first: Value, second: Value) -> Value:
        return self.binary(schema.XNNSubtract, first, second)

    def reshape(self, value: Value, shape: Sequence[int], dynamic: int, into: Value | None = None) -> Value:
        """`shape` with the size at index `dynamic` left to what there is at run time."""
        out = into or self._define(shape)
        wanted = [0 if index == dynamic else int(size) for index, size in enumerate(shape)]
        self._add(schema.XNNStaticReshape(num_dims=len(wanted), new_shape=wanted, input_id=value.id, output_id=out.id,
                                          flags=0))
        return out

    def concatenate(self, first: Value, second: Value, axis: int, into: Value | None = None) -> Value:
        shape = list(first.shape)
        shape[axis] += second.shape[axis]
        out = into or self._define(shape)
        self._add(schema.XNNConcatenate2(axis=axis, input1_id=first.id, input2_id=second.id, input3_id=INVALID,
                                         input4_id=INVALID, output_id=out.id, flags=0, input5_id=INVALID))
        return out

    def columns(self, value: Value, first: int, count: int, into: Value | None = None) -> Value:
        """Of [n, size] the columns from `first` on, [n, count]."""
        out = into or self._define((value.shape[0], count))
        self._add(schema.XNNStaticSlice(num_dims=2, offsets=[0, first], sizes=[0, count], input_id=value.id,
                                        output_id=out.id, flags=0))  # a size of 0: what there is at run time
        return out

    def mean_of_squares(self, value: Value) -> Value:
        """[n, size] -> [n, 1]."""
        rows, size = value.shape
        squares = self.unary(schema.XNNSquare, value)
        spread = self.reshape(squares, (rows, size, 1, 1), dynamic=0)  # the two axes that this node goes over
        mean = self._define((rows, 1, 1, 1))
        self._add(schema.XNNGlobalAvgPooling2d(input_id=spread.id, output_id=mean.id, flags=KEEP_DIMS))
        return self.reshape(mean, (rows, 1), dynamic=0)

    def rounded(self, value: Value) -> Value:
        """[n, size] as int8, each row with a scale and a zero point of its own."""
        out = self._define(value.shape, Type.xnn_datatype_qdint8, quantised=schema.PerTokenDynamicQuant(1))
        self._add(schema.XNNConvert(input_id=value.id, output_id=out.id, flags=0))
        return out

    def linear(self, value: Value, weight: Value, bias: Tensor | None, into: Value | None = None) -> Value:
        """[n, in] times a weight [out, in]; the value is `rounded` for weights that ask for that."""
        out = into or self._define((value.shape[0], weight.shape[0]))
        bias_id = INVALID if bias is None else self.constant(bias).id
        self._add(schema.XNNFullyConnected(input1_id=value.id, filter_id=weight.id, bias_id=bias_id, output_id=out.id,
                                           flags=0))
        return out

    def _add(self, union: Any) -> None:
        self.nodes.append(schema.XNode(xnode_union=union, debug_handle=0, output_min_max=None))

    # ---- weights --------------------------------------------------------------------------------------------------

    def weights(self, parts: Sequence[Rows]) -> Value:
        """Linear layers as one matrix of float32."""
        shape = (sum(part.count for part in parts), parts[0].layer.weight.shape[1])
        data = self._put(Constant(lambda: stacked([part.of(part.layer.weight).float() for part in parts]),
                                  shape[0] * shape[1] * 4))
        return self._define(shape, data=data)

    def integers(self, parts: Sequence[Rows]) -> Value:
        """The integers and scales of quantised layers of one format, as one matrix."""
        layer = parts[0].layer
        shape = (sum(part.count for part in parts), layer.columns)
        values = partial(_of_all, parts, "values")
        scales = partial(_of_all, parts, "scales")
        if layer.format.bits == 8:
            weights = self._put(constant(lambda: values() ^ 128))  # less 128, as int8
            place = self._put(constant(lambda: scales().float()))
            quantised = schema.PerChannelQuant(scale=[], channel_dim=0, scale_buffer_idx=place, num_scales=shape[0])
            return self._define(shape, Type.xnn_datatype_qcint8, weights, quantised=quantised)
        weights = self._put(constant(values))
        place = self._put(constant(lambda: scales().bfloat16()))
        size = layer.format.columns_of_group(layer.columns)
        grouped = schema.PerChannelGroupQuant(scale=[], channel_dim=0, group_size=size, scale_buffer_idx=place,
                                              num_scales=shape[0] * layer.format.groups(layer.columns))
        return self._define(shape, Type.xnn_datatype_qbint4, weights, quantised=grouped)

    # ---- the end --------------------------------------------------------------------------------------------------

    def serialised(self) -> bytes:
        graph = schema.XNNGraph(version="0", xnodes=self.nodes, xvalues=self.values,
                                num_externs=len(self.inputs) + len(self.outputs), input_ids=self.inputs,
                                output_ids=self.outputs, constant_data=self.data)
        return bytes(serialize_xnnpack_binary(graph, bytearray()))
