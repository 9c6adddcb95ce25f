"""Rows times a kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from aquila_jax.sharding.mesh import SEQUENCE_AXIS


def project(
  x: Float[Array, "*rows I"],
  kernel: Float[Array, "I O"],
  *,
  out_dtype: DTypeLike | None = None,
) -> Float[Array, "*rows O"]:
  """X W, over rows in one axis.

  The gradient of the kernel is a sum over all axes of rows. Where they are two,
  [B T], XLA:CPU first copies the output's gradient transposed, element by
  element, which took longer than the product. On a mesh that divides both they
  stay two: as one they would have to be gathered.

  Args:
    x: any number of axes of rows, and the kernel's input axis.
    kernel: of input I and output O.
    out_dtype: of the products' sum; None is that of the arguments.

  Returns:
    The products.
  """
  if jax.sharding.get_abstract_mesh().shape.get(SEQUENCE_AXIS, 1) > 1:
    return jnp.matmul(x, kernel, preferred_element_type=out_dtype)
  rows = x.reshape(-1, x.shape[-1])
  out = jnp.matmul(rows, kernel, preferred_element_type=out_dtype)
  return out.reshape(*x.shape[:-1], kernel.shape[-1])
