"""SwiGLU experts in Pallas for TPUs.

Rows lie in groups of one expert each. Every step of a grid takes a tile of rows
and the kernels of one expert, which are fetched once for all of its tiles; a
tile in which experts meet is taken once for each of them (tpu_visits.py), so
that the size of the blocks does not matter to the matrix unit. This is the
scheme of MegaBlocks (Gale et al., 2022, arXiv:2211.15841) as in jax's megablox.

We differ where it costs time: what is computed element by element is done where
a product leaves the matrix unit; what shares rows is one kernel (gate and up,
and their gradients; down too, where a core holds all of an expert); and only
tiles in which experts meet are masked.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from aquila_jax.kernels.expert_ffn import swiglu
from aquila_jax.kernels.expert_ffn.tpu_passes import (
  Operands,
  by_rows,
  deep,
  dot,
  outer,
)
from aquila_jax.kernels.expert_ffn.tpu_tiles import Chip, Deep
from aquila_jax.kernels.expert_ffn.tpu_visits import Visits
from aquila_jax.kernels.target import target

Kernels = tuple[
  Float[Array, "E D F"], Float[Array, "E D F"], Float[Array, "E F D"]
]
# Of a tile, in products of rows and in the gradients of kernels.
TILE_ROWS = (256, 512)
# Where a step takes a part of what is summed over, its tile of rows is these in
# one, for each of which kernels are fetched; what such a kernel's name ends in.
DEEP_TILES, DEEP = 4, "_deep"
# Those that make the gradients of kernels.
OF_KERNELS = ("expert_gate_up_gradient", "expert_down_gradient")


def tile_rows_of(kernel_name: str) -> tuple[int, int]:
  """Rows of a tile of one of these kernels, and of its parts.

  A tile in which experts meet is taken part by part, by both where they do.
  """
  tile, outer_tile = TILE_ROWS
  if DEEP in kernel_name:
    return DEEP_TILES * tile, tile
  if any(name in kernel_name for name in OF_KERNELS):
    return outer_tile, outer_tile // 2
  return tile, tile


def expert_ffn(
  rows: Float[Array, "P Q D"],
  kernels: Kernels,
  *,
  block_expert: Int[Array, "P"],
  num_blocks: Int[Array, ""],
  device_kind: str | None = None,
  tile_rows: tuple[int, int] = TILE_ROWS,
  interpret: bool = False,
) -> Float[Array, "P Q D"]:
  """As api.expert_ffn; reverse-mode differentiable only.

  Inside of shard_map, with types checked or not, it is the shard's.

  Args:
    rows: see there.
    kernels: see there.
    block_expert: see there.
    num_blocks: see there.
    device_kind: None is the target's (kernels/target.py).
    tile_rows: of a tile, in products of rows and in the gradients of kernels.
    interpret: runs the kernels' bodies without a TPU; for tests.

  Returns:
    One output row for each input row.

  Raises:
    NotImplementedError: off TPUs, and where rows or kernels are neither
      bfloat16 nor float32.
  """
  chip = chip_of(
    rows.dtype,
    kernels,
    device_kind=device_kind,
    tile_rows=tile_rows,
    interpret=interpret,
  )
  group_rows = rows.shape[1] * swiglu.blocks_of_experts(
    jnp.asarray(block_expert),
    jnp.asarray(num_blocks),
    num_experts=kernels[0].shape[0],
  )
  flat = rows.reshape(-1, rows.shape[-1])  # (P, Q, D) -> (R, D)
  out: Any = _expert_ffn(chip, *_on_same_axes(flat, kernels, group_rows))
  return out.reshape(rows.shape)


def chip_of(
  dtype: DTypeLike,
  kernels: Kernels,
  *,
  device_kind: str | None = None,
  tile_rows: tuple[int, int] = TILE_ROWS,
  interpret: bool = False,
) -> Chip:
  """What kernels over rows of that dtype are compiled for.

  Args:
    dtype: of the rows.
    kernels: as in `expert_ffn`, and so are the others.
    device_kind: see there.
    tile_rows: see there.
    interpret: see there.

  Returns:
    The chip.

  Raises:
    NotImplementedError: as `expert_ffn`.
  """
  dtypes = {str(jnp.dtype(dtype)), *(str(kernel.dtype) for kernel in kernels)}
  if dtypes not in ({"bfloat16"}, {"float32"}):
    raise NotImplementedError(
      "implementation='pallas_tpu': rows and kernels of"
      f" {', '.join(sorted(dtypes))}; need all bfloat16 or all float32"
    )
  is_absent = device_kind is None and target().platform != "tpu"
  if is_absent and not interpret:
    raise NotImplementedError("implementation='pallas_tpu' needs a TPU")
  return Chip.of(
    device_kind or target().device_kind,
    rows=tile_rows[0],
    outer_rows=tile_rows[1],
    deep_rows=DEEP_TILES * tile_rows[0],
    interpret=interpret,
  )


def _on_same_axes(*arguments):
  """Inside of shard_map: all vary over the axes that one of them varies over.

  So a kernel that shards share gets the sum of their gradients.
  """
  axes = frozenset().union(
    *(_varying(leaf) for leaf in jax.tree.leaves(arguments))
  )

  def vary(leaf):
    missing = tuple(axes - _varying(leaf))
    return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

  return jax.tree.map(vary, arguments)


def _varying(leaf: jax.Array) -> frozenset:
  return jax.typeof(leaf).manual_axis_type.varying


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _expert_ffn(chip, rows, kernels, group_rows):
  return outputs(chip, rows, kernels, group_rows, keep=False)[0]


def _forward(chip, rows, kernels, group_rows):
  out, g, u = outputs(chip, rows, kernels, group_rows, keep=True)
  return out, (rows, kernels, group_rows, g, u)


def _backward(chip, residuals, out_grad):
  rows, kernels, group_rows, g, u = residuals
  dx, dg, du, hidden, _ = _gradients_of_rows(
    out_grad, g, u, kernels, group_rows, chip=chip
  )
  grads = _gradients_of_kernels(
    (rows, [dg, du]),
    (hidden, out_grad),
    group_rows,
    num_experts=kernels[0].shape[0],
    chip=chip,
  )
  return dx, grads, None


def _gradients_of_kernels(
  gate_up, down, group_rows, *, num_experts: int, chip: Chip
) -> Kernels:
  """Of rows and the gradients of their products; hidden, and the outputs'."""
  passed = functools.partial(
    outer,
    visits=_visits(
      gate_up[0], group_rows, tile_rows=chip.outer_rows, empty_experts=True
    ),
    num_experts=num_experts,
    chip=chip,
  )
  gate_grad, up_grad = passed(*gate_up, name=OF_KERNELS[0])
  hidden, out_grad = down
  (down_grad,) = passed(hidden, [out_grad], name=OF_KERNELS[1])
  return gate_grad, up_grad, down_grad


