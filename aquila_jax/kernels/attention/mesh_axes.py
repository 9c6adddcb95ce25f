"""How rows and heads lie on a mesh, for kernels the compiler cannot divide."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshAxes:
  """Names of mesh axes; those that a mesh does not have are of no account."""

  rows: tuple[str, ...] = ()  # B is divided over these
  kv_heads: tuple[str, ...] = ()  # and K over these


UNDIVIDED = MeshAxes()
