"""TPU pods by their topology, without the compiler: what stands where.

A topology is a kind and the chips along each dimension of the torus, such as
v5p:4x4x8 or v6e:16x16. A device of JAX is a chip.
"""

from __future__ import annotations

import dataclasses
import math
import re

from aquila_jax.core import errors
from aquila_jax.planning.step_plan import HBM_BYTES
from aquila_jax.planning.tpu_program import Chip

# As topologies name them -> `device_kind`.
KINDS = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}
_TOPOLOGY = re.compile(r"(?P<kind>[a-z0-9]+):(?P<shape>\d+(?:x\d+){1,2})")
# Chips along the longest dimension of a pod, and whether there are three.
_LARGEST = {"v5e": (16, 2), "v6e": (16, 2), "v5p": (28, 3)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pod:
  """Chips of one kind on a torus."""

  kind: str  # of KINDS
  shape: tuple[int, ...]  # chips along each dimension

  @classmethod
  def of(cls, topology: str) -> Pod:
    """Of a topology.

    Raises:
      errors.UserError: where it is none, or of a kind with unknown rates.
    """
    found = _TOPOLOGY.fullmatch(topology)
    if found is None:
      raise errors.UserError(
        f"--topology={topology}: expected a kind and chips along each"
        " dimension, as v5p:4x4x8 or v6e:16x16"
      )
    _check_kind(found["kind"], flag=f"--topology={topology}")
    shape = tuple(int(size) for size in found["shape"].split("x"))
    if 0 in shape:
      raise errors.UserError(f"--topology={topology}: expected sizes above 0")
    _, dims = _LARGEST[found["kind"]]
    if len(shape) != dims:
      raise errors.UserError(
        f"--topology={topology}: {found['kind']} has {dims} dimensions;"
        f" expected sizes along each, as {found['kind']}:{'x'.join(dims * '4')}"
      )
    return cls(kind=found["kind"], shape=shape)

  @classmethod
  def of_count(cls, kind: str, num_devices: int) -> Pod:
    """The most compact one of so many chips.

    Raises:
      errors.UserError: where there is none.
    """
    _check_kind(kind, flag=f"--kind={kind}")
    if num_devices < 1:
      raise errors.UserError(
        f"--devices={num_devices}: expected a number above 0"
      )
    longest, dims = _LARGEST[kind]
    shapes = [
      shape for shape in _shapes(num_devices, dims) if max(shape) <= longest
    ]
    if not shapes:
      raise errors.UserError(
        f"--devices={num_devices}: no torus of {kind} has so many chips;"
        f" expected a product of {dims} sizes up to {longest}"
      )
    # The least surface: chips near each other, and dimensions of rings.
    best = min(shapes, key=lambda shape: (sum(shape), shape))
    return cls(kind=kind, shape=best)

  @property
  def topology(self) -> str:
    """As the compiler takes it."""
    return f"{self.kind}:{'x'.join(map(str, self.shape))}"

  @property
  def num_devices(self) -> int:
    return math.prod(self.shape)

  @property
  def device_kind(self) -> str:
    """As `jax.Device.device_kind`."""
    return KINDS[self.kind]

  @property
  def chip(self) -> Chip:
    return Chip.of(self.device_kind)

  @property
  def hbm(self) -> float:
    """Bytes of a device that a program may use."""
    return HBM_BYTES[self.device_kind]

  def placed(self, mesh: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Chips along each dimension of the torus that a mesh axis lies along.

    Axes are laid out from the last, each along as few dimensions as hold it;
    JAX's own layout can be another.

    Args:
      mesh: axis -> size.

    Returns:
      Axis -> sizes above 1 whose product is its own; none of an axis of 1.
    """
    free, places = [size for size in self.shape if size > 1], {}
    for axis, size in reversed(mesh.items()):
      places[axis], free = _taken(size, free)
    return places


def _taken(size: int, free: list[int]) -> tuple[tuple[int, ...], list[int]]:
  """The dimensions that `size` chips lie along, and what is left of all."""
  if size in free:
    rest = list(free)
    rest.remove(size)
    return (size,), rest
  taken, rest = [], []
  for chips in sorted(free, reverse=True):
    part = math.gcd(size, chips)
    size //= part
    if part > 1:
      taken.append(part)
    if chips > part:
      rest.append(chips // part)
  return tuple(taken), rest


def _check_kind(kind: str, *, flag: str) -> None:
  if kind not in KINDS:
    raise errors.UserError(
      f"{flag}: of {kind or 'nothing'} no rates are known here; expected one of"
      f" {', '.join(KINDS)}"
    )


def _shapes(number: int, dims: int) -> list[tuple[int, ...]]:
  """All ways to write `number` as so many factors in rising order."""
  if dims == 1:
    return [(number,)]
  return [
    (first, *rest)
    for first in range(1, number + 1)
    if number % first == 0
    for rest in _shapes(number // first, dims - 1)
    if first <= rest[0]
  ]
