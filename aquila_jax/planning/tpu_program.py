"""How long a compiled TPU program takes, by its own text: an honest sum.

XLA's `cost_analysis` counts a loop's body once and sees nothing of a Pallas
kernel, so that a program which scans more looks faster. Here every instruction
counts as often as the loops around it run:

- what the compiler has an estimate for, by `estimated_cycles` of its text;
- Pallas kernels, by their schedule (tpu_schedule.py), if it is given, or by the
  bytes that they say they move, over the memory's rate, if these take longer;
- collectives, by their bytes over the links that their group spans;
- the rest by the bytes that it reads and writes, over the memory's rate.

The compiler lets some collectives run beside compute: it has them start, fuses
their steps into kernels and products, and waits for them. As it is scheduled so
much of them is hidden as the compute takes that they are fused into
(`Estimate.as_scheduled`). Two bounds stand beside it: nothing hides, or all
collectives do. Copies between memories are taken to be hidden. Of the branches
of a conditional the longest counts, of those that are not said to be rare.

Collectives on a torus, V bytes being the whole array and n the dimensions of
the torus that a group spans, each with links in both directions at W bytes a
second together (Austin et al., "How to Scale Your Model", section 3):

  all-gather, reduce-scatter   V / (n W)
  all-reduce                   2 V / (n W)
  all-to-all                   v k / (4 W)
  collective-permute           v / (W / 2)

where v bytes are what one device has, and k chips the longest of the group's
dimensions: on a ring of k what is sent goes k / 4 links on average.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """What a device of JAX can do a second."""

  cycles: float
  flops: float  # bfloat16
  memory_bytes: float
  link_bytes: float  # along one dimension of the torus, both directions

  @classmethod
  def of(cls, device_kind: str) -> Chip:
    """The chip of that `device_kind`.

    FLOPs and memory: Google's pages of each; links: "How to Scale Your Model",
    section 3. Clock: the FLOPs over those of a cycle's matrix units.

    Raises:
      KeyError: of another.
    """
    return _CHIPS[device_kind]


_CHIPS = {
  "TPU v5 lite": Chip(
    cycles=1.5e9, flops=1.97e14, memory_bytes=8.1e11, link_bytes=9e10
  ),
  "TPU v5": Chip(
    cycles=1.75e9, flops=4.59e14, memory_bytes=2.765e12, link_bytes=1.8e11
  ),
  "TPU v6 lite": Chip(
    cycles=1.75e9, flops=9.18e14, memory_bytes=1.64e12, link_bytes=1.8e11
  ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """An instruction, with the loops around it."""

  name: str
  opcode: str
  trips: int
  seconds: float  # of all trips
  source: str  # estimate, schedule, bytes, link, wait
  bytes: int = 0  # of a collective's array, or of what `bytes` is by; of a trip
  op_name: str = ""
  group: tuple[int, ...] = ()  # of a collective: devices, in the mesh's order
  # Collectives by their channels: one that starts here and is waited for later,
  # those that are fused into this compute, or one that is waited for.
  starts: int | None = None
  carries: tuple[int, ...] = ()
  waits: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
  """A program's parts, and their sums in seconds."""

  parts: tuple[Part, ...]
  # Kernels that no schedule was given for: they count nothing.
  unknown_kernels: tuple[str, ...]
  # Loops whose trips the text does not tell: they count once.
  unknown_loops: tuple[str, ...]

  def seconds(self, *sources: str) -> float:
    """Of the parts of these sources; of all, if none is named."""
    return math.fsum(
      part.seconds
      for part in self.parts
      if not sources or part.source in sources
    )

  @property
  def without_overlap(self) -> float:
    """One after the other."""
    return self.seconds()

  @property
  def as_scheduled(self) -> float:
    """Collectives beside the compute that they are fused into, as it stands."""
    remaining: dict[int, float] = {}
    total = 0.0
    for part in self.parts:
      if part.starts is not None:
        remaining[part.starts] = part.seconds
        continue
      total += part.seconds
      free = part.seconds
      for channel in part.carries:
        hidden = min(free, remaining.get(channel, 0.0))
        free -= hidden
        remaining[channel] = remaining.get(channel, 0.0) - hidden
      if part.waits is not None:
        total += remaining.pop(part.waits, 0.0)
    return total + math.fsum(remaining.values())

  @property
  def with_full_overlap(self) -> float:
    """Collectives and compute beside each other from start to end."""
    links = self.seconds("link")
    return max(links, self.seconds() - links)

  def collectives(self) -> dict[str, tuple[int, int, float]]:
    """By opcode: how many run, the bytes of their arrays, seconds."""
    found: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0, 0.0])
    for part in self.parts:
      if part.source == "link":
        row = found[part.opcode]
        row[0] += part.trips
        row[1] += part.trips * part.bytes
        row[2] += part.seconds
    return {
      name: (int(count), int(size), seconds)
      for name, (count, size, seconds) in found.items()
    }


