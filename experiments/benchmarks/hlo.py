"""What a compiled program computes and sends, read from its HLO: matrix products and collectives, loops included."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import override

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "s64": 8}
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_SHAPE = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_INSTRUCTION = re.compile(r"^ +(?:ROOT )?%?([\w.-]+) = (.*)$")
_CALLEES = re.compile(r"\b(?:body|condition|calls|to_apply)=%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclass(frozen=True)
class Shape:
    """One array, as one device holds it."""

    dtype: str
    """As HLO spells it."""
    dims: tuple[int, ...]
    """Its sizes."""

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes."""
        return self.size * _BYTES[self.dtype]

    @override
    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class Collective:
    """One array's part in a collective operation between at least two devices."""

    kind: str
    """`all-gather`, `all-reduce`, `reduce-scatter`, `all-to-all` or `collective-permute`."""
    result: Shape
    """What each device has afterwards."""
    group: int
    """Devices that take part together."""
    times: int
    """How often it runs in one run of the program."""
    origin: str
    """The JAX operation it comes from."""

    @property
    def received(self) -> float:
        """Bytes that a device receives in one run of the program, by a ring algorithm."""
        others = (self.group - 1) / self.group
        per_result = {"all-gather": others, "all-to-all": others, "all-reduce": 2 * others}
        per_result |= {"reduce-scatter": self.group - 1.0, "collective-permute": 1.0}
        return self.times * self.result.bytes * per_result[self.kind]

    @property
    def backward(self) -> bool:
        """Whether it belongs to the backward pass, by the name that JAX gave it."""
        return "transpose(" in self.origin


@dataclass(frozen=True)
class Program:
    """A compiled program, as far as it can be told from its text."""

    collectives: tuple[Collective, ...]
    """Every array that goes through a collective."""
    dot_flops: float
    """Operations of all matrix products, on one device. A TPU has none: it convolves."""


@dataclass(frozen=True)
class _Instruction:
    name: str
    results: tuple[Shape, ...]
    opcode: str
    rest: str
    """Operands and attributes."""


def read_program(text: str) -> Program:
    """Reads the text of an optimized HLO module.

    Raises:
        ValueError: if a loop does not say how often it runs, or a collective does not say between which devices.
    """
    computations, entry = _computations(text)
    collectives: list[Collective] = []
    flops = 0.0
    for instruction, shapes, times in _run(computations, entry, 1):
        if instruction.opcode == "dot":
            flops += times * _dot_flops(instruction, shapes)
        collectives.extend(_collectives(instruction, times))
    return Program(tuple(each for each in collectives if each.group > 1), flops)


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", list[_Instruction]()
    for line in text.splitlines():
        found, header = _INSTRUCTION.match(line), _HEADER.match(line)
        if found is not None:
            result, call = _split_result(found[2])
            opcode, _, rest = call.partition("(")
            current.append(_Instruction(found[1], tuple(_shapes(result)), opcode, rest))
        elif header is not None:
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
    return computations, entry


def _split_result(text: str) -> tuple[str, str]:
    """Divides `TYPE opcode(...)`; the type of a tuple has blanks in it."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character in "({") - (character in ")}")
        if character == " " and depth == 0:
            return text[:position], text[position + 1 :]
    raise ValueError(f"no HLO instruction: {text[:120]!r}")


def _shapes(text: str) -> Iterator[Shape]:
    for dtype, dims in _SHAPE.findall(text):
        yield Shape(dtype, tuple(int(size) for size in dims.split(",") if size))


def _run(
    computations: Mapping[str, list[_Instruction]], name: str, times: int
) -> Iterator[tuple[_Instruction, Mapping[str, tuple[Shape, ...]], int]]:
    """Every instruction that a computation executes, with the shapes known beside it, and how often."""
    shapes = {instruction.name: instruction.results for instruction in computations[name]}
    for instruction in computations[name]:
        yield instruction, shapes, times
        trips = _trips(instruction, computations) if instruction.opcode == "while" else 1
        # What an asynchronous operation does is written at its start, and in some versions at its end again.
        callees = [] if instruction.opcode == "async-done" else _CALLEES.findall(instruction.rest)
        for callee in callees:
            yield from _run(computations, callee, times * trips)


def _trips(loop: _Instruction, computations: Mapping[str, list[_Instruction]]) -> int:
    """How often a loop runs: as it says itself, or as far as its condition counts."""
    if known := _TRIPS.search(loop.rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.-]+)", loop.rest)
    assert condition is not None
    instructions = computations[condition[1]]
    limits = [int(each.rest.partition(")")[0]) for each in instructions if each.opcode == "constant"]
    if len(limits) != 1 or "direction=LT" not in instructions[-1].rest:
        raise ValueError(f"the loop {loop.name} does not say how often it runs")
    return limits[0]


def _collectives(instruction: _Instruction, times: int) -> Iterator[Collective]:
    kind = instruction.opcode.removesuffix("-start")
    if kind not in _KINDS:
        return
    results = instruction.results
    if instruction.opcode in ("all-gather-start", "collective-permute-start"):
        # Its type holds the operands first, then the results (and two counters, of a permutation).
        arrays = [shape for shape in results if shape.dims]
        results = tuple(arrays[len(arrays) // 2 :])
    origin = re.search(r'op_name="([^"]*)"', instruction.rest)
    for result in results:
        yield Collective(kind, result, _group(instruction.rest), times, origin[1] if origin else "")


def _group(attributes: str) -> int:
    if listed := re.search(r"replica_groups=\{\{([0-9,]*)\}", attributes):
        return listed[1].count(",") + 1
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(iota[1])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        return math.prod(sizes[axis] for axis in re.findall(r"'(\w+)'", mesh[2]))
    if "source_target_pairs" in attributes:
        return 2
    raise ValueError(f"a collective without groups: {attributes[:200]!r}")


def _dot_flops(instruction: _Instruction, shapes: Mapping[str, tuple[Shape, ...]]) -> float:
    # An operand may stand with its type before its name.
    left = re.match(r"(?:[a-z]+[0-9]*\[[0-9,]*\]\S* )?%?([\w.-]+)", instruction.rest)
    contracted = re.search(r"lhs_contracting_dims=\{([0-9,]*)\}", instruction.rest)
    assert left is not None and contracted is not None
    dims = shapes[left[1]][0].dims
    depth = math.prod(dims[int(axis)] for axis in contracted[1].split(",") if axis)
    return 2.0 * instruction.results[0].size * depth
