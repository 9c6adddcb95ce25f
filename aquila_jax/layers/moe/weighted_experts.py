"""Experts of rows that are here, weighed and added, with gradients by hand.

Autodiff takes the gradient of a gate from the output that it weighs, so that
under remat all outputs are computed a second time. By the kernels for TPUs it
comes from what the backward pass has anyway
(kernels/expert_ffn/pallas_tpu.py, `weighted_gradients`), and no output is.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from aquila_jax.kernels.expert_ffn import pallas_tpu, swiglu
from aquila_jax.kernels.expert_ffn.tpu_tiles import Chip
from aquila_jax.layers.moe import dispatch
from aquila_jax.layers.moe.dispatch import TokenDispatch

Kernels = tuple[jax.Array, jax.Array, jax.Array]  # gate, up, down


def apply(
  x: Float[Array, "M D"],
  plan: TokenDispatch,
  kernels: Kernels,
  *,
  chip: Chip | None = None,
) -> Float[Array, "M D"]:
  """The sum over a token's experts of gate * expert(x).

  Args:
    x: tokens.
    plan: of these, for the experts here.
    kernels: of these: gate and up [X D F], down [X F D].
    chip: of pallas_tpu.chip_of; None is what is compiled for.

  Returns:
    The outputs.

  Raises:
    NotImplementedError: off TPUs, and of dtypes that the kernels do not take.
  """
  if chip is None:
    chip = pallas_tpu.chip_of(x.dtype, kernels)
  block_size = plan.assignment.size // plan.block_expert.size
  group_rows = block_size * swiglu.blocks_of_experts(
    plan.block_expert, plan.num_blocks, num_experts=kernels[0].shape[0]
  )
  where = plan.slot, plan.assignment, group_rows
  return _apply(chip, x, plan.routing.gates, kernels, where)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(chip, x, gates, kernels, where):
  return _computed(chip, x, gates, kernels, where, keep=False)[0]


def _computed(chip, x, gates, kernels, where, *, keep: bool):
  slot, assignment, group_rows = where
  # An empty slot has R, which is A times M: the last row.
  rows = dispatch.clipped(x, assignment // gates.shape[1])
  out, *kept = pallas_tpu.outputs(chip, rows, kernels, group_rows, keep=keep)
  summed = dispatch.sum_of_slots(out, slot.reshape(gates.shape), weights=gates)
  return summed, (rows, *kept)


def _forward(chip, x, gates, kernels, where):
  summed, kept = _computed(chip, x, gates, kernels, where, keep=True)
  return summed, (gates, kernels, where, kept)


def _backward(chip, residuals, grad):
  gates, kernels, (slot, assignment, group_rows), kept = residuals
  rows, *products = kept
  is_used = assignment < slot.size
  grad_rows = dispatch.clipped(grad, assignment // gates.shape[1])
  grad_rows = jnp.where(is_used[:, None], grad_rows, 0)
  # In the rows' dtype, as in the sum.
  weights = dispatch.clipped(gates.reshape(-1).astype(rows.dtype), assignment)
  rows_grad, weights_grad, kernel_grads = pallas_tpu.weighted_gradients(
    chip,
    grad_rows,
    jnp.where(is_used, weights, 0),
    rows,
    kernels,
    group_rows,
    products,
  )
  slots = slot.reshape(gates.shape)
  x_grad = dispatch.sum_of_slots(rows_grad, slots, weights=gates)
  gates_grad = dispatch.take(weights_grad, slot).reshape(gates.shape)
  return x_grad, gates_grad.astype(gates.dtype), kernel_grads, None


_apply.defvjp(_forward, _backward)
