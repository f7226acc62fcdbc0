"""Counts what a program compiled for TPU costs, from its text.

The compiler writes an estimate of cycles beside most instructions. It writes none

- beside a custom call, e.g. a Pallas kernel: counted here by its FLOPs and bytes;
- beside a few gathers and reshapes: counted here by their bytes;
- beside a `while`: its body counts here as often as it runs;
- beside collectives, and copies that run beside the computing: not in the cycles, only
  their bytes are told.

What cannot be counted is refused.
"""

import collections
import dataclasses
import json
import math
import re

from personmae_jax.errors import RunError
from personmae_jax.preflight.chips import Chip
from personmae_jax.preflight.hlo_text import Computation, Instruction, Program, parse

_KERNEL_SHARE = 0.6  # of the peak that a kernel of ours is taken to reach; ours

_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all")
_FREE += ("partition-id", "replica-id", "opt-barrier", "add-dependency")
# These name a place, or mark where a collective begins and ends.
_FREE_TARGETS = ("AllocateBuffer", "ConcatBitcast")
_FREE_TARGETS += ("AsyncCollectiveStart", "AsyncCollectiveDone")


@dataclasses.dataclass(kw_only=True)
class Cost:
    """How often something runs in a step, and what all its runs cost."""

    count: int = 0
    cycles: float = 0.0
    bytes: int = 0
    flops: int = 0

    def add(self, count: int, *, cycles: float = 0.0, bytes: int = 0, flops: int = 0):
        """Adds `count` runs of which each costs as much."""
        self.count += count
        self.cycles += count * cycles
        self.bytes += count * bytes
        self.flops += count * flops


def _costs() -> dict[str, Cost]:
    return collections.defaultdict(Cost)


@dataclasses.dataclass(kw_only=True)
class Costs:
    """Of one step on one chip.

    Attributes:
      compiler_cycles: Sum of the compiler's own estimates.
      lines: By source line, all that is in `cycles`.
      kernels: By name and source line, custom calls, counted here.
      others: What else is counted here, by its bytes.
      collectives: By kind, their bytes; no cycles.
      copies: Copies that run beside the computing, their bytes; no cycles.
    """

    compiler_cycles: float = 0.0
    lines: dict[str, Cost] = dataclasses.field(default_factory=_costs)
    kernels: dict[str, Cost] = dataclasses.field(default_factory=_costs)
    others: Cost = dataclasses.field(default_factory=Cost)
    collectives: dict[str, Cost] = dataclasses.field(default_factory=_costs)
    copies: Cost = dataclasses.field(default_factory=Cost)

    @property
    def cycles(self) -> float:
        """The compiler's and those counted here."""
        counted = [*self.kernels.values(), self.others]
        return self.compiler_cycles + sum(cost.cycles for cost in counted)


def count(text: str, chip: Chip) -> Costs:
    """Counts what `jax.stages.Compiled.as_text()` returns of a program for the chip.

    Raises:
      RunError: It holds something that cannot be counted.
    """
    counter = _Counter(parse(text), chip)
    counter.run(counter.program.entry, 1)
    return counter.costs


