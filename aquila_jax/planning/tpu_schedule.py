"""How long a function takes on a TPU that is not there, by its schedule.

The TPU compiler runs on any machine (`pip install libtpu`). For every fusion
and every Pallas kernel it can write down the bundles of instructions that a
core issues, about one a cycle. Each loop's bundles times its trips, summed over
the program, are a clock without noise:

  clock = tpu_schedule.Clock("v6e:2x2")
  print(clock.measure(f, jax.ShapeDtypeStruct((8192, 64), jnp.float32)).cycles)

What it does not see: waiting for memory where copies are not hidden behind
compute, collectives, and which side of a branch is taken, so that both count
(`Kernel.branches` says how much that is; who knows better says so, by `Taken`).
A loop whose trips do not stand in
the code counts once, and is named in `Kernel.unknown_loops`. What is the same
is compiled, and counted, once, however often it is called.

Nor that a matrix unit may be slower than its instructions are issued: on v5p
the bundles of a large matmul are 0.77 of the time at the published rate. So
`Kernel.products` has the instructions.

On chips whose device is two cores (v4, v5p) the cycles are those of one core:
XLA splits a fusion over both, Mosaic a kernel along a parallel grid dimension.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import math
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Container, Iterator
from typing import Any

import jax
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding

from aquila_jax.planning import tpu_program

_FLAGS = (
  "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
  " --xla_jf_dump_llo_pass_label_regex=.*final_bundles.*"
)
# What the compiler says of the memory that it has assigned.
REPORT = "*.after_optimizations-memory-usage-report.txt"
_TOTAL = re.compile(r"Memory Space: default[^\n]*\nTotal bytes: (\d+)")
# NUMBER-NAME-PASS-final_bundles.txt; not the analysis beside it, and not what
# frames the program.
_FILE = re.compile(r"\d+-(?P<name>[^<].*)-\d+-final_bundles\.txt")
_FRAME = "TLP"
# Of a matrix instruction, at least (`Kernel.cycles_of`).
PRODUCT_CYCLES = 4
_LINE = re.compile(
  r"\s*(?:0x[0-9a-f]+|0)\s+(?P<label>[A-Z]{2}[A-Z ]*)?\s*:\s*"
  r"(?P<depth>>*)\s*\{(?P<code>.*)$"
)
_COMMENT = re.compile(r"/\*.*?\*/")
_GRID = re.compile(r"iteration_bounds: \((?P<sizes>[0-9, ]*)\)")
_DEFINITION = re.compile(
  r"(?P<name>%[a-z]+\d+)(?:_[a-z0-9]+)? = (?P<op>[a-z0-9_.]+)(?P<rest>[^;}]*)"
)
_PHI = re.compile(r"(%s\d+)(?:_s\d+)? = sphi (%s\d+)\S*, (%s\d+)")
_NAME = re.compile(r"%[a-z]+\d+")
# The stages of a pipeline, of copies, are trips of their own.
_STAGE = re.compile(r"iteration index, stage = (\d+)")
# Within a loop so many bundles can be marked as of the loop around it, where
# the scheduler has filled free slots with its instructions.
_FOREIGN = 4
# What a jump passes over ends where its target is named.
_JUMP = re.compile(r"sbr\.rel \(!?%p[^)]*\) target = \$region(?P<region>\d+)")
_TARGET = re.compile(r"Start/End empty region (?P<region>\d+)\b")
# The size of a dimension of a grid that the program computes.
_DYNAMIC = 2**31 - 1
# An operand of a vector instruction that was moved to memory for want of a
# register, and back.
_SPILL = re.compile(r"v(?:st|ld)[^;]*_spill\]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
  """Bundles [start, end) of a kernel, run `trips` times."""

  start: int
  end: int
  depth: int  # 1 is outermost
  trips: int | None  # None: not in the code
  # Where a grid has a dimension whose size the program computes, all others.
  known_trips: int = 1

  def holds(self, branch: Branch) -> bool:
    """Whether a branch is inside of it."""
    return self.start <= branch.start and branch.end <= self.end


@dataclasses.dataclass(frozen=True, kw_only=True)
class Branch:
  """Bundles [start, end) of a kernel that a jump can pass over."""

  start: int
  end: int

  @property
  def bundles(self) -> int:
    """How many."""
    return self.end - self.start


@dataclasses.dataclass(frozen=True, kw_only=True)
class Taken:
  """In what share of its steps a kernel takes its branches."""

  computing: float = 1.0  # with matrix instructions
  others: float = 1.0  # without any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
  """A fusion, or a Pallas kernel, of a compiled program."""

  name: str
  bundles: int
  cycles: int  # bundles, each times the trips of the loops around it
  loops: tuple[Loop, ...]
  spills: int  # vector registers stored to or loaded from memory, inside loops
  branches: tuple[Branch, ...] = ()  # in the order of the code
  products: tuple[int, ...] = ()  # matrix instructions of every bundle

  def cycles_of(self, dynamic_trips: int, *, taken: Taken | None = None) -> int:
    """As `cycles`, which of a kernel that multiplies tiles can be known better.

    Of innermost branches with matrix instructions one is taken in a step (with
    a mask and without, say): the longest. A step takes at least 4 cycles for a
    matrix instruction: a v5p core has 4 units in which one takes 16, v6e 2 in
    which it takes 8, by their published rates at 1.75 GHz.

    Args:
      dynamic_trips: of a grid's dimension whose size the program computes.
      taken: how often branches are; None is in every step.

    Returns:
      The cycles.
    """
    taken = taken or Taken()
    cycles = self.cycles
    for loop in self.loops:
      if loop.depth != 1:
        continue
      computing = [b for b in self.computing if loop.holds(b)]
      others = [b for b in self.without_products if loop.holds(b)]
      trips = loop.trips or dynamic_trips * loop.known_trips
      longest = max((b.bundles for b in computing), default=0)
      bundles = loop.end - loop.start + taken.computing * longest
      bundles -= sum(b.bundles for b in computing)
      bundles -= (1 - taken.others) * sum(b.bundles for b in others)
      issued = max(
        (
          taken.computing * sum(self.products[b.start : b.end])
          for b in computing
        ),
        default=sum(self.products[loop.start : loop.end]),
      )
      counted = (loop.end - loop.start) * (loop.trips or 1)
      step = max(bundles, PRODUCT_CYCLES * issued)
      cycles += round(trips * step) - counted
    return cycles

  @property
  def without_products(self) -> list[Branch]:
    """The branches without matrix instructions that are not inside others."""
    idle = [b for b in self.branches if not sum(self.products[b.start : b.end])]
    return [
      a
      for a in idle
      if not any(
        a is not b and b.start <= a.start and a.end <= b.end for b in idle
      )
    ]

  @property
  def computing(self) -> list[Branch]:
    """The innermost branches that have matrix instructions."""
    having = [b for b in self.branches if sum(self.products[b.start : b.end])]
    return [
      a
      for a in having
      if not any(
        a is not b and a.start <= b.start and b.end <= a.end for b in having
      )
    ]

  @property
  def unknown_loops(self) -> tuple[Loop, ...]:
    """Those that are counted once, because their trips are not known."""
    return tuple(loop for loop in self.loops if loop.trips is None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
  """All kernels of a program, in the order in which they were compiled."""

  kernels: tuple[Kernel, ...]
  compiled: jax.stages.Compiled | None = None
  # Of HBM, arguments among them, as the compiler has assigned it; by these it
  # refuses a program. `memory_analysis` has other sums: its temporaries count
  # what loops carry twice, its peak leaves out what lies idle between arrays.
  total_bytes: int | None = None

  @property
  def cycles(self) -> int:
    """Of all kernels, one after the other."""
    return sum(kernel.cycles for kernel in self.kernels)

  @property
  def is_complete(self) -> bool:
    """Whether the trips of every loop are known."""
    return not any(kernel.unknown_loops for kernel in self.kernels)


class Clock:
  """Compiles for a TPU and reads the schedule.

  The compiler reads its flags once in a process, when a topology is first asked
  for: make the first Clock before anything else does.
  """

  _folder: pathlib.Path | None = None

  def __init__(self, topology: str):
    """A clock.

    Args:
      topology: such as "v5p:2x2x1" or "v6e:2x2"; its first device is taken.

    Raises:
      RuntimeError: without libtpu, or with flags of another user of it.
    """
    folder = Clock._start()
    try:
      description = topologies.get_topology_desc(
        platform="tpu", topology_name=topology, **_links(topology)
      )
    except Exception as error:
      raise RuntimeError(
        f"topology={topology!r}: the TPU compiler, of `pip install libtpu`,"
        f" says: {error}"
      ) from error
    self.folder = folder
    self.devices = description.devices
    self.device = self.devices[0]

  @classmethod
  def _start(cls) -> pathlib.Path:
    if cls._folder is None:
      given = os.environ.get("LIBTPU_INIT_ARGS", "")
      if "--xla_jf_dump_to" in given:
        raise RuntimeError(
          f"LIBTPU_INIT_ARGS={given!r}: a clock sets --xla_jf_dump_to itself"
        )
      cls._folder = pathlib.Path(tempfile.mkdtemp(prefix="tpu_schedule_"))
      atexit.register(shutil.rmtree, cls._folder, ignore_errors=True)
      flags = _FLAGS.format(folder=cls._folder)
      os.environ["LIBTPU_INIT_ARGS"] = f"{given} {flags}".strip()
      # Without it the compiler asks the network what machine this is; and since
      # it drives no TPU, another process may have it loaded too.
      os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
      os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return cls._folder

  def measure(
    self,
    function: Callable[..., Any],
    *arguments: Any,
    free_layout: bool = True,
  ) -> Schedule:
    """Compiles `function` and reads what the compiler wrote.

    Args:
      function: to be jitted; or jitted already.
      *arguments: pytrees of ShapeDtypeStruct or arrays.
      free_layout: the compiler chooses how arguments and results lie in memory,
        as it does inside of a larger program. Otherwise they are row-major, and
        transposing them counts.

    Returns:
      The schedule, with the compiled program.
    """
    sharding = SingleDeviceSharding(self.device)
    place = Format(Layout.AUTO, sharding) if free_layout else sharding
    shapes = jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arguments
    )
    jitted = jax.jit(function, in_shardings=place, out_shardings=place)
    return self.compile(jitted.trace(*shapes).lower())

  def compile(
    self, lowered: jax.stages.Lowered, *, pallas_only: bool = False
  ) -> Schedule:
    """Compiles what was lowered for devices of this topology, and reads it.

    Args:
      lowered: the program.
      pallas_only: leaves out the fusions of XLA, of which a large program has
        hundreds, each with bundles to be read.

    Returns:
      The schedule.
    """
    with tempfile.TemporaryDirectory(dir=self.folder) as report:
      options = dict(xla_dump_to=report, xla_dump_hlo_as_text=True)
      self._forget()
      compiled = lowered.compile(compiler_options=options)
      names = None
      if pallas_only:
        names = tpu_program.kernel_names(compiled.as_text() or "")
      return Schedule(
        kernels=tuple(read(self.folder, names)),
        compiled=compiled,
        total_bytes=total_bytes(pathlib.Path(report)),
      )

  @contextlib.contextmanager
  def recording(self) -> Iterator[list[Kernel]]:
    """The kernels of what is compiled within, at the end of it."""
    self._forget()
    kernels: list[Kernel] = []
    yield kernels
    kernels += read(self.folder)

  def _forget(self) -> None:
    """Of what was compiled before."""
    for file in self.folder.glob("*.txt"):
      file.unlink()


def _links(topology: str) -> dict[str, Any]:
  """The dimensions of the torus that are closed to rings, where any are.

  Of v4, v5p and 7x those of whole cubes of 4 chips; of v5e and v6e those of 16.
  Not told so, the compiler takes all for open, and gathers by adding zeros.
  """
  kind, _, sizes = topology.partition(":")
  numbers = [int(size) for size in sizes.split("x") if size.isdigit()]
  if len(numbers) == 3 and all(size % 4 == 0 for size in numbers):
    return dict(wrap=(True, True, True))
  if kind in ("v5e", "v6e") and 16 in numbers:
    return dict(wrap=(*(size == 16 for size in numbers), False))
  return {}


def read(
  folder: pathlib.Path, names: Container[str] | None = None
) -> list[Kernel]:
  """The kernels whose bundles the compiler has written to `folder`.

  Args:
    folder: of files.
    names: of those that are wanted; None is all.

  Returns:
    The kernels, in the order in which they were compiled.
  """
  kernels = []
  for file in sorted(folder.iterdir()):
    name = _kernel_of(file)
    if name is not None and (names is None or name in names):
      text = file.read_text(encoding="utf-8", errors="replace")
      kernels.append(parse(text, name=name))
  return kernels


def total_bytes(folder: pathlib.Path) -> int | None:
  """Of HBM, by the reports in `folder` on a program; None without any."""
  totals = [
    int(found[1])
    for file in folder.glob(REPORT)
    if (found := _TOTAL.search(file.read_text(encoding="utf-8")))
  ]
  return max(totals, default=None)


def _kernel_of(file: pathlib.Path) -> str | None:
  """The name of the kernel whose bundles are in that file, if any are."""
  found = _FILE.fullmatch(file.name)
  if found is None or "schedule-analysis" in file.name:
    return None
  return None if found["name"] == _FRAME else found["name"]


@dataclasses.dataclass(frozen=True)
class _Bundle:
  depth: int
  begins_loop: bool
  code: str


def parse(text: str, *, name: str) -> Kernel:
  """A kernel from the text of its bundles."""
  bundles = _bundles(text)
  loops = _loops(bundles, text)
  trips = [1] * len(bundles)
  for loop in loops:
    for i in range(loop.start, loop.end):
      trips[i] *= loop.trips or 1
  return Kernel(
    name=name,
    bundles=len(bundles),
    cycles=sum(trips),
    loops=tuple(loops),
    branches=tuple(_branches(bundles)),
    products=tuple(bundle.code.count("= vmatmul") for bundle in bundles),
    spills=sum(
      len(_SPILL.findall(bundle.code)) for bundle in bundles if bundle.depth
    ),
  )


def _bundles(text: str) -> list[_Bundle]:
  bundles: list[_Bundle] = []
  for line in text.splitlines():
    found = _LINE.match(line)
    if found is None:
      continue
    depth = len(found["depth"])
    # Waiting for a branch, say; such a bundle does not tell its depth.
    if not _COMMENT.sub("", found["code"]).strip(" }") and bundles:
      depth = bundles[-1].depth
    begins = "LB" in (found["label"] or "")
    bundles.append(_Bundle(depth, begins, found["code"]))
  return bundles


def _branches(bundles: list[_Bundle]) -> list[Branch]:
  ends = {
    found["region"]: i
    for i, bundle in enumerate(bundles)
    for found in _TARGET.finditer(bundle.code)
  }
  found = []
  for i, bundle in enumerate(bundles):
    for jump in _JUMP.finditer(bundle.code):
      end = ends.get(jump["region"], 0)
      if end > i + 1:
        found.append(Branch(start=i + 1, end=end))
  return found


def _loops(bundles: list[_Bundle], text: str) -> list[Loop]:
  found = _GRID.search(text)
  text_sizes = found["sizes"].split(",") if found else []
  sizes = [int(size) for size in text_sizes if size.strip()]
  is_dynamic = _DYNAMIC in sizes
  # A grid of one has no loop, and loops inside of it are outermost.
  grid = math.prod(size for size in sizes if size != _DYNAMIC)
  definitions = _definitions(bundles)
  exits = _exit_tests(definitions)
  loops = []
  for start, bundle in enumerate(bundles):
    if not bundle.begins_loop:
      continue
    end = _end(bundles, start)
    known_trips = 1
    if bundle.depth == 1 and is_dynamic:
      trips, known_trips = None, grid
    elif bundle.depth == 1 and grid > 1:
      trips = grid
    else:
      trips = _trips(bundles[start:end], definitions, exits)
    loops.append(
      Loop(
        start=start,
        end=end,
        depth=bundle.depth,
        trips=trips,
        known_trips=known_trips,
      )
    )
  return loops


def _end(bundles: list[_Bundle], start: int) -> int:
  """Where the loop that begins at `start` ends."""
  depth, end = bundles[start].depth, start + 1
  for i in range(start + 1, len(bundles)):
    if bundles[i].begins_loop and bundles[i].depth <= depth:
      break
    if bundles[i].depth >= depth:
      end = i + 1
    elif i - end >= _FOREIGN:
      break
  return end


_Definitions = dict[str, tuple[str, list[str]]]


def _definitions(bundles: list[_Bundle]) -> _Definitions:
  """Name -> operation and operands, predicates left out."""
  definitions = {}
  for bundle in bundles:
    for found in _DEFINITION.finditer(_COMMENT.sub("", bundle.code)):
      # The predicate of an instruction; with a comma in it, it is a choice.
      rest = re.sub(r"^\s*\([^),]*\),?", "", found["rest"])
      operands = [operand.strip() for operand in rest.split(",")]
      definitions[found["name"]] = (found["op"], operands)
  return definitions


def _exit_tests(definitions: _Definitions) -> dict[str, int]:
  """Counter -> the number at which a comparison says that it is done."""
  tests = {}
  for op, operands in definitions.values():
    if op == "scmp.ge.s32.totalorder" and len(operands) == 2:
      counter = _NAME.match(operands[0])
      bound = _constant(operands[1], definitions)
      if counter is not None and bound is not None:
        tests[counter.group()] = bound
  return tests


def _constant(operand: str, definitions: _Definitions) -> int | None:
  """The number that an operand is, through copies of it."""
  for _ in range(8):
    if re.fullmatch(r"-?\d+", operand):
      value = int(operand)
      return value - 2**32 if value >= 2**31 else value
    name = _NAME.match(operand)
    op, operands = definitions.get(name.group() if name else "", ("", []))
    if op != "smov" or len(operands) != 1:
      return None
    operand = operands[0]
  return None


def _trips(
  body: list[_Bundle], definitions: _Definitions, exits: dict[str, int]
) -> int | None:
  """Of a loop that counts up from one number by a second one to a third."""
  code = ";;".join(bundle.code for bundle in body)
  for counter, start, following in _PHI.findall(code):
    op, operands = definitions.get(following, ("", []))
    if op != "sadd.s32" or not any(o.startswith(counter) for o in operands):
      continue
    first = _constant(start, definitions)
    steps = [_constant(operand, definitions) for operand in operands]
    step = next((step for step in steps if step is not None), None)
    if first is None or not step or step < 0:
      continue
    for tested in (following, counter):
      if tested in exits and exits[tested] > first:
        trips = -(-(exits[tested] - first) // step)
        stages = [int(stage) for stage in _STAGE.findall(code)]
        # The last stage, of writing behind, is not named where nothing leaves.
        behind = max(2, *stages) if stages else 0
        return max(1, trips - behind)
  return None
