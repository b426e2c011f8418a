"""What a step costs, read from its program: operations of its products, and what devices send each other."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16}
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+)(?:e\w+)?\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(")
_CALLED = re.compile(r"(?:to_apply|calls|true_computation|false_computation|called_computations)=\{?%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One exchange of a step.

    Attributes:
      kind: Its operation in XLA.
      result: Types and shapes of what it returns, as XLA writes them.
      bytes: Bytes that it returns on each device.
      devices: Devices that take part in an exchange.
      times: How often a step runs it.
      loops: How many loops stand around it.
    """

    kind: str
    result: str
    bytes: float
    devices: int
    times: float
    loops: int

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a step by the ring algorithms (Thakur et al. 2005, sections 4.1, 4.3, 4.5)."""
        share = (self.devices - 1) / self.devices
        factor = {"all-reduce": 2 * share, "reduce-scatter": self.devices - 1, "collective-permute": 1}
        return self.bytes * factor.get(self.kind, share) * self.times


def arrays_in(types: str) -> list[tuple[float, tuple[int, ...]]]:
    """Bytes and shape of every array that XLA's notation of some types names."""
    found = []
    for kind, sizes in _ARRAY.findall(types):
        shape = tuple(int(size) for size in sizes.split(",") if size)
        found.append((math.prod(shape) * (_BITS.get(kind) or int(kind[1:])) / 8, shape))
    return found


class Instruction(NamedTuple):
    """An instruction that a step runs: what it does, types of its result, its line, how often, and in what.

    `times` is not a number within a loop of which the program does not say how often it runs.
    """

    operation: str
    result: str
    line: str
    times: float
    loops: int
    fused: bool


def instructions(text: str) -> Iterator[Instruction]:
    """The instructions of a compiled program's text that a step runs."""
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if line.endswith("{") and "->" in line and not line.startswith(" "):
            name = line.removeprefix("ENTRY ").lstrip("%").split()[0]
            bodies[name], entry = [], name if line.startswith("ENTRY") else entry
        elif name:
            bodies[name].append(line)

    def walk(name: str, times: float, loops: int, fused: bool = False) -> Iterator[Instruction]:
        for line in bodies.get(name, ()):
            if not (match := _INSTRUCTION.match(line)):
                continue
            operation = match[3]
            yield Instruction(operation, match[2], line, times, loops, fused)
            if operation == "while" and (body := re.search(r"body=%?([\w.\-]+)", line)):
                yield from walk(body[1], times * _rounds(line, bodies), loops + 1)
            elif operation in ("call", "fusion", "conditional", "async-start", "custom-call"):
                for called in _CALLED.findall(line):
                    yield from walk(called, times, loops, fused or operation == "fusion")

    return walk(entry, 1, 0)


def _rounds(line: str, bodies: dict[str, list[str]]) -> float:
    """How often a loop runs: as XLA notes on a CPU, or by its condition, as libtpu leaves no note.

    Counters begin at zero; a loop that was unrolled counts in larger steps.
    """
    if noted := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
        return int(noted[1])
    condition, body = (
        "\n".join(bodies.get(found[1], ())) if (found := re.search(rf"{key}=%?([\w.\-]+)", line)) else ""
        for key in ("condition", "body")
    )
    compared = re.search(r"ROOT .* compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT", condition)
    results = re.search(r"ROOT .* tuple\((.*?)\)", body)
    place = compared and re.search(
        rf"^\s+%?{re.escape(compared[1])} = \S+ get-tuple-element\(.*\), index=(\d+)", condition, re.MULTILINE
    )
    if not (compared and results and place):
        return math.nan
    counter = re.findall(r"%?([\w.\-]+)(?:,|$)", results[1])[int(place[1])]
    added = re.search(rf"^\s+%?{re.escape(counter)} = \S+ add\(%?([\w.\-]+), %?([\w.\-]+)\)", body, re.MULTILINE)
    limit, steps = _constants(condition).get(compared[2]), _constants(body)
    step = next((steps[name] for name in added.groups() if name in steps), None) if added else None
    return math.nan if limit is None or not step else math.ceil(limit / step)


def _constants(body: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"%?([\w.\-]+) = [su]\d+\[\]\S* constant\((\d+)\)", body)}


def collectives(text: str) -> list[Collective]:
    """Every exchange between devices of a compiled program, from its text."""
    found: dict[Any, Collective] = {}
    for number, (operation, result, line, times, loops, fused) in enumerate(instructions(text)):
        kind = operation.removesuffix("-start")
        if kind not in _KINDS:
            continue
        devices, size = _group(line), sum(size for size, _ in arrays_in(result))
        if operation != kind and kind in ("all-gather", "collective-permute"):
            # The start of an exchange returns what it was given, too.
            size *= devices / (devices + 1) if kind == "all-gather" else 0.5
        # A TPU's compiler spreads one exchange over many fusions that it runs beside, which share its channel.
        channel = re.search(r"channel_id=(\d+)", line) if fused else None
        one = Collective(kind=kind, result=result, bytes=size, devices=devices, times=times, loops=loops)
        key = number if channel is None else channel[0]
        found[key] = min(found.get(key, one), one, key=lambda piece: piece.times)
    return list(found.values())


def _group(line: str) -> int:
    """Devices of one of an instruction's groups, which XLA writes in three ways."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[(.*?)\].*?\{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
    return 2


def product_flops(jaxpr: Any) -> float:
    """Operations of all matrix products of a traced function, on all devices; those in the bodies of loops and in
    kernels as often as they run, pieces that a kernel skips among them."""
    total = 0.0
    for equation in jaxpr.eqns:
        rounds = equation.params.get("length", 1)
        if equation.primitive.name == "pallas_call":
            rounds = math.prod(equation.params["grid_mapping"].grid)
        elif equation.primitive.name == "shard_map":
            rounds = equation.params["mesh"].size
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2.0 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
        inner = [x for value in equation.params.values() for x in (value if isinstance(value, tuple) else (value,))]
        inner = [getattr(x, "jaxpr", x) for x in inner]
        total += rounds * sum(product_flops(x) for x in inner if hasattr(x, "eqns"))
    return total