class _Counter:
    def __init__(self, program: Program, chip: Chip):
        self.program, self.chip = program, chip
        self.costs = Costs()
        self.channels: set[tuple[str, str]] = set()

    def run(self, name: str, times: int) -> None:
        computation = self.program.computations[name]
        for instruction in computation.values():
            self._count(computation, instruction, times)

    def _count(self, computation: Computation, i: Instruction, times: int) -> None:
        if i.opcode.removesuffix("-start") in _COLLECTIVES:
            self._add_collective(computation, i, times)
        elif i.opcode == "while":
            trips = _trip_count(self.program, computation, i)
            self.run(_callee(i, "body"), times * trips)
        elif i.opcode in ("call", "async-start"):
            self.run(_callee(i, "to_apply", "calls"), times)
        elif i.opcode == "conditional":
            raise RunError(
                f"the program branches at {self.program.source(i)} ({i.name}), and "
                "what a branch costs depends on data; write it without jax.lax.cond"
            )
        elif i.opcode.endswith("-done"):
            is_copy = i.opcode.removesuffix("-done") not in (*_COLLECTIVES, "async")
            if is_copy:
                self.costs.copies.add(times, bytes=i.num_bytes)
        elif i.opcode in _FREE or i.opcode.endswith(("-start", "-update")):
            return
        elif i.opcode == "custom-call":
            self._add_kernel(computation, i, times)
        else:
            self._add_computed(computation, i, times)

    def _add_computed(self, computation: Computation, i: Instruction, times: int):
        holds_collective = i.opcode == "fusion" and self._add_inner(i, times)
        stated = re.search(r'"estimated_cycles":"(\d+)"', i.attributes)
        if stated:
            cycles = float(stated[1])
            self.costs.compiler_cycles += times * cycles
        elif holds_collective:
            return
        else:
            self._refuse_products(i)
            num_bytes = _own_bytes(computation, i)
            cycles = self._cycles(0, num_bytes)
            self.costs.others.add(times, cycles=cycles, bytes=num_bytes)
        self.costs.lines[self.program.source(i)].add(times, cycles=cycles)

    def _add_inner(self, fusion: Instruction, times: int) -> bool:
        """Adds the collectives inside of a fusion; returns whether it has any."""
        inner = self.program.computations[_callee(fusion, "calls")]
        found = False
        for i in inner.values():
            if i.opcode.removesuffix("-start") in _COLLECTIVES:
                self._add_collective(inner, i, times)
                found = True
            elif i.opcode == "fusion":
                found |= self._add_inner(i, times)
        return found

    def _add_collective(self, computation: Computation, i: Instruction, times: int):
        kind = i.opcode.removesuffix("-start")
        channel = i.attribute("channel_id")
        if channel is not None:
            # One that runs beside others appears in each of them.
            if (kind, channel) in self.channels:
                return
            self.channels.add((kind, channel))
        given = _operand_bytes(computation, i)
        # What starts one returns what it was given too.
        made = i.num_bytes - (given if i.opcode.endswith("-start") else 0)
        self.costs.collectives[kind].add(times, bytes=max(given, made))

    def _add_kernel(self, computation: Computation, i: Instruction, times: int):
        target = i.attribute("custom_call_target")
        if target in _FREE_TARGETS:
            return
        source = self.program.source(i)
        stated = re.search(r'"cost_estimate":(\{[^}]*\})', i.attributes)
        if not stated:
            raise RunError(
                f"the custom call {i.name} ({target}) at {source} tells no FLOPs, so "
                "it cannot be counted; give its pl.pallas_call a cost_estimate"
            )
        estimate = json.loads(stated[1])
        flops = int(estimate.get("flops", 0))
        stated_bytes = int(estimate.get("bytes_accessed", 0))
        num_bytes = max(_own_bytes(computation, i), stated_bytes)
        cycles = self._cycles(flops, num_bytes)
        kernel = f"{re.sub(r'[.0-9]+$', '', i.name)} {source}"
        self.costs.kernels[kernel].add(
            times, cycles=cycles, bytes=num_bytes, flops=flops
        )
        self.costs.lines[source].add(times, cycles=cycles)

    def _cycles(self, flops: int, num_bytes: int) -> float:
        computing = flops / (_KERNEL_SHARE * self.chip.peak_flops)
        return self.chip.clock * max(computing, num_bytes / self.chip.hbm_bandwidth)

    def _refuse_products(self, i: Instruction) -> None:
        inner = {}
        if i.opcode == "fusion":
            inner = self.program.computations[_callee(i, "calls")]
        opcodes = {i.opcode, *(x.opcode for x in inner.values())}
        if opcodes & {"dot", "convolution"}:
            raise RunError(
                f"the compiler gives {i.name} at {self.program.source(i)} no cycles, "
                "though it multiplies matrices; another libtpu may"
            )


def _callee(i: Instruction, *names: str) -> str:
    found = [callee for name in names if (callee := i.attribute(name))]
    if not found:
        raise RunError(f"{i.opcode} {i.name} names no computation; is the text whole?")
    return found[0]


def _operand_bytes(computation: Computation, i: Instruction) -> int:
    return sum(computation[name].num_bytes for name in i.operands)


def _own_bytes(computation: Computation, i: Instruction) -> int:
    return i.num_bytes + _operand_bytes(computation, i)


def _trip_count(program: Program, caller: Computation, loop: Instruction) -> int:
    """How often the body of a `while` runs.

    The compiler may say it. Else the loop must count: its condition compares one
    element of its tuple with a constant, and its body adds a constant to that element.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    condition = program.computations[_callee(loop, "condition")]
    body = program.computations[_callee(loop, "body")]
    compare, results = _root(condition), _root(body)
    begin = _follow(caller, loop.operands[0])

    def constant(computation: Computation, name: str) -> int | None:
        """The value of a constant, or of an element that the body leaves as it is."""
        i = _follow(computation, name)
        if i.opcode == "constant" and re.fullmatch(r"-?\d+", i.content):
            return int(i.content)
        index = _element(i)
        if index is None or computation is caller:
            return None
        is_kept = _element(_follow(body, results.operands[index])) == index
        return constant(caller, begin.operands[index]) if is_kept else None

    if (
        compare.attribute("direction") == "LT"
        and results.opcode == begin.opcode == "tuple"
        and (index := _element(_follow(condition, compare.operands[0]))) is not None
    ):
        step = _follow(body, results.operands[index])
        if step.opcode == "add" and _element(_follow(body, step.operands[0])) == index:
            first = constant(caller, begin.operands[index])
            limit = constant(condition, compare.operands[1])
            stride = constant(body, step.operands[1])
            if first is not None and limit is not None and stride:
                return max(0, math.ceil((limit - first) / stride))
    raise RunError(
        f"the loop {loop.name} at {program.source(loop)} does not count to a constant, "
        "so its cost is unknown; use jax.lax.scan, or fori_loop with fixed bounds"
    )


def _root(computation: Computation) -> Instruction:
    return next(i for i in computation.values() if i.is_root)


def _element(i: Instruction) -> int | None:
    """Which element of its tuple an instruction takes; None if it does not."""
    if i.opcode != "get-tuple-element":
        return None
    return int(i.attribute("index") or 0)


def _follow(computation: Computation, name: str) -> Instruction:
    """What an operand is, through copies."""
    i = computation[name]
    while i.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        i = computation[i.operands[0]]
    return i
