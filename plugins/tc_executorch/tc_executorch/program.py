"""ExecuTorch programs, written instruction by instruction: values, kernel calls, delegate calls and memory.

The format is that of executorch/exir/_serialize/program.fbs; ExecuTorch's own serialiser writes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from executorch.exir import schema
from executorch.exir._serialize._cord import Cord
from executorch.exir._serialize._named_data_store import NamedDataStoreOutput
from executorch.exir._serialize._program import PTEFile, serialize_pte_binary
from executorch.exir._serialize.data_serializer import DataEntry
from executorch.exir.scalar_type import ScalarType

from tc_executorch.constants import ALIGNMENT, Constant

SIZES = {ScalarType.LONG: 8, ScalarType.FLOAT: 4, ScalarType.CHAR: 1, ScalarType.BYTE: 1}
ARENA = 1  # the one that holds all tensors that are not constant
ONE_OUTPUT = '[1, {"type": null, "context": null, "children_spec": []}]'  # a pytree of PyTorch's
FORWARD_INPUTS = ('[1, {"type": "builtins.tuple", "context": "null", "children_spec": [{"type": "builtins.tuple", '
                  '"context": "null", "children_spec": [%s]}, {"type": "builtins.dict", "context": "[]", '
                  '"children_spec": []}]}]')
LEAF = '{"type": null, "context": null, "children_spec": []}'


@dataclass
class Memory:
    """Places in the arena. What is given back is used again by tensors that come later."""

    size: int = 0
    free: list[tuple[int, int]] = field(default_factory=list)  # offset, size

    def take(self, size: int) -> tuple[int, int]:
        size = -(-size // ALIGNMENT) * ALIGNMENT
        fitting = [place for place in self.free if place[1] >= size]
        if fitting:
            place = min(fitting, key=lambda place: place[1])
            self.free.remove(place)
            return place
        place = (self.size, size)
        self.size += size
        return place

    def give_back(self, place: tuple[int, int]) -> None:
        self.free.append(place)


@dataclass
class Method:
    """One method in the making. Values are known by their index."""

    name: str
    program: Program
    values: list[schema.EValue] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    operators: list[tuple[str, str]] = field(default_factory=list)
    instructions: list[schema.Instruction] = field(default_factory=list)
    delegates: list[schema.BackendDelegate] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)
    places: dict[int, tuple[int, int]] = field(default_factory=dict)

    # ---- values ---------------------------------------------------------------------------------------------------

    def number(self, value: int) -> int:
        """A whole number, also one that an instruction sets."""
        return self._value(schema.Int(value))

    def real(self, value: float) -> int:
        return self._value(schema.Double(value))

    def truth(self, value: bool) -> int:
        return self._value(schema.Bool(value))

    def nothing(self) -> int:
        return self._value(schema.Null())

    def numbers(self, items: Sequence[int]) -> int:
        """A list of the numbers that are at these indices."""
        return self._value(schema.IntList(list(items)))

    def tensor(self, shape: Sequence[int], kind: ScalarType = ScalarType.FLOAT, dynamic: bool = True,
               name: str | None = None) -> int:
        """A tensor in the arena; `dynamic`: its sizes are upper bounds; one with a name can be read from outside."""
        place = self.memory.take(prod(shape) * SIZES[kind])
        index = self._tensor(shape, kind, schema.AllocationDetails(ARENA, place[0] & 0xFFFFFFFF, place[0] >> 32),
                             dynamic, name)
        self.places[index] = place
        return index

    def view(self, tensor: int, shape: Sequence[int], kind: ScalarType = ScalarType.FLOAT,
             sizes: Sequence[int] = ()) -> int:
        """The same numbers in another shape: its bounds, and the sizes at run time, -1 for what there is.

        It has the tensor's place, which is given back when the view is released.
        """
        index = self._tensor(shape, kind, None, True, None)
        if tensor in self.places:
            self.places[index] = self.places.pop(tensor)
        self.call("executorch_prim::et_view", "default", [tensor, self.numbers([self.number(size) for size in sizes]),
                                                          index])
        return index

    def constant(self, shape: Sequence[int], kind: ScalarType, content: Constant) -> int:
        """A tensor whose numbers stand in the file."""
        return self._tensor(shape, kind, None, False, None, self.program.buffer(content))

    def _tensor(self, shape: Sequence[int], kind: ScalarType, place: schema.AllocationDetails | None, dynamic: bool,
                name: str | None, buffer: int = 0) -> int:
        known = schema.TensorShapeDynamism
        extra = None if name is None else schema.ExtraTensorInfo(fully_qualified_name=name)
        return self._value(schema.Tensor(
            scalar_type=kind, storage_offset=0, sizes=list(shape), dim_order=list(range(len(shape))),
            requires_grad=False, layout=0, data_buffer_idx=buffer, allocation_info=place,
            shape_dynamism=known.DYNAMIC_BOUND if dynamic else known.STATIC, extra_tensor_info=extra))

    def _value(self, value: schema.KernelTypes) -> int:
        self.values.append(schema.EValue(value))
        return len(self.values) - 1

    def release(self, *tensors: int) -> None:
        """Nobody reads these any more: tensors that come later may have their places."""
        for tensor in tensors:
            self.memory.give_back(self.places.pop(tensor))

    # ---- instructions ---------------------------------------------------------------------------------------------

    def call(self, name: str, overload: str, arguments: Sequence[int]) -> None:
        operator = (name, overload)
        if operator not in self.operators:
            self.operators.append(operator)
        self._do(schema.KernelCall(op_index=self.operators.index(operator), args=list(arguments)))

    def kernel(self, name: str, overload: str, arguments: Sequence[int], out: int) -> int:
        """A kernel with an `out` argument, which is also what it returns."""
        self.call(name, overload, [*arguments, out, out])
        return out

    def delegate(self, blob: bytes, arguments: Sequence[int]) -> None:
        """A subgraph of XNNPACK; its inputs, then its outputs."""
        reference = schema.BackendDelegateDataReference(schema.DataLocation.INLINE, self.program.blob(blob))
        self.delegates.append(schema.BackendDelegate(id="XnnpackBackend", processed=reference, compile_specs=[]))
        self._do(schema.DelegateCall(delegate_index=len(self.delegates) - 1, args=list(arguments)))

    def _do(self, arguments: schema.InstructionArguments) -> None:
        self.instructions.append(schema.Instruction(arguments))

    def plan(self) -> schema.ExecutionPlan:
        inputs = FORWARD_INPUTS % ", ".join(LEAF for _ in self.inputs) if self.inputs else ""
        return schema.ExecutionPlan(
            name=self.name, container_meta_type=schema.ContainerMetadata(inputs, ONE_OUTPUT), values=self.values,
            inputs=self.inputs, outputs=self.outputs, chains=[schema.Chain([], [], self.instructions, None)],
            operators=[schema.Operator(*operator) for operator in self.operators], delegates=self.delegates,
            non_const_buffer_sizes=[0, self.memory.size] if self.memory.size else [0])


@dataclass
class Program:
    """Methods, and the constants that they share."""

    methods: list[Method] = field(default_factory=list)
    constants: dict[str, Constant] = field(default_factory=dict)  # of delegates, by name
    buffers: list[Constant] = field(default_factory=list)  # of tensors
    blobs: list[bytes] = field(default_factory=list)
    _known: dict[str, int] = field(default_factory=dict)

    def method(self, name: str) -> Method:
        self.methods.append(Method(name, self))
        return self.methods[-1]

    def buffer(self, content: Constant) -> int:
        """Index of the constant; 0 is what stands for none. Constants of the same bytes are one."""
        digest = content.digest()
        if digest not in self._known:
            self.buffers.append(content)
            self._known[digest] = len(self.buffers)
        return self._known[digest]

    def blob(self, content: bytes) -> int:
        self.blobs.append(content)
        return len(self.blobs) - 1

    def constant_methods(self, values: Mapping[str, int | bool | Sequence[int]]) -> None:
        """Methods that return a number, a truth value or several numbers: what ExecuTorch's runners ask a model."""
        for name, value in values.items():
            method = self.method(name)
            each = value if isinstance(value, Sequence) else [value]
            method.outputs = [method.truth(part) if isinstance(part, bool) else method.number(part) for part in each]

    def serialised(self) -> Cord:
        """The file. Constants are pieces of the class `Constant`, whose bytes are made when they are written."""
        program = schema.Program(
            version=0, execution_plan=[method.plan() for method in self.methods],
            constant_buffer=[schema.Buffer(b""), *(schema.Buffer(content) for content in self.buffers)],
            backend_delegate_data=[schema.BackendDelegateInlineData(data=blob) for blob in self.blobs], segments=[],
            constant_segment=schema.SubsegmentOffsets(segment_index=0, offsets=[]))
        entries = {name: DataEntry(index, ALIGNMENT, None) for index, name in enumerate(self.constants)}
        named = NamedDataStoreOutput(buffers=list(self.constants.values()), pte_data=entries, external_data={})
        return serialize_pte_binary(PTEFile(program=program, named_data=named), extract_delegate_segments=True,
                                    segment_alignment=ALIGNMENT, constant_tensor_alignment=ALIGNMENT)
