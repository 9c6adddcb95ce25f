"""How rows, tokens and heads lie on a mesh that the compiler cannot divide."""

from __future__ import annotations

import dataclasses
import math

import jax
from jax.sharding import AbstractMesh, PartitionSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshAxes:
  """Names of mesh axes; those that a mesh does not have are of no account."""

  rows: tuple[str, ...] = ()  # B is divided over these
  kv_heads: tuple[str, ...] = ()  # and K over these
  # T over these, one at most; tokens lie as core/token_order.py says.
  tokens: tuple[str, ...] = ()

  def of(self, mesh: AbstractMesh) -> MeshAxes:
    """Those that a mesh has."""
    return MeshAxes(
      **{
        name: tuple(axis for axis in axes if axis in mesh.shape)
        for name, axes in vars(self).items()
      }
    )

  @property
  def heads(self) -> PartitionSpec:
    """Of arrays [B T K ...]."""
    return PartitionSpec(self.rows, self.tokens, self.kv_heads)

  @property
  def every_token(self) -> PartitionSpec:
    """Of arrays [B T]."""
    return PartitionSpec(self.rows, self.tokens)


UNDIVIDED = MeshAxes()


def parts(axes: tuple[str, ...]) -> int:
  """Devices of the context's mesh along some of its axes."""
  mesh = jax.sharding.get_abstract_mesh()
  return math.prod(mesh.shape[axis] for axis in axes if axis in mesh.shape)