_expert_ffn.defvjp(_forward, _backward)


# Rows whose outputs are weighed, for a layer that has a better way for the
# gradients of weights than to compute the outputs again.


def weighted_gradients(
  chip: Chip,
  out_grad: Float[Array, "R D"],
  weights: Float[Array, "R"],
  rows: Float[Array, "R D"],
  kernels: Kernels,
  group_rows: Int[Array, "E"],
  kept: Sequence[Float[Array, "R F"]],
) -> tuple[Float[Array, "R D"], Float[Array, "R"], Kernels]:
  """Of weights[r] * out[r], without the outputs.

  With h a row's hidden units, h W its output, and y' the gradient of what it
  adds, that of its weight is y' . (h W) = (y' W^T) . h, and y' W^T is there for
  the gradient of h (Guo et al., SonicMoE, arXiv:2512.14080).

  Args:
    chip: of `chip_of`.
    out_grad: of the weighted outputs.
    weights: of the rows.
    rows: as in `outputs`.
    kernels: see there.
    group_rows: see there.
    kept: see there.

  Returns:
    The gradients of rows, which are still to be weighed, of weights, float32,
    and of kernels.
  """
  g, u = kept
  dx, dg, du, hidden, sums = _gradients_of_rows(
    out_grad, g, u, kernels, group_rows, chip=chip, with_sums=True
  )

  def weighed(x):
    wide = x.astype(jnp.float32) * weights.astype(jnp.float32)[:, None]
    return wide.astype(x.dtype)

  grads = _gradients_of_kernels(
    (weighed(rows), [dg, du]),
    (hidden, weighed(out_grad)),
    group_rows,
    num_experts=kernels[0].shape[0],
    chip=chip,
  )
  assert sums is not None
  return dx, jnp.sum(sums, axis=-1), grads


def _visits(
  rows, group_rows, *, tile_rows: int, empty_experts: bool = False
) -> Visits:
  return Visits.of_rows(
    group_rows,
    num_rows=rows.shape[0],
    tile_rows=min(tile_rows, rows.shape[0]),
    empty_experts=empty_experts,
  )


def _products(
  body,
  xs: Sequence[jax.Array],
  kernels: Sequence[tuple[jax.Array, int]],
  group_rows: jax.Array,
  *,
  chip: Chip,
  name: str,
) -> jax.Array:
  """The sum of x W over the xs, W of the rows' experts, by what moves less.

  That is `body` of all of x and as many columns of W as a core holds, for which
  x is fetched again for every tile of columns, or parts of both.

  Args:
    body: of a tile of the xs, then of the kernels.
    xs: [R K].
    kernels: of each, with its axis of columns, [E K N] or [E N K].
    group_rows: of the groups.
    chip: of `chip_of`.
    name: of the kernel, with DEEP behind it in the other case.

  Returns:
    [R N].
  """
  visited = functools.partial(_visits, xs[0], group_rows)
  operands = Operands(whole=xs, kernels=kernels, num_outputs=1)
  visits = visited(tile_rows=operands.rows_that_fit(chip))
  columns = operands.columns(tile_rows=visits.tile_rows, chip=chip)
  tile = Deep.of(
    num_rows=xs[0].shape[0],
    depth=xs[0].shape[1],
    width=operands.width,
    num_experts=len(group_rows),
    num_products=len(xs),
    itemsize=xs[0].dtype.itemsize,
    chip=chip,
  )
  fits = operands.held(columns, tile_rows=visits.tile_rows) <= chip.budget
  if tile is None or (fits and operands.moved(columns) <= tile.moved):
    return by_rows(body, operands, visits=visits, chip=chip, name=name)[0]
  visits = visited(tile_rows=tile.rows)
  return deep(
    xs, kernels, visits=visits, tile=tile, chip=chip, name=f"{name}{DEEP}"
  )


