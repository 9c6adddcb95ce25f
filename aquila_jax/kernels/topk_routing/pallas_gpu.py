"""Top-k routing in Pallas for GPUs, by Triton."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float

from aquila_jax.kernels.target import target
from aquila_jax.kernels.topk_routing import gpu_kernels
from aquila_jax.kernels.topk_routing.gpu_kernels import Shape, power_of_two
from aquila_jax.kernels.topk_routing.grid import cost, like
from aquila_jax.kernels.topk_routing.rule import (
  Gradients,
  Residuals,
  Routed,
  RoutingRule,
  beyond_kernels,
)

# Of a thread; more take so many registers that few programs run at once.
_LOGITS = 8
# Of a program, at least: counts and sums are written for each.
_TOKENS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuBlocks:
  """How a program takes its tokens; powers of two."""

  tokens: int  # a group
  groups: int = 1
  warps: int = 1


def default_blocks(num_experts: int) -> GpuBlocks:
  """One warp a program: its reductions over experts leave no registers.

  Four warps take 1.1 times the instructions a token with 64 experts, and 1.8
  times with 384, by what Triton makes of it for an H100 (planning/gpu_code.py).
  """
  tokens = 32 * _LOGITS // power_of_two(num_experts)
  tokens = max(1, min(tokens, 32))
  return GpuBlocks(tokens=tokens, groups=max(1, _TOKENS // tokens))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PallasGpu:
  """The backend; api.py has its interface."""

  # None is the target's (kernels/target.py).
  device_kind: str | None = None
  blocks: GpuBlocks | None = None  # None is `default_blocks`
  interpret: bool = False  # runs the bodies anywhere; for tests

  def unsupported(
    self, rule: RoutingRule, dtype: jnp.dtype, num_experts: int
  ) -> str | None:
    """A reason, or None."""
    if self.device_kind is None and target().platform != "gpu":
      return f"GPU, but {target().platform}"
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
    shape = self._shape(
      logits,
      rule,
      num_rows,
      has_bias=bias is not None,
      has_valid=valid is not None,
    )
    programs = num_rows * shape.programs_per_row
    out = functools.partial(like, logits)
    chosen = (num_tokens, rule.top_k)
    (
      experts,
      gates,
      positions,
      of_chosen,
      lse,
      counts,
      probability,
      z,
      entropy,
    ) = self._call(
      gpu_kernels.forward,
      shape,
      num_rows,
      [
        logits,
        *([] if bias is None else [bias.astype(jnp.float32)[None]]),
        *_as_bytes(valid),
      ],
      [
        out(chosen, jnp.int32),
        out(chosen, jnp.float32),
        out(chosen, jnp.int32),
        out(chosen, jnp.float32),
        out((num_tokens,), jnp.float32),
        out((programs, num_experts), jnp.int32),
        out((programs, num_experts), jnp.float32),
        out((num_tokens,), jnp.float32),
        out((num_tokens,), jnp.float32),
      ],
      cost_estimate=cost(logits, passes=1),
      name="topk_routing",
    )
    before = jnp.cumsum(counts, axis=0, dtype=jnp.int32) - counts
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    row, inside = token // shape.row_tokens, token % shape.row_tokens
    program = row * shape.programs_per_row + inside // shape.program_tokens
    positions = jnp.where(
      positions < 0, positions, positions + before[program[:, None], experts]
    )
    by_row = (num_rows, shape.programs_per_row, num_experts)
    routed = Routed(
      experts=experts,
      gates=gates,
      positions=positions,
      counts=counts.reshape(by_row).sum(axis=1),
      probability=probability.reshape(by_row).sum(axis=1),
      z=jnp.sum(z),
      entropy=jnp.sum(entropy),
    )
    residuals = Residuals(
      logits=logits,
      valid=valid,
      experts=experts,
      gates=gates,
      chosen=of_chosen,
      logsumexp=lse,
    )
    return routed, residuals

  def backward(
    self, residuals: Residuals, grads: Gradients, rule: RoutingRule
  ) -> Float[Array, "M E"]:
    """See reference.backward."""
    logits, valid = residuals.logits, residuals.valid
    num_rows = grads.probability.shape[0]
    shape = self._shape(
      logits, rule, num_rows, has_bias=False, has_valid=valid is not None
    )
    (grad,) = self._call(
      gpu_kernels.backward,
      shape,
      num_rows,
      [
        grads.z.astype(jnp.float32).reshape(1),
        logits,
        *_as_bytes(valid),
        residuals.experts,
        residuals.gates,
        residuals.chosen,
        residuals.logsumexp,
        grads.gates.astype(jnp.float32),
        grads.probability.astype(jnp.float32),
      ],
      [like(logits, logits.shape, logits.dtype)],
      cost_estimate=cost(logits, passes=2),
      name="topk_routing_gradient",
    )
    return grad

  def _shape(
    self,
    logits: jax.Array,
    rule: RoutingRule,
    num_rows: int,
    *,
    has_bias: bool,
    has_valid: bool,
  ) -> Shape:
    num_tokens, num_experts = logits.shape
    row_tokens = num_tokens // num_rows
    blocks = self._blocks(num_experts)
    tokens = min(blocks.tokens, power_of_two(row_tokens))
    return Shape(
      rule=rule,
      num_experts=num_experts,
      row_tokens=row_tokens,
      tokens=tokens,
      groups=min(blocks.groups, power_of_two(-(-row_tokens // tokens))),
      has_bias=has_bias,
      has_valid=has_valid,
    )

  def _blocks(self, num_experts: int) -> GpuBlocks:
    return self.blocks or default_blocks(num_experts)

  def _call(self, body, shape: Shape, num_rows: int, arguments, out, **options):
    return pl.pallas_call(
      functools.partial(body, shape=shape),
      out_shape=out,
      grid=(num_rows, shape.programs_per_row),
      compiler_params=plgpu.CompilerParams(
        num_warps=self._blocks(shape.num_experts).warps, num_stages=1
      ),
      interpret=self.interpret,
      **options,
    )(*arguments)


def _as_bytes(valid: Bool[Array, "M"] | None) -> list[jax.Array]:
  """Triton has no pointer to bits."""
  return [] if valid is None else [valid.astype(jnp.int8)]
