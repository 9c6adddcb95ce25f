"""Top-k routing in Pallas for TPUs.

Experts lie on sublanes and tokens on lanes: eight experts fill a vector, and
reductions over experts are cheap. XLA lays router logits out so by itself, so
that nothing is transposed. Few experts have kernels of their own
(few_experts.py).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from aquila_jax.kernels.target import num_cores, target
from aquila_jax.kernels.topk_routing import (
  few_experts,
  tpu_backward,
  tpu_few,
  tpu_forward,
  tuning,
)
from aquila_jax.kernels.topk_routing import lanes as vec
from aquila_jax.kernels.topk_routing.grid import Grid, cost, like, up
from aquila_jax.kernels.topk_routing.lanes import LANES, SUBLANES
from aquila_jax.kernels.topk_routing.rule import (
  Gradients,
  Residuals,
  Routed,
  RoutingRule,
  beyond_kernels,
)
from aquila_jax.kernels.topk_routing.tpu_forward import Shape
from aquila_jax.kernels.topk_routing.tuning import Blocks

# Their compiler has no gather along sublanes.
_WITHOUT_GATHER = ("TPU v2", "TPU v3", "TPU v4", "TPU v4 lite")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PallasTpu:
  """The backend; api.py has its interface."""

  # None is the target's (kernels/target.py).
  device_kind: str | None = None
  blocks: Blocks | None = None  # None looks them up
  interpret: bool = False  # runs the bodies anywhere; for tests

  def unsupported(
    self, rule: RoutingRule, dtype: jnp.dtype, num_experts: int
  ) -> str | None:
    """A reason, or None."""
    if self.device_kind is None and target().platform != "tpu":
      return f"TPU, but {target().platform}"
    if self._kind in _WITHOUT_GATHER:
      return f"kernel for {self._kind}"
    return beyond_kernels(rule, dtype, num_experts)

  def forward(
    self,
    logits: Float[Array, "M E"],
    rule: RoutingRule,
    *,
    bias: Float[Array, "E"] | None,
    valid: Bool[Array, "M"] | None,
    num_rows: int,
  ) -> tuple[Routed, Residuals]:
    """See api.topk_routing."""
    num_tokens, num_experts = logits.shape
    grid = self._grid(num_tokens, num_experts, rule, num_rows)
    if few_experts.suits(rule, num_experts, grid.row_tokens):
      return few_experts.forward(
        logits,
        rule,
        bias=bias,
        valid=valid,
        grid=grid,
        interpret=self.interpret,
      )
    shape = Shape(
      rule=rule,
      num_experts=num_experts,
      blocks=grid.blocks,
      is_half=logits.dtype.itemsize < 4,
      has_bias=bias is not None,
      has_valid=valid is not None or grid.is_ragged,
      steps_per_piece=grid.steps_per_piece,
    )
    out = _forward(
      grid.padded(logits.T),
      bias=bias,
      valid=grid.valid(valid) if shape.has_valid else None,
      shape=shape,
      grid=grid,
      interpret=self.interpret,
    )
    experts, gates, positions, chosen, lse, counts, probability, scalars = out
    before, counts = grid.assignments(counts[:, :num_experts, 0])
    if grid.num_cores > 1:
      positions = _shift(
        experts,
        positions,
        before,
        shape=shape,
        grid=grid,
        interpret=self.interpret,
      )
    scalars = scalars[:, ::SUBLANES].sum(axis=(0, 2))
    experts, gates = grid.tokens(experts).T, grid.tokens(gates).T
    routed = Routed(
      experts=experts,
      gates=gates,
      positions=grid.tokens(positions).T,
      counts=counts,
      probability=grid.by_row(probability[:, :num_experts].sum(axis=-1)),
      z=scalars[0],
      entropy=scalars[1],
    )
    residuals = Residuals(
      logits=logits,
      valid=valid,
      experts=experts,
      gates=gates,
      chosen=grid.tokens(chosen).T,
      logsumexp=grid.tokens(lse)[0],
    )
    return routed, residuals

  def backward(
    self, residuals: Residuals, grads: Gradients, rule: RoutingRule
  ) -> Float[Array, "M E"]:
    """See reference.backward."""
    num_tokens, num_experts = residuals.logits.shape
    grid = self._grid(num_tokens, num_experts, rule, grads.probability.shape[0])
    if few_experts.suits(rule, num_experts, grid.row_tokens):
      return few_experts.backward(
        residuals, grads, rule, grid=grid, interpret=self.interpret
      )
    is_padded = residuals.valid is not None or grid.is_ragged
    grad = _backward(
      residuals,
      grads,
      valid=grid.valid(residuals.valid) if is_padded else None,
      shape=tpu_backward.BackwardShape(
        rule=rule,
        num_experts=num_experts,
        tokens=grid.blocks.tokens,
        width=grid.blocks.backward,
        has_valid=is_padded,
      ),
      grid=grid,
      interpret=self.interpret,
    )
    return grid.tokens(grad).T

  @property
  def _kind(self) -> str:
    return self.device_kind or target().device_kind

  def _grid(
    self, num_tokens: int, num_experts: int, rule: RoutingRule, num_rows: int
  ) -> Grid:
    kind = self._kind
    blocks = self.blocks or tuning.blocks(
      kind, num_experts=num_experts, top_k=rule.top_k
    )
    row_tokens = num_tokens // num_rows
    is_few = few_experts.suits(rule, num_experts, row_tokens)
    return Grid.of(
      row_tokens,
      num_rows,
      blocks=blocks,
      num_cores=num_cores(kind),
      unit=tpu_few.UNIT if is_few else LANES,
    )


def _forward(logits, *, bias, valid, shape: Shape, grid: Grid, interpret: bool):
  num_experts, num_tokens = logits.shape
  top_k, tile = shape.rule.top_k, grid.blocks.tokens
  rows = shape.num_tiles * SUBLANES
  out = functools.partial(like, logits)

  def column(core, step):
    return 0, grid.tile(core, step)

  def piece(core, step):
    return grid.piece(core, step), 0, 0

  arguments, specs = [logits], [pl.BlockSpec((_rows(logits), tile), column)]
  if bias is not None:
    arguments.append(_on_lanes(bias.astype(jnp.float32), rows))
    specs.append(pl.BlockSpec((rows, LANES), lambda core, step: (0, 0)))
  if valid is not None:
    arguments.append(valid)
    specs.append(pl.BlockSpec((1, tile), column))
  chosen = pl.BlockSpec((shape.slots, tile), column)
  of_piece = pl.BlockSpec((None, rows, LANES), piece)
  pieces = grid.num_pieces
  return pl.pallas_call(
    functools.partial(tpu_forward.kernel, shape=shape),
    out_shape=[
      out((top_k, num_tokens), jnp.int32),
      out((top_k, num_tokens), jnp.float32),
      out((top_k, num_tokens), jnp.int32),
      out((top_k, num_tokens), jnp.float32),
      out((1, num_tokens), jnp.float32),
      out((pieces, rows, LANES), jnp.int32),
      out((pieces, rows, LANES), jnp.float32),
      out((pieces, 2 * SUBLANES, LANES), jnp.float32),
    ],
    grid=(grid.num_cores, grid.steps),
    in_specs=specs,
    out_specs=[
      chosen,
      chosen,
      chosen,
      chosen,
      pl.BlockSpec((1, tile), column),
      of_piece,
      of_piece,
      pl.BlockSpec((None, 2 * SUBLANES, LANES), piece),
    ],
    scratch_shapes=tpu_forward.scratch(shape),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary")
    ),
    cost_estimate=cost(logits, passes=1),
    interpret=interpret,
    name="topk_routing",
  )(*arguments)


def _shift(
  experts: Int[Array, "A M"],
  positions: Int[Array, "A M"],
  before: Int[Array, "cores E"],
  *,
  shape: Shape,
  grid: Grid,
  interpret: bool,
) -> Int[Array, "A M"]:
  """Adds to positions on a core what the cores before it have placed."""
  rows, tile = shape.num_tiles * SUBLANES, grid.blocks.tokens
  # The first core has none before it; all cores share the rest.
  rest = grid.num_cores * grid.steps - grid.steps
  block = pl.BlockSpec((shape.slots, tile), lambda i: (0, grid.steps + i))
  return pl.pallas_call(
    functools.partial(_shift_kernel, shape=shape),
    out_shape=like(positions, positions.shape, jnp.int32),
    grid=(rest,),
    in_specs=[
      block,
      block,
      pl.BlockSpec(
        (None, rows, LANES), lambda i: (1 + jax.lax.div(i, grid.steps), 0, 0)
      ),
    ],
    out_specs=block,
    input_output_aliases={1: 0},
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
    interpret=interpret,
    name="topk_routing_shift",
  )(experts, positions, _on_lanes(before, rows))


def _shift_kernel(experts_ref, positions_ref, before_ref, out_ref, *, shape):
  def some_lanes(i):
    for start in range(0, shape.slots, SUBLANES):
      at = slice(start, start + SUBLANES), vec.part(i, LANES)
      before = tpu_forward.at_experts(
        (before_ref[vec.part(t, SUBLANES)] for t in range(shape.num_tiles)),
        experts_ref[at],
      )
      positions = positions_ref[at]
      out_ref[at] = jnp.where(positions < 0, positions, positions + before)

  vec.loop(experts_ref.shape[1] // LANES, some_lanes)


def _backward(
  residuals: Residuals,
  grads: Gradients,
  *,
  valid,
  shape: tpu_backward.BackwardShape,
  grid: Grid,
  interpret: bool,
):
  logits = grid.padded(residuals.logits.T)
  tile, rows = shape.tokens, shape.num_tiles * SUBLANES
  column = lambda i: (0, i)  # noqa: E731
  chosen = pl.BlockSpec((shape.slots, tile), column)
  all_experts = pl.BlockSpec((_rows(logits), tile), column)
  one_row = pl.BlockSpec((1, tile), column)
  arguments = [
    grads.z.astype(jnp.float32).reshape(1, 1),
    logits,
    *([] if valid is None else [valid]),
    grid.padded(residuals.experts.T),
    grid.padded(residuals.gates.T),
    grid.padded(residuals.chosen.T),
    grid.padded(residuals.logsumexp[None]),
    grid.padded(grads.gates.astype(jnp.float32).T),
    _on_lanes(grads.probability.astype(jnp.float32), rows),
  ]
  specs = [
    pl.BlockSpec(memory_space=pltpu.SMEM),
    all_experts,
    *([] if valid is None else [one_row]),
    chosen,
    chosen,
    chosen,
    one_row,
    chosen,
    pl.BlockSpec(
      (None, rows, LANES), lambda i: (jax.lax.div(i, grid.tiles_per_row), 0, 0)
    ),
  ]
  return pl.pallas_call(
    functools.partial(tpu_backward.kernel, shape=shape),
    out_shape=like(logits, logits.shape, logits.dtype),
    grid=(grid.num_cores * grid.steps,),
    in_specs=specs,
    out_specs=all_experts,
    scratch_shapes=tpu_backward.scratch(shape),
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
    cost_estimate=cost(logits, passes=2),
    interpret=interpret,
    name="topk_routing_gradient",
  )(*arguments)


def _rows(logits: jax.Array) -> int:
  """Those of a block with all experts: whole vectors of the logits' width."""
  return up(logits.shape[0], SUBLANES * 4 // logits.dtype.itemsize)


def _on_lanes(x: jax.Array, rows: int) -> jax.Array:
  """[*B E] -> [*B rows 128], the same in each lane, zeros below."""
  widths = [(0, 0)] * (x.ndim - 1) + [(0, rows - x.shape[-1])]
  padded = jnp.pad(x, widths)
  return jnp.broadcast_to(padded[..., None], (*padded.shape, LANES))