def outputs(
  chip: Chip,
  rows: Float[Array, "R D"],
  kernels: Kernels,
  group_rows: Int[Array, "E"],
  *,
  keep: bool,
) -> tuple[Float[Array, "R _"], ...]:
  """The outputs of rows, and x gate and x up, which `weighted_gradients` wants.

  In one visit where a core has all of an expert: hidden units stay there.

  Args:
    chip: of `chip_of`.
    rows: in groups, one an expert, one behind the other.
    kernels: of the experts.
    group_rows: of the groups.
    keep: whether anything is kept.

  Returns:
    Outputs, zeros behind the groups; and the two that are kept, [R F].
  """
  gate, up, down = kernels
  visits = _visits(rows, group_rows, tile_rows=chip.rows)
  passed = functools.partial(by_rows, visits=visits, chip=chip)
  operands = Operands(
    whole=[rows],
    kernels=[(gate, 2), (up, 2), (down, 1)],
    num_outputs=2 if keep else 0,
    whole_outputs=[rows.shape[1]],
  )
  if operands.fit_as_one_tile(visits.tile_rows, chip):
    return passed(_gated_and_down, operands, name="expert_hidden_and_output")
  hidden_operands = Operands(
    whole=[rows], kernels=[(gate, 2), (up, 2)], num_outputs=3 if keep else 1
  )
  hidden, *kept = passed(_gated, hidden_operands, name="expert_gate_up")
  out = _products(
    _product, [hidden], [(down, 2)], group_rows, chip=chip, name="expert_down"
  )
  return out, *kept


def _gradients_of_rows(
  dy, g, u, kernels, group_rows, *, chip: Chip, with_sums: bool = False
):
  """dx, dg, du and hidden: in one visit where a core has all of an expert.

  So dg and du are not read again, for which v6e would have to wait. Last, with
  sums, parts of each row's sum of hidden * its gradient, [R _]; else None.
  """
  gate, up, down = kernels
  visits = _visits(dy, group_rows, tile_rows=chip.rows)
  passed = functools.partial(by_rows, visits=visits, chip=chip)
  hidden_operands = Operands(
    whole=[dy],
    tiled=[g, u],
    kernels=[(down, 1)],
    num_outputs=3,
    has_sums=with_sums,
  )
  operands = dataclasses.replace(
    hidden_operands,
    kernels=[(down, 1), (gate, 2), (up, 2)],
    whole_outputs=[dy.shape[1]],
  )
  if operands.fit_as_one_tile(visits.tile_rows, chip):
    dx, dg, du, hidden, *sums = passed(
      _hidden_and_rows_gradients,
      operands,
      in_place=True,
      name="expert_hidden_and_rows_gradients",
    )
    return dx, dg, du, hidden, sums[0] if sums else None
  dg, du, hidden, *sums = passed(
    _hidden_gradients,
    hidden_operands,
    in_place=True,
    name="expert_hidden_gradients",
  )
  dx = _products(
    _rows_gradient,
    [dg, du],
    [(gate, 1), (up, 1)],
    group_rows,
    chip=chip,
    name="expert_rows_gradient",
  )
  return dx, dg, du, hidden, sums[0] if sums else None


def _gated(x, gate, up):
  g, u = dot(x[...], gate[...]), dot(x[...], up[...])
  return jax.nn.silu(g) * u, g, u


def _gated_and_down(x, gate, up, down):
  hidden, g, u = _gated(x, gate, up)
  # As it is stored where `down` is another kernel's.
  return dot(hidden.astype(x.dtype), down[...]), g, u


def _product(hidden, down):
  return (dot(hidden[...], down[...]),)


def _hidden_gradients(dy, g, u, down):
  g, u = g[...].astype(jnp.float32), u[...].astype(jnp.float32)
  dh = dot(dy[...], down[...], contract=(1, 1))
  dg, du, hidden = swiglu.gradients(g, u, dh)
  return dg, du, hidden, u * du  # the last is hidden * dh


def _rows_gradient(dg, du, gate, up):
  dx = dot(dg[...], gate[...], contract=(1, 1))
  return (dx + dot(du[...], up[...], contract=(1, 1)),)


def _hidden_and_rows_gradients(dy, g, u, down, gate, up):
  dg, du, *others = _hidden_gradients(dy, g, u, down)
  # As they are stored: dx is that of two kernels.
  stored = dg.astype(dy.dtype), du.astype(dy.dtype)
  return *_rows_gradient(*stored, gate, up), dg, du, *others