# What a group spans: coordinates of every device, by its number.
Coordinates = Sequence[Sequence[int]]


def estimate(
  text: str,
  *,
  chip: Chip,
  coordinates: Coordinates,
  kernel_cycles: Mapping[str, int] | None = None,
  moved_share: Callable[[str], float] = lambda op_name: 1.0,
  rare: Sequence[str] = (),
) -> Estimate:
  """Reads a compiled program.

  Args:
    text: of `compiled.as_text()`, after all passes.
    chip: that it was compiled for.
    coordinates: of the devices on the torus, in the order of the mesh:
      `[d.coords for d in mesh.devices.flat]`.
    kernel_cycles: of one run of each Pallas kernel, by its instruction's name.
      Kernels with the same body are compiled once, in the name of one of them:
      the others may be missing. None takes less time than what it says that
      it moves (`pallas_call`'s `cost_estimate`).
    moved_share: of what a kernel says that it moves, what it does, by its
      `op_name`, `jit(step)/.../NAME/pallas_call`.
    rare: names of scopes (`jax.named_scope`): a branch that is of one of them
      is not counted where another is not.

  Returns:
    The estimate.
  """
  program = _Program(text)
  reader = _Reader(
    program=program,
    chip=chip,
    coordinates=coordinates,
    kernel_cycles=kernel_cycles or {},
    moved_share=moved_share,
    rare=rare,
  )
  parts = tuple(reader.computation(program.entry, trips=1))
  return Estimate(
    parts=parts,
    unknown_kernels=tuple(dict.fromkeys(reader.unknown_kernels)),
    unknown_loops=tuple(dict.fromkeys(reader.unknown_loops)),
  )


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  arguments: str  # as they stand; the value of a constant
  rest: str  # what stands behind the operands


