"""Reads the text of a compiled program: computations, instructions, source lines."""

import dataclasses
import math
import pathlib
import re

from personmae_jax.errors import RunError

_PACKAGE = str(pathlib.Path(__file__).parents[1]) + "/"

# NAME = SHAPE OPCODE(OPERANDS), ATTRIBUTES. A shape has no blank before a word and "(".
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruction:
    """One line of a computation, its shape and attributes as text."""

    name: str
    is_root: bool
    shape: str
    opcode: str
    operands: tuple[str, ...]
    content: str  # between the brackets, e.g. the value of a constant
    attributes: str

    def attribute(self, name: str) -> str | None:
        """Returns the word or number of NAME=..., without its %."""
        found = re.search(rf"\b{name}=%?\"?([\w.\-]+)", self.attributes)
        return found and found[1]

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.shape)


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """Attributes: `entry` names the computation that runs; `frames` the call stacks."""

    entry: str
    computations: dict[str, Computation]
    frames: dict[int, tuple[str, int]]  # id -> ("file:line", id of the caller or 0)

    def source(self, instruction: Instruction) -> str:
        """Returns "file:line < file:line", of our package, that asked for it.

        The innermost such line and the one that called it; else the innermost line at
        all, else "no source line"; "(backward)" after it in the backward pass.
        """
        frame = int(instruction.attribute("stack_frame_id") or 0)
        innermost = self.frames[frame][0] if frame in self.frames else "no source line"
        ours = []
        while frame in self.frames and len(ours) < 2:
            where, frame = self.frames[frame]
            if where.startswith(_PACKAGE):
                ours.append(where.removeprefix(_PACKAGE))
        line = " < ".join(ours) or innermost
        is_backward = "transpose(jvp" in instruction.attributes
        return line + (" (backward)" if is_backward else "")


def parse(text: str) -> Program:
    """Reads what `jax.stages.Compiled.as_text()` returns.

    Raises:
      RunError: It holds no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, current = None, None
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            instruction = _read(*found.groups())
            current[instruction.name] = instruction
    if entry is None:
        raise RunError("the compiled text has no ENTRY computation; is it HLO?")
    return Program(entry=entry, computations=computations, frames=_read_frames(text))


def num_bytes(shape: str) -> int:
    """Bytes of an array's shape, or of all arrays of a tuple's, without padding."""
    total = 0
    for dtype, sizes in _ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int((re.findall(r"\d+", dtype) or [0])[0])
        count = math.prod(int(size) for size in sizes.split(",") if size)
        total += math.ceil(count * bits / 8)
    return total


def _read(root, name: str, shape: str, opcode: str, rest: str) -> Instruction:
    depth = 1
    for end, character in enumerate(rest):  # noqa: B007
        depth += (character == "(") - (character == ")")
        if depth == 0:
            break
    return Instruction(
        name=name,
        is_root=root is not None,
        shape=shape,
        opcode=opcode,
        operands=tuple(re.findall(r"%([\w.\-]+)", rest[:end])),
        content=rest[:end],
        attributes=rest[end + 1 :],
    )


def _read_frames(text: str) -> dict[int, tuple[str, int]]:
    files = {i: row.strip('"') for i, row in _table(text, "FileNames").items()}
    lines = {}
    for i, row in _table(text, "FileLocations").items():
        numbers = dict(re.findall(r"(\w+)=(\d+)", row))
        lines[i] = f"{files[int(numbers['file_name_id'])]}:{numbers['line']}"
    frames = {}
    for i, row in _table(text, "StackFrames").items():
        numbers = dict(re.findall(r"(\w+)=(\d+)", row))
        # The ids of frames begin at 1, and those of callers are printed one too high.
        caller = min(int(numbers["parent_frame_id"]), i) - 1
        frames[i] = lines[int(numbers["file_location_id"])], caller
    return frames


def _table(text: str, name: str) -> dict[int, str]:
    """Rows "ID VALUE" under a line that holds nothing but the name."""
    rows = {}
    start = re.search(rf"^{name}$\n", text, re.MULTILINE)
    for line in text[start.end() :].splitlines() if start else []:
        if not (row := re.match(r"(\d+) (.*)", line)):
            break
        rows[int(row[1])] = row[2]
    return rows
