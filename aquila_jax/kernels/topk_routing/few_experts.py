"""The calls of the TPU kernels for few experts, whose bodies are tpu_few.py."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int, Shaped

from aquila_jax.kernels.topk_routing import tpu_few
from aquila_jax.kernels.topk_routing.grid import Grid, cost, like, up
from aquila_jax.kernels.topk_routing.lanes import LANES, SUBLANES
from aquila_jax.kernels.topk_routing.rule import (
  Gradients,
  Residuals,
  Routed,
  RoutingRule,
)
from aquila_jax.kernels.topk_routing.tpu_few import UNIT, FewShape


def suits(rule: RoutingRule, num_experts: int, row_tokens: int) -> bool:
  """Whether vectors of 1,024 tokens are filled by rows of so many."""
  is_few = num_experts <= tpu_few.MOST and rule.top_k <= tpu_few.MOST_CHOSEN
  return is_few and row_tokens % UNIT == 0


def forward(
  logits: Float[Array, "M E"],
  rule: RoutingRule,
  *,
  bias: Float[Array, "E"] | None,
  valid: Bool[Array, "M"] | None,
  grid: Grid,
  interpret: bool,
) -> tuple[Routed, Residuals]:
  """See api.topk_routing; residuals are as the kernel left them."""
  num_experts = logits.shape[1]
  shape = FewShape(
    rule=rule,
    num_experts=num_experts,
    tokens=grid.blocks.tokens,
    has_bias=bias is not None,
    has_valid=valid is not None,
    steps_per_piece=grid.steps_per_piece,
  )
  tiled = _tiled(logits.astype(jnp.float32).T)
  experts, gates, positions, chosen, lse, counts, probability, scalars = (
    _forward(tiled, bias, valid, shape=shape, grid=grid, interpret=interpret)
  )
  before, counts = grid.assignments(counts[:, :, 0, 0])
  if grid.num_cores > 1:
    positions = _shift(
      before, experts, positions, shape=shape, grid=grid, interpret=interpret
    )
  scalars = scalars.sum(axis=(0, 2, 3))

  def slots(x: Shaped[Array, "1 sixteenths 128"]) -> Shaped[Array, "M A"]:
    return _flat(x)[: rule.top_k].T

  routed = Routed(
    experts=slots(experts),
    gates=slots(gates),
    positions=slots(positions),
    counts=counts,
    probability=grid.by_row(probability.sum(axis=(2, 3))),
    z=scalars[0],
    entropy=scalars[1],
  )
  residuals = Residuals(
    logits=logits,
    valid=valid,
    experts=experts,
    gates=gates,
    chosen=chosen,
    logsumexp=lse,
  )
  return routed, residuals


def _tiled(x: Shaped[Array, "N M"]) -> Shaped[Array, "tiles sixteenths 128"]:
  """Eight rows and 128 columns after the other, as [N M] lies in memory."""
  rows = up(x.shape[0], SUBLANES)
  padded = jnp.pad(x, ((0, rows - x.shape[0]), (0, 0)))
  tiles = padded.reshape(rows // SUBLANES, SUBLANES, -1, LANES)
  return tiles.swapaxes(1, 2).reshape(rows // SUBLANES, -1, LANES)


def _flat(x: Shaped[Array, "tiles sixteenths 128"]) -> Shaped[Array, "rows M"]:
  """The inverse of `_tiled`, but for what it filled up."""
  tiles = x.reshape(x.shape[0], -1, SUBLANES, LANES)
  return tiles.swapaxes(1, 2).reshape(SUBLANES * x.shape[0], -1)


def _forward(logits, bias, valid, *, shape: FewShape, grid: Grid, interpret):
  num_experts, pieces = shape.num_experts, grid.num_pieces
  columns, num_columns = shape.tokens // LANES, logits.shape[1] // SUBLANES

  def tile(core, step):
    return 0, grid.tile(core, step), 0

  def piece(core, step):
    return grid.piece(core, step), 0, 0, 0

  block = (columns * SUBLANES, LANES)
  all_experts = pl.BlockSpec((shape.num_tiles, *block), tile)
  chosen = pl.BlockSpec((1, *block), tile)
  one_row = pl.BlockSpec((columns, LANES), lambda *at: (grid.tile(*at), 0))
  arguments, specs = [logits], [all_experts]
  if bias is not None:
    arguments.append(bias.astype(jnp.float32))
    specs.append(pl.BlockSpec(memory_space=pltpu.SMEM))
  if valid is not None:
    arguments.append(valid.astype(jnp.int32).reshape(-1, LANES))
    specs.append(one_row)
  vector = (SUBLANES, LANES)
  out = functools.partial(like, logits)
  slots = (1, num_columns * SUBLANES, LANES)
  return pl.pallas_call(
    functools.partial(tpu_few.forward, shape=shape),
    out_shape=[
      out(slots, jnp.int32),
      out(slots, jnp.float32),
      out(slots, jnp.int32),
      out(slots, jnp.float32),
      out((num_columns, LANES), jnp.float32),
      out((pieces, num_experts, *vector), jnp.int32),
      out((pieces, num_experts, *vector), jnp.float32),
      out((pieces, 2, *vector), jnp.float32),
    ],
    grid=(grid.num_cores, grid.steps),
    in_specs=specs,
    out_specs=[
      chosen,
      chosen,
      chosen,
      chosen,
      one_row,
      pl.BlockSpec((None, num_experts, *vector), piece),
      pl.BlockSpec((None, num_experts, *vector), piece),
      pl.BlockSpec((None, 2, *vector), piece),
    ],
    scratch_shapes=tpu_few.scratch(shape),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary")
    ),
    cost_estimate=cost(logits, passes=1),
    interpret=interpret,
    name="topk_routing",
  )(*arguments)


def _shift(
  before: Int[Array, "cores E"],
  experts: Int[Array, "1 sixteenths 128"],
  positions: Int[Array, "1 sixteenths 128"],
  *,
  shape: FewShape,
  grid: Grid,
  interpret: bool,
) -> Int[Array, "1 sixteenths 128"]:
  """Adds to positions on a core what the cores before it have placed."""
  block = pl.BlockSpec(
    (1, shape.tokens // LANES * SUBLANES, LANES),
    lambda *at: (0, grid.tile(*at), 0),
  )
  return pl.pallas_call(
    functools.partial(tpu_few.shift, shape=shape),
    out_shape=like(positions, positions.shape, jnp.int32),
    grid=(grid.num_cores, grid.steps),
    in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), block, block],
    out_specs=block,
    input_output_aliases={2: 0},
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel")
    ),
    interpret=interpret,
    name="topk_routing_shift",
  )(before, experts, positions)


def backward(
  residuals: Residuals,
  grads: Gradients,
  rule: RoutingRule,
  *,
  grid: Grid,
  interpret: bool,
) -> Float[Array, "M E"]:
  """See reference.Xla.backward."""
  num_experts = residuals.logits.shape[1]
  shape = FewShape(
    rule=rule,
    num_experts=num_experts,
    tokens=grid.blocks.tokens,
    has_valid=residuals.valid is not None,
  )
  logits = _tiled(residuals.logits.astype(jnp.float32).T)
  columns = shape.tokens // LANES
  block = (columns * SUBLANES, LANES)
  all_experts = pl.BlockSpec((shape.num_tiles, *block), lambda i: (0, i, 0))
  chosen = pl.BlockSpec((1, *block), lambda i: (0, i, 0))
  one_row = pl.BlockSpec((columns, LANES), lambda i: (i, 0))
  scalars = pl.BlockSpec(memory_space=pltpu.SMEM)
  arguments = [
    grads.z.astype(jnp.float32).reshape(1, 1),
    grads.probability.astype(jnp.float32),
    logits,
  ]
  specs = [scalars, scalars, all_experts]
  if residuals.valid is not None:
    arguments.append(residuals.valid.astype(jnp.int32).reshape(-1, LANES))
    specs.append(one_row)
  arguments += [
    residuals.experts,
    residuals.gates,
    residuals.chosen,
    residuals.logsumexp,
    _tiled(grads.gates.astype(jnp.float32).T),
  ]
  specs += [chosen, chosen, chosen, one_row, chosen]
  grad = pl.pallas_call(
    functools.partial(
      tpu_few.backward, shape=shape, tiles_per_row=grid.tiles_per_row
    ),
    out_shape=like(logits, logits.shape, jnp.float32),
    grid=(grid.num_cores * grid.steps,),
    in_specs=specs,
    out_specs=all_experts,
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
    cost_estimate=cost(logits, passes=2),
    interpret=interpret,
    name="topk_routing_gradient",
  )(*arguments)
  return _flat(grad)[:num_experts].T.astype(residuals.logits.dtype)