_HEADER = re.compile(r"(ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_ASSIGNMENT = re.compile(r"\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = ")
_OPCODE = re.compile(r"\s*(?P<opcode>[\w\-]+)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"(?P<dtype>[a-z]+[0-9]*(?:e\d\w*)?)\[(?P<dims>[0-9,]*)\]")
# In the place of an estimate where the compiler has none.
_NO_ESTIMATE = 2**62
_MOVED = re.compile(r'"bytes_accessed":"(\d+)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_BODY = re.compile(r'"body": ?"([^"]*)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_BITS = re.compile(r"\d+")


class _Program:
  """Computations by name, of the text of a module."""

  def __init__(self, text: str):
    self.computations: dict[str, list[_Instruction]] = {}
    self.entry = ""
    inside: list[_Instruction] = []
    for line in _whole_lines(text):
      header = _HEADER.match(line)
      if header is not None and not line.startswith(" "):
        inside = self.computations.setdefault(header["name"], [])
        if header[1]:
          self.entry = header["name"]
        continue
      assigned = _ASSIGNMENT.match(line)
      if assigned is not None:
        inside.append(_instruction(assigned["name"], line[assigned.end() :]))

  def called(self, fusion: _Instruction) -> list[_Instruction]:
    """What a fusion is made of."""
    return self.computations.get(_called(fusion, "calls") or "", [])


def _whole_lines(text: str) -> Iterator[str]:
  """Lines, those put together that an attribute with line breaks has cut."""
  whole = ""
  for line in text.splitlines():
    begins = line in ("", "}") or _HEADER.match(line) or _ASSIGNMENT.match(line)
    if begins:
      yield whole
      whole = line
    else:
      whole += line
  yield whole


def _instruction(name: str, code: str) -> _Instruction:
  end = _closing(code, 0) + 1 if code.startswith("(") else code.index(" ")
  opcode = _OPCODE.match(code, end)
  assert opcode is not None, code[:200]
  closing = _closing(code, opcode.end() - 1)
  return _Instruction(
    name=name,
    shape=code[:end],
    opcode=opcode["opcode"],
    operands=tuple(_NAME.findall(code[opcode.end() : closing])),
    arguments=code[opcode.end() : closing],
    rest=code[closing + 1 :],
  )


def _closing(text: str, start: int) -> int:
  """Where the parenthesis at `start` is closed."""
  depth = 0
  for i in range(start, len(text)):
    depth += {"(": 1, ")": -1}.get(text[i], 0)
    if depth == 0:
      return i
  raise ValueError(f"an open parenthesis: {text[start : start + 100]!r}")


def _size(shape: str) -> int:
  """Bytes of an array, or of all arrays of a tuple."""
  total = 0
  for array in _ARRAY.finditer(shape):
    bits = _BITS.search(array["dtype"])
    width = 1 if bits is None else max(1, int(bits.group()) // 8)
    dims = [int(size) for size in array["dims"].split(",") if size]
    total += width * math.prod(dims)
  return total


_LIST = re.compile(r"replica_groups=\{\{([0-9,]*)\}")
_IOTA = re.compile(
  r"replica_groups=\[(?P<groups>[0-9,]+)\]<=\[(?P<dims>[0-9,]+)\]"
  r"(?:T\((?P<order>[0-9,]+)\))?"
)
_MESH = re.compile(
  r"replica_groups=mesh\[(?P<axes>[^\]]*)\] \{(?P<over>[^}]*)\}"
)
_PAIRS = re.compile(r"source_target_pairs=\{\{(\d+),(\d+)\}")


def _first_group(rest: str, *, num_devices: int) -> list[int]:
  """The devices of a collective's first group."""
  listed = _LIST.search(rest)
  if listed is not None:
    return _numbers(listed[1])
  iota = _IOTA.search(rest)
  if iota is not None:
    shape, dims = _numbers(iota["groups"]), _numbers(iota["dims"])
    devices = np.arange(num_devices).reshape(dims)
    if iota["order"]:
      devices = devices.transpose(_numbers(iota["order"]))
    return devices.reshape(shape)[0].tolist()
  mesh = _MESH.search(rest)
  if mesh is not None:
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh["axes"]))
    over = set(re.findall(r"'(\w+)'", mesh["over"]))
    devices = np.arange(num_devices).reshape([int(n) for n in sizes.values()])
    at = tuple(slice(None) if axis in over else 0 for axis in sizes)
    return devices[at].reshape(-1).tolist()
  pair = _PAIRS.search(rest)
  if pair is not None:
    return [int(pair[1]), int(pair[2])]
  return list(range(num_devices))


def _numbers(text: str) -> list[int]:
  return [int(number) for number in text.split(",") if number]


def _called(instruction: _Instruction, attribute: str) -> str | None:
  found = re.search(rf"\b{attribute}=%?([\w.\-]+)", instruction.rest)
  return None if found is None else found[1]


# What takes no time of its own: names for parts of arrays, and what stands for
# the end of something that has begun elsewhere.
_FREE = {
  "add-dependency",
  "after-all",
  "bitcast",
  "constant",
  "get-tuple-element",
  "opt-barrier",
  "parameter",
  "partition-id",
  "replica-id",
  "tuple",
  # Copies between memories, beside everything else.
  "copy-start",
  "copy-done",
}
# Of the whole array V, by what a link carries; see the module.
_LINKS = {"all-gather": 1.0, "reduce-scatter": 1.0, "all-reduce": 2.0}
_ALL_TO_ALL = ("all-to-all", "ragged-all-to-all")
_COLLECTIVES = (*_LINKS, *_ALL_TO_ALL, "collective-permute")


