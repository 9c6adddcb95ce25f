"""What a growth and an export take, in bytes and time."""

from __future__ import annotations

import dataclasses
from typing import Any

_GIB = 2.0**30
# Bytes a second that a growth from disk to disk wrote on 2 CPU cores, and that
# the same disk takes: benchmarks/results/scale_out_streaming.json.
GROWN_PER_SECOND = 0.86e9
WRITTEN_PER_SECOND = 0.95e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrowthPlan:
  """A transform of a pipeline on a mesh, and as a verb of its own on a host.

  Attributes:
    stage: of the config.
    topology: of the chips.
    mesh: axis -> size.
    source_bytes: of the source's trees, on the host of every process.
    target_bytes: of the target's, on all devices.
    held: of a device: its part of the target.
    filling: of a device, at most, while a slice is put in its place.
    placing: of a device, while the state of the training is made of it.
    hbm: of a device.
  """

  stage: str
  topology: str
  mesh: dict[str, int]
  source_bytes: int
  target_bytes: int
  held: int
  filling: int
  placing: int
  hbm: float

  @property
  def most(self) -> int:
    """Of a device at any time."""
    return max(self.filling, self.placing)

  @property
  def fits(self) -> bool:
    return self.most <= self.hbm

  @property
  def streamed_seconds(self) -> float:
    """From disk to disk, of the verb."""
    return self.target_bytes / GROWN_PER_SECOND

  def to_json(self) -> dict[str, Any]:
    """Plain JSON."""
    return dataclasses.asdict(self) | dict(
      fits=self.fits, streamed_seconds=self.streamed_seconds
    )


def growth_table(plan: GrowthPlan) -> str:
  """For a terminal."""
  shape = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
  lines = [
    f"the growth of {plan.stage} on {plan.topology}, mesh {shape}",
    "",
    "bytes a device",
    _line("the grown model, with moments", plan.held),
    _line("while slices are put into it", plan.filling),
    _line("while the training's state is made", plan.placing),
    _line("of HBM", plan.hbm),
    f"  {'fits':<38}{'yes' if plan.fits else 'NO':>14}",
    "",
    "bytes of a host",
    _line("the source, with moments", plan.source_bytes),
    "",
    "as a verb of its own, from disk to disk, without a device",
    _line("written", plan.target_bytes),
    f"  {'seconds, on 2 CPU cores':<38}{plan.streamed_seconds:>14,.0f}",
  ]
  return "\n".join(lines)


def export_table(sizes: dict[str, Any], *, read: int) -> str:
  """For a terminal.

  Args:
    sizes: dtype -> an ExportSize.
    read: bytes of the MODEL's parameters.
  """
  lines = [
    "on a host, without a device",
    _line("read", read),
    f"{'dtype':<12}{'tensors':>9}{'files':>7}{'GiB':>10}{'in memory':>12}"
    f"{'seconds':>9}",
  ]
  for dtype, size in sizes.items():
    seconds = export_seconds(read, size.num_bytes)
    lines.append(
      f"{dtype:<12}{size.num_tensors:>9,}{size.num_shards:>7}"
      f"{size.num_bytes / _GIB:>10.1f}"
      f"{size.largest_shard / _GIB:>8.2f} GiB{seconds:>9,.0f}"
    )
  lines.append("seconds: bytes read and written, at the rate of a disk")
  return "\n".join(lines)


def export_seconds(read: int, written: int) -> float:
  """One after the other, at the rate of a disk."""
  return (read + written) / WRITTEN_PER_SECOND


def _line(name: str, size: int | float) -> str:
  return f"  {name:<38}{size / _GIB:>10.2f} GiB"
