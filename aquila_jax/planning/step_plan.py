"""What a training step would cost on TPUs that are not there: one table.

Bytes are what the compiler states; time is tpu_program's sum of a compiled
program. HBM is what the compiler says that it may use of a chip.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from typing import Any

from aquila_jax.planning.tpu_program import Chip, Estimate, Part

_GIB = 2.0**30
# What the compiler says that a device of JAX has for a program.
HBM_BYTES = {
  "TPU v5 lite": 15.75 * _GIB,
  "TPU v5": 95.74 * _GIB,
  "TPU v6 lite": 31.25 * _GIB,
}
SECONDS_PER_DAY = 86400.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
  """Bytes of one device in a step."""

  parameters: int
  optimizer: int  # moments, and an EMA
  batch: int  # and what else comes in
  temporaries: int | None  # None: the program does not fit
  hbm: float

  @property
  def total(self) -> int | None:
    """All of it; the new state takes the place of the old."""
    if self.temporaries is None:
      return None
    held = self.parameters + self.optimizer + self.batch
    return held + self.temporaries

  @property
  def fits(self) -> bool:
    """Whether the chip has as much."""
    return self.total is not None and self.total <= self.hbm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collectives:
  """Those of one kind over the same axes of the mesh, in a step."""

  kind: str
  axes: tuple[str, ...]
  count: int
  bytes: int  # of the whole arrays
  seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepPlan:
  """A step on a mesh of chips.

  Attributes:
    stage: of the config.
    topology: of the chips.
    device_kind: of these.
    mesh: axis -> size.
    tokens: of a step, on all devices.
    num_microbatches: that they are in.
    remat: of the model.
    options: of the model, other fields that change no result but what it takes.
    flops: of a step on one device, what the model needs (planning/counting.py).
    memory: of one device.
    estimate: of the program; None where it does not fit.
    collectives: of the program.
    compile_s: seconds that the compiler took.
    message: of the compiler, where the program does not fit.
  """

  stage: str
  topology: str
  device_kind: str
  mesh: dict[str, int]
  tokens: int
  num_microbatches: int
  remat: str
  flops: float
  memory: Memory
  estimate: Estimate | None
  collectives: tuple[Collectives, ...] = ()
  compile_s: float = 0.0
  message: str = ""
  options: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def num_devices(self) -> int:
    """Of the mesh."""
    return math.prod(self.mesh.values())

  @property
  def seconds(self) -> float | None:
    """Of a step, collectives beside compute where they are scheduled so."""
    return None if self.estimate is None else self.estimate.as_scheduled

  @property
  def mfu(self) -> float | None:
    """Of the published rate, in a step of so many `seconds`."""
    if self.seconds is None:
      return None
    return self.flops / Chip.of(self.device_kind).flops / self.seconds

  @property
  def tokens_per_day(self) -> float | None:
    """On all devices, in steps of so many `seconds`."""
    if self.seconds is None:
      return None
    return self.tokens / self.seconds * SECONDS_PER_DAY

  def to_json(self, *, token_budget: int) -> dict[str, Any]:
    """Plain JSON: numbers in bytes, seconds, tokens."""
    chip, estimate = Chip.of(self.device_kind), self.estimate
    time: dict[str, Any] | None = None
    if estimate is not None:
      time = dict(
        without_overlap=estimate.without_overlap,
        as_scheduled=estimate.as_scheduled,
        with_full_overlap=estimate.with_full_overlap,
        compiler=estimate.seconds("estimate"),
        kernels=estimate.seconds("schedule"),
        memory=estimate.seconds("bytes"),
        links=estimate.seconds("link"),
        flops_at_published_rate=self.flops / chip.flops,
        kernels_without_schedule=list(estimate.unknown_kernels),
        loops_counted_once=list(estimate.unknown_loops),
      )
    days = self.days(token_budget)
    return dict(
      stage=self.stage,
      topology=self.topology,
      device_kind=self.device_kind,
      num_devices=self.num_devices,
      mesh=self.mesh,
      fits=self.memory.fits,
      message=self.message,
      memory=dataclasses.asdict(self.memory) | dict(total=self.memory.total),
      tokens_per_step=self.tokens,
      num_microbatches=self.num_microbatches,
      remat=self.remat,
      options=self.options,
      flops_per_device=self.flops,
      seconds=time,
      mfu=self.mfu,
      tokens_per_day=self.tokens_per_day,
      token_budget=token_budget,
      days=days,
      device_days=None if days is None else days * self.num_devices,
      collectives=[dataclasses.asdict(one) for one in self.collectives],
      compile_s=self.compile_s,
    )

  def days(self, token_budget: int) -> float | None:
    """For so many tokens."""
    if self.tokens_per_day is None:
      return None
    return token_budget / self.tokens_per_day


def by_axes(
  parts: tuple[Part, ...], *, mesh: dict[str, int]
) -> tuple[Collectives, ...]:
  """Collectives summed by kind and by the axes of the mesh that they span.

  Args:
    parts: of an estimate.
    mesh: axis -> size; devices are numbered in its order, the last axis first.

  Returns:
    The longest first.
  """
  rows: dict[tuple[str, tuple[str, ...]], list[float]] = (
    collections.defaultdict(lambda: [0, 0, 0.0])
  )
  for part in parts:
    if part.source == "link":
      row = rows[part.opcode, _axes_of(part.group, mesh)]
      row[0] += part.trips
      row[1] += part.trips * part.bytes
      row[2] += part.seconds
  found = [
    Collectives(
      kind=kind, axes=axes, count=int(count), bytes=int(size), seconds=seconds
    )
    for (kind, axes), (count, size, seconds) in rows.items()
  ]
  return tuple(sorted(found, key=lambda one: -one.seconds))


def _axes_of(group: tuple[int, ...], mesh: dict[str, int]) -> tuple[str, ...]:
  """The axes along which the devices of a group differ."""
  places, stride = {}, 1
  for axis, size in reversed(mesh.items()):
    places[axis] = {device // stride % size for device in group}
    stride *= size
  return tuple(axis for axis in mesh if len(places[axis]) > 1)


def table(plan: StepPlan, *, token_budget: int) -> str:
  """For a terminal."""
  memory, estimate = plan.memory, plan.estimate
  shape = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
  lines = [
    f"{plan.stage} on {plan.topology}: {plan.num_devices} of"
    f" {plan.device_kind}, mesh {shape}",
    "",
    "bytes a device",
    _line("parameters", _size(memory.parameters)),
    _line("optimizer", _size(memory.optimizer)),
    _line("batch", _size(memory.batch)),
    _line("temporaries", _size(memory.temporaries)),
    _line("together", _size(memory.total)),
    _line("of HBM", _size(memory.hbm)),
    _line("fits", "yes" if memory.fits else f"NO  {plan.message}".rstrip()),
  ]
  if estimate is None:
    return "\n".join(lines)
  assert plan.mfu is not None
  assert plan.tokens_per_day is not None
  rate = plan.flops / Chip.of(plan.device_kind).flops
  lines += [
    "",
    f"seconds a step of {plan.tokens:,} tokens",
    _line("nothing beside anything", f"{estimate.without_overlap:.3f}"),
    _line("as it is scheduled", f"{estimate.as_scheduled:.3f}"),
    _line("all collectives hidden", f"{estimate.with_full_overlap:.3f}"),
    _line("  XLA, as it estimates", f"{estimate.seconds('estimate'):.3f}"),
    _line("  Pallas kernels", f"{estimate.seconds('schedule'):.3f}"),
    _line("  the rest, by its bytes", f"{estimate.seconds('bytes'):.3f}"),
    _line("  links", f"{estimate.seconds('link'):.3f}"),
    _line("FLOPs at the published rate", f"{rate:.3f}"),
    _line("MFU, without overlap", f"{rate / estimate.without_overlap:.1%}"),
    _line("MFU, as it is scheduled", f"{plan.mfu:.1%}"),
    _line("tokens a day", f"{plan.tokens_per_day / 1e9:.2f} billion"),
    _line(
      f"days for {token_budget / 1e9:,.0f} billion",
      f"{plan.days(token_budget):,.1f}",
    ),
    "",
    f"{'collectives':<22}{'over':<24}{'count':>8}{'GB':>9}{'seconds':>9}",
  ]
  for one in plan.collectives:
    lines.append(
      f"  {one.kind:<20}{', '.join(one.axes) or '-':<24}{one.count:>8}"
      f"{one.bytes / 1e9:>9.2f}{one.seconds:>9.3f}"
    )
  for names, what in (
    (estimate.unknown_kernels, "kernels without a schedule, not counted"),
    (estimate.unknown_loops, "loops of unknown length, counted once"),
  ):
    if names:
      lines.append(f"{what}: {', '.join(names)}")
  return "\n".join(lines)


def _line(name: str, value: str) -> str:
  return f"  {name:<30}{value:>14}"


def _size(size: int | float | None) -> str:
  return "-" if size is None else f"{size / _GIB:.2f} GiB"


def dumps(plan: StepPlan, *, token_budget: int) -> str:
  """As a JSON file has it."""
  return json.dumps(plan.to_json(token_budget=token_budget), indent=2) + "\n"