class _Reader:
  def __init__(
    self,
    *,
    program: _Program,
    chip: Chip,
    coordinates: Coordinates,
    kernel_cycles: Mapping[str, int],
    moved_share: Callable[[str], float],
    rare: Sequence[str],
  ):
    self.program = program
    self.chip = chip
    self.coordinates = coordinates
    self.kernel_cycles = self._with_twins(kernel_cycles)
    self.moved_share = moved_share
    self.rare = set(rare)
    self.unknown_kernels: list[str] = []
    self.unknown_loops: list[str] = []

  def _with_twins(self, kernel_cycles: Mapping[str, int]) -> dict[str, int]:
    bodies = {}
    for instructions in self.program.computations.values():
      for one in instructions:
        fused = one.opcode == "fusion"
        # With the steps of a collective it is another program.
        for kernel in self.program.called(one) if fused else [one]:
          found = _BODY.search(kernel.rest)
          if found is not None:
            bodies[one.name] = found[1], fused
    of_body = {
      body: kernel_cycles[name]
      for name, body in bodies.items()
      if name in kernel_cycles
    }
    twins = {
      name: of_body[body] for name, body in bodies.items() if body in of_body
    }
    return dict(kernel_cycles) | twins

  def computation(self, name: str, *, trips: int) -> Iterator[Part]:
    """The parts of a computation that runs `trips` times."""
    instructions = self.program.computations[name]
    shapes = {one.name: one.shape for one in instructions}
    for one in instructions:
      yield from self._instruction(one, shapes, trips=trips)

  def _instruction(
    self, one: _Instruction, shapes: Mapping[str, str], *, trips: int
  ) -> Iterator[Part]:
    opcode = one.opcode
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
      return
    if opcode == "while":
      body = _called(one, "body")
      assert body is not None, one
      yield from self.computation(body, trips=trips * self._trips(one))
    elif opcode == "conditional":
      yield from self._longest(one, trips=trips)
    elif opcode in ("call", "call-start", "async-start"):
      called = _called(one, "to_apply") or _called(one, "calls")
      called = called or _called(one, "called_computation")
      assert called is not None, one
      yield from self.computation(called, trips=trips)
    elif opcode.removesuffix("-start") in _COLLECTIVES:
      yield self._collective(one, shapes, trips=trips)
    elif opcode == "fusion" and (inside := self._collectives_in(one)):
      yield self._beside(one, inside, shapes, trips=trips)
    else:
      yield self._compute(one, shapes, trips=trips)

  def _collectives_in(self, one: _Instruction) -> list[_Instruction]:
    """Of a fusion: those that start, go on or end in it."""
    return [
      each for each in self.program.called(one) if each.opcode in _COLLECTIVES
    ]

  def _beside(
    self,
    one: _Instruction,
    collectives: list[_Instruction],
    shapes: Mapping[str, str],
    *,
    trips: int,
  ) -> Part:
    """A fusion in which collectives start, are waited for, or go on."""
    instructions = self.program.called(one)
    targets = {_target(each) for each in instructions}
    channels = [_channel(each) for each in collectives]
    if _STARTS in targets:
      inside = {each.name: each.shape for each in instructions}
      part = self._collective(collectives[0], inside, trips=trips)
      return dataclasses.replace(part, starts=channels[0])
    if _WAITS in targets:
      return Part(
        name=one.name,
        opcode="wait",
        trips=trips,
        seconds=0.0,
        source="wait",
        waits=channels[0],
      )
    kernels = [each for each in instructions if _is_kernel(each)]
    if not kernels:
      part = self._compute(one, shapes, trips=trips)
      return dataclasses.replace(part, carries=tuple(channels))
    # Compiled with the collective's steps, in the name of the fusion.
    names = one.name, kernels[0].name
    part = self._kernel(kernels[0], names=names, trips=trips)
    return dataclasses.replace(
      part,
      name=one.name,
      op_name=_op_name(one),
      carries=tuple(channels),
    )

  def _kernel(
    self, one: _Instruction, *, names: Sequence[str], trips: int
  ) -> Part:
    """What it issues, under the first known name, or waits for."""
    known = [self.kernel_cycles[n] for n in names if n in self.kernel_cycles]
    if not known:
      self.unknown_kernels.append(names[0])
    moved = _MOVED.search(one.rest)
    size = int(moved[1]) if moved else 0
    fetching = size * self.moved_share(_op_name(one)) / self.chip.memory_bytes
    return Part(
      name=one.name,
      opcode=one.opcode,
      trips=trips,
      seconds=trips * max((known or [0])[0] / self.chip.cycles, fetching),
      source="schedule",
      bytes=size,
      op_name=_op_name(one),
    )

  def _longest(self, one: _Instruction, *, trips: int) -> list[Part]:
    branches = re.search(r"branch_computations=\{([^}]*)\}", one.rest)
    if branches is None:
      names = [
        _called(one, "true_computation"),
        _called(one, "false_computation"),
      ]
    else:
      names = _NAME.findall(branches[1])
    options = [
      list(self.computation(name, trips=trips))
      for name in names
      if name is not None
    ]
    usual = [parts for parts in options if not self._is_rare(parts)]
    return max(
      usual or options, key=lambda parts: sum(part.seconds for part in parts)
    )

  def _is_rare(self, parts: list[Part]) -> bool:
    """Whether most of them are of such a scope.

    Functions that branches share are compiled once, under the name of one.
    """
    # jit(step)/transpose(jvp(scope))/add
    named = [re.findall(r"[^/()]+", part.op_name) for part in parts]
    rare = sum(not self.rare.isdisjoint(scopes) for scopes in named)
    return 2 * rare > len(parts)

  def _trips(self, loop: _Instruction) -> int:
    """Of a loop that counts from 0 by ones to a constant."""
    stated = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    if stated is not None:
      return int(stated[1])
    condition = _called(loop, "condition")
    assert condition is not None, loop
    bounds = [
      int(one.arguments)
      for one in self.program.computations[condition]
      if one.opcode == "constant" and one.arguments.isdigit()
    ]
    if len(bounds) != 1:
      self.unknown_loops.append(loop.name)
      return 1
    return bounds[0]

  def _collective(
    self, one: _Instruction, shapes: Mapping[str, str], *, trips: int
  ) -> Part:
    opcode = one.opcode.removesuffix("-start")
    group = _first_group(one.rest, num_devices=len(self.coordinates))
    # The result of a start also holds its operand.
    inputs = sum(_size(shapes[name]) for name in one.operands)
    outputs = _size(one.shape)
    if one.opcode.endswith("-start"):
      outputs = max(outputs - inputs, inputs)
    whole = max(inputs, outputs)
    spanned, link = self._spanned(group), self.chip.link_bytes
    if opcode == "collective-permute":
      seconds = whole / (link / 2)
    elif opcode in _ALL_TO_ALL:
      seconds = whole * max(spanned) / (4 * link)
    else:
      seconds = _LINKS[opcode] * whole / (link * len(spanned))
    return Part(
      name=one.name,
      opcode=opcode,
      trips=trips,
      seconds=trips * seconds,
      source="link",
      bytes=whole,
      op_name=_op_name(one),
      group=tuple(group),
    )

  def _spanned(self, group: Sequence[int]) -> list[int]:
    """Chips along each dimension of the torus that a group spans."""
    places = [self.coordinates[device] for device in group]
    chips = [len(set(along)) for along in zip(*places, strict=True)]
    return [count for count in chips if count > 1] or [1]

  def _compute(
    self, one: _Instruction, shapes: Mapping[str, str], *, trips: int
  ) -> Part:
    if _is_kernel(one):
      return self._kernel(one, names=[one.name], trips=trips)
    cycles = _CYCLES.search(one.rest)
    size, source = 0, "estimate"
    if cycles is not None and int(cycles[1]) < _NO_ESTIMATE:
      seconds = int(cycles[1]) / self.chip.cycles
    else:
      source = "bytes"
      size = _size(one.shape)
      size += sum(_size(shapes[name]) for name in one.operands)
      if one.opcode == "custom-call":
        size = 0  # buffers and markers of the compiler
      seconds = size / self.chip.memory_bytes
    return Part(
      name=one.name,
      opcode=one.opcode,
      trips=trips,
      seconds=trips * seconds,
      source=source,
      bytes=size,
      op_name=_op_name(one),
    )


# Of a fusion that has a collective start, and of one that waits for it.
_STARTS, _WAITS = "AsyncCollectiveStart", "AsyncCollectiveDone"
_KERNEL = "tpu_custom_call"
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")


def kernel_names(text: str) -> set[str]:
  """The instructions of a program, fusions among them, with Pallas kernels."""
  program = _Program(text)
  return {
    one.name
    for instructions in program.computations.values()
    for one in instructions
    if _is_kernel(one)
    or (one.opcode == "fusion" and any(map(_is_kernel, program.called(one))))
  }


def _is_kernel(one: _Instruction) -> bool:
  return _target(one) == _KERNEL


def _target(one: _Instruction) -> str | None:
  if one.opcode != "custom-call":
    return None
  found = _TARGET.search(one.rest)
  return None if found is None else found[1]


def _channel(one: _Instruction) -> int:
  found = _CHANNEL.search(one.rest)
  assert found is not None, one
  return int(found[1])


def _op_name(one: _Instruction) -> str:
  found = _OP_NAME.search(one.rest)
  return "" if found is None else found[1]
