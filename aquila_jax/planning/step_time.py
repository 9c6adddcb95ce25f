"""How long a training step takes on a pod, by a roofline: no compiler.

  compute   FLOPs, with what remat computes again, at a share of the published
            rate (`RATES`)
  memory    bytes that no matrix product hides: optimizer, sums of gradients,
            logits
  links     kernels gathered over `fsdp` and their gradients summed, layer by
            layer and microbatch by microbatch; rows to experts and back over
            `expert`; what layers write over `tensor`; by the formulas of
            tpu_program.py

It is for telling meshes apart; `plan compile` has what a program does.
"""

from __future__ import annotations

import dataclasses
import functools

from aquila_jax.core.axes import Role
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.planning import counting
from aquila_jax.planning.pods import Pod
from aquila_jax.planning.step_memory import Step, leaves
from aquila_jax.sharding.rules import GATHERED

# Of the published rate, what a step without links gets of it, by compiled steps
# of AquilaMoE-8x16B: experts, and all else. v5e's are between the others.
EXPERT_RATES = {"TPU v5 lite": 0.86, "TPU v5": 0.96, "TPU v6 lite": 0.76}
RATES = {"TPU v5 lite": 0.75, "TPU v5": 0.84, "TPU v6 lite": 0.65}
# Rows of a tile of the experts' kernels, one of which experts share.
_TILE_ROWS = 512
# What a number of the state has read and written in an update, in float32:
# parameter, both moments and gradient, of which all but the last are written.
_UPDATE_BYTES = 7 * 4
# For a move of rows to experts, times the bytes of their buffer, as compiled
# steps have it: by a ragged exchange zeros and copies, 38 on v5p and 56 on v6e;
# by an all-gather what gathers and sums over the tokens of all.
_EXCHANGE_BYTES = {"all_gather": 6}
_RAGGED_BYTES = 45
# Of a number of gradients, added to a sum.
_SUM_BYTES = 3 * 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime:
  """Seconds of a step."""

  compute: float
  memory: float
  links: float
  flops: float  # that the model needs, at the published rate

  @property
  def without_overlap(self) -> float:
    """One after the other."""
    return self.compute + self.memory + self.links

  @property
  def with_full_overlap(self) -> float:
    """Links beside all else."""
    return max(self.compute + self.memory, self.links)

  @property
  def mfu(self) -> float:
    """Of the published rate, without overlap."""
    return self.flops / self.without_overlap


def step_time(step: Step, pod: Pod) -> StepTime:
  """The roofline of a step.

  Args:
    step: on a mesh of the pod's chips.
    pod: of the chips.

  Returns:
    Its parts.
  """
  chip = pod.chip
  needed, experts, rest = _flops(step)
  kind = pod.device_kind
  compute = experts / EXPERT_RATES[kind] + rest / RATES[kind]
  return StepTime(
    compute=compute / chip.flops,
    memory=_memory_bytes(step) / chip.memory_bytes,
    links=_links(step, pod),
    flops=needed / chip.flops,
  )


def _flops(step: Step) -> tuple[float, float, float]:
  """Of a device in a step: needed ones; those of experts, and of all else."""
  model, train = step.model, step.train
  counted = _counted(model, train.sequence_length)
  parts = {name: part.forward_flops for name, part in counted.parts.items()}
  body = counted.total.forward_flops - parts["lm_head"]
  experts = parts.get("experts", 0)
  passes = 3 + train.has_load_pass(model)
  # A tile in which experts meet is computed for each of them.
  of_experts = experts * passes * step.tile_share(_TILE_ROWS)
  if model.remat != "none":
    # Of three products of experts the last is not always computed again.
    of_experts += experts * 2 / 3 if step.weighs_here else experts
  again = {
    "none": 0,
    # Kernels are no matrix products of which the policy knows.
    "dots": parts["attention scores"],
    "full": body - experts,
  }[model.remat]
  if model.head_chunks > 1:
    again += parts["lm_head"]
  if train.has_load_pass(model):
    again += body - experts
  rest = counted.train_flops - 3 * experts + again
  tokens = step.tokens * train.num_microbatches
  device = tokens / step.mesh.shape.get("tensor", 1)
  return device * counted.train_flops, device * of_experts, device * rest


@functools.cache
def _counted(model: ModelConfig, sequence_length: int) -> counting.ModelCount:
  return counting.count(model, sequence_length=sequence_length)


def _memory_bytes(step: Step) -> float:
  numbers = sum(leaf.numbers(step.mesh) for leaf in leaves(step.model))
  count = step.train.num_microbatches
  sums = 0 if count == 1 else count * numbers * _SUM_BYTES
  # Logits are written, read for their sums, and read again for a gradient that
  # is written and read twice.
  logits = count * 3 * step.logit_bytes
  around = count * (_copies(step) + _around_exchanges(step))
  return numbers * _UPDATE_BYTES + sums + logits + around


def _moves(step: Step) -> int:
  """Of rows to experts on other devices or back, in a microbatch.

  There and back; again for the backward pass, whatever the remat, and their
  gradients.
  """
  if step.model.moe is None or step.mesh.shape.get("expert", 1) == 1:
    return 0
  each = 2 * (3 + step.train.has_load_pass(step.model))
  return each * len(step.model.moe_layers)


def _around_exchanges(step: Step) -> float:
  """Of a microbatch: zeros, gathers and sums around every move of rows."""
  if not _moves(step):
    return 0.0
  buffer = step.rows() * step.model.embed_dim * step.compute_bytes
  assert step.model.moe is not None
  each = _EXCHANGE_BYTES.get(step.model.moe.exchange or "", _RAGGED_BYTES)
  return float(_moves(step) * each * buffer)


def _copies(step: Step) -> float:
  """Of a microbatch: gathered kernels that are copied into place.

  Forward, for the backward pass, and as gradients; twice read and written, as
  compiled steps have it.
  """
  model, c = step.model, step.compute_bytes
  whole = sum(
    leaf.numbers(step.mesh, gathered=True)
    for leaf in leaves(model)
    if leaf.axes.has("layer") and leaf.is_copied(step.mesh)
  )
  return float(_passes(step, 1) * 2 * 2 * whole * c)


def _passes(step: Step, backward: int) -> int:
  """Forward, again for the backward pass, for the load; and so many more."""
  again = step.model.remat != "none"
  return 1 + again + step.train.has_load_pass(step.model) + backward


def _links(step: Step, pod: Pod) -> float:
  """Seconds of all collectives, one after the other."""
  train, model = step.train, step.model
  places = pod.placed(dict(step.mesh.shape))
  link, c = pod.chip.link_bytes, step.compute_bytes
  wide = {axis: link * max(1, len(place)) for axis, place in places.items()}
  # Gathered over both of them at once.
  all_parts = link * max(1, sum(len(places[axis]) for axis in GATHERED))
  forward = _passes(step, 0)
  seconds = 0.0
  for leaf in leaves(model):
    cut, whole = leaf.numbers(step.mesh), leaf.numbers(step.mesh, gathered=True)
    is_head = leaf.axes.has("vocab", Role.WRITES)
    is_table = leaf.axes.has("vocab", Role.NEITHER)
    if whole > cut and not is_table:
      # Gradients of experts are scattered (layers/gathering.py), those that the
      # compiler divides by itself all-reduced, which is twice a gathering.
      sums = 1 if leaf.axes.has("expert") else 2
      passes = sums + (1 if is_head else forward)
      seconds += passes * whole * c / all_parts
    if step.mesh.shape.get("data", 1) > 1:
      seconds += 2 * cut * c / wide["data"]
  width = step.tokens * model.embed_dim * c
  if step.mesh.shape.get("tensor", 1) > 1:
    # What attention and FFN write, and the gradients of what they read.
    each = 2 * width / wide["tensor"]
    seconds += 2 * model.num_layers * (forward + 1) * each
  if _moves(step):
    sent = step.rows() * model.embed_dim * c
    seconds += _moves(step) * sent * max(places["expert"]) / (4 * link)
  if step.mesh.shape.get("sequence", 1) > 1:
    keys = 2 * step.tokens * model.num_kv_heads * model.head_dim * c
    each = keys * step.mesh.shape["sequence"] / wide["sequence"]
    seconds += model.num_layers * (forward + 2) * each
  return seconds * train.num_microbatches
