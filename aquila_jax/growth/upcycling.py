"""An upcycling: what every FFN of a mixture is made of.

A method of Scale-Out is a few numbers: into how many shards an FFN is cut, how
often each is copied, what is drawn anew. Everything else follows from them and
from the declared axes: every leaf (upcycled_tree.py), the router's rows
(routers.py), whether the function is kept (upcycling_exactness.py).

The experts that come from one FFN stand beside each other: of expert e of the
source (0 where it is dense), copy c and shard h,

  expert = (e * copies + c) * shards + h

and all of them have the same router row but for the copies of a dense FFN,
whose rows are drawn. So a token that meets one shard of a copy meets all of
them, where top_k is a multiple of the shards (virtual groups, arXiv 2410.07524,
section 3.2).
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from jaxtyping import Float

from aquila_jax.core import errors
from aquila_jax.core.experiment_config import ScaleOut
from aquila_jax.core.model_config import ModelConfig, MoeConfig, differences
from aquila_jax.growth.methods import option
from aquila_jax.growth.scale_up import refuse_masked

# The share of the units that drop_upcycling draws anew, and the noise of the
# method of that name, where the options do not say.
_REDRAW = {"drop_upcycling": 0.5}
_NOISE = {"noise": 0.1}

# Of a mixture that becomes a larger one; its dense FFNs are looked at apart.
_FREE_OF_EXPERTS = ("moe.num_experts", "moe.top_k", "moe.dense_mlp_dim")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parent:
  """What an expert copies."""

  model: int  # 0 is the source, others are of `ScaleOut.sources`
  expert: int | None  # of the source; None where it is dense
  units: slice  # its hidden units


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedExpert:
  """What a shared expert copies, and its part of the output."""

  units: slice
  share: float
  has_gate: bool  # sigmoid(x w), which starts at one half


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upcycling:
  """A method: whose hidden units every expert has, and what is changed."""

  moe: MoeConfig  # of the target
  of_source: MoeConfig | None
  layers: tuple[int, ...]  # of the model, that have experts
  num_models: int  # the source and those mixed in
  copies: int  # of an FFN, all models together, or of an expert
  shards: int  # that an FFN is cut into
  units: slice  # of the source's FFN, that the routed experts share out
  shared: SharedExpert | None  # one that is made, none that is kept
  redraw: float = 0.0
  redraw_together: bool = True
  noise: float = 0.0
  noise_share: float = 0.5
  uniform_gates: bool = False
  scales_all: bool = False  # constants go to gate, up and down alike

  @property
  def expert_units(self) -> int:
    """The hidden units of a routed expert."""
    return (self.units.stop - self.units.start) // self.shards

  def parent(self, expert: int) -> Parent:
    """What an expert of the target copies."""
    group, shard = divmod(expert, self.shards)
    of_expert, copy = divmod(group, self.copies)
    start = self.units.start + shard * self.expert_units
    return Parent(
      model=copy % self.num_models,
      expert=None if self.of_source is None else of_expert,
      units=slice(start, start + self.expert_units),
    )

  def is_changed(self, expert: int) -> bool:
    """Whether the expert is one that redraw and noise are for.

    All copies of a dense FFN are; of an expert all but the first.
    """
    copy = expert // self.shards % self.copies
    return self.of_source is None or copy > 0

  @property
  def routed_share(self) -> float:
    """The part of an FFN's output that the routed experts give."""
    if self.shared is None or self.shared.share == 1:
      return 1.0
    return 1 - self.shared.share

  @property
  def gate_sum(self) -> float | None:
    """What the gates of every token sum to; None where that is the token's."""
    moe = self.moe
    summed = moe.renormalise or moe.router_order == "topk_then_softmax"
    return moe.gate_scale if summed and moe.is_causal else None

  @property
  def needs_constant(self) -> bool:
    """Whether gates sum to something that has to be measured."""
    return (
      self.of_source is None
      and self.gate_sum is None
      and self.moe.is_causal
      and not self.uniform_gates
    )

  @property
  def together(self) -> int:
    """The experts that have one router row, and are met together."""
    return self.shards * (1 if self.of_source is None else self.copies)

  def routed_scale(
    self, constants: Float[np.ndarray, "L"] | None = None
  ) -> Float[np.ndarray, "L"]:
    """What the output of a routed expert is multiplied by, in every layer.

    A shard is one of `shards` that a token meets, each with the gate of its
    copy over `shards`, so it is multiplied by `shards`, and divided by what the
    gates sum to. Where that is the token's own it is a constant: measured, or
    A times the gate of even logits, 1 / E of softmax and 1 / 2 of sigmoid.

    A mixture that grows keeps its gates' sum, but for sigmoid as it is: there
    every copy has the gate of one.

    Args:
      constants: of `routers.measured_constants`, where `needs_constant`.

    Returns:
      The factor of each layer that has experts.
    """
    scale = np.full(len(self.layers), self.routed_share * self.shards)
    is_sigmoid = self.moe.router_order == "sigmoid"
    if self.of_source is not None:
      alone = is_sigmoid and self.gate_sum is None
      return scale / self.together if alone else scale
    if self.gate_sum is not None:
      return scale / self.gate_sum
    if not self.needs_constant:
      even = 1 / 2 if is_sigmoid else 1 / self.moe.num_experts
      return scale / (self.moe.top_k * even * self.moe.gate_scale)
    assert constants is not None
    return scale * constants

  @property
  def shared_scale(self) -> float:
    """What the output of the shared expert is multiplied by."""
    assert self.shared is not None
    return self.shared.share / (0.5 if self.shared.has_gate else 1.0)

  def in_words(self) -> str:
    """What an FFN is made of."""
    moe, old = self.moe, self.of_source
    words = f"{moe.num_experts} experts: {self.copies} copies of "
    words += "an FFN" if old is None else f"each of {old.num_experts}"
    if self.num_models > 1:
      words += f" ({self.num_models} models)"
    if self.shards > 1:
      words += f", each in {self.shards} shards"
    words += (
      f", {self.expert_units} hidden units an expert; a token meets {moe.top_k}"
    )
    if self.shared is not None:
      units = self.shared.units.stop - self.shared.units.start
      words += f", and a shared one of {units}"
      if self.shared.share < 1:
        words += f" that gives {100 * self.shared.share:g} % of the output"
    return words

  def kernel_scale(self, scale: float, *, reads_mlp: bool) -> float:
    """A kernel's part in what the output of its expert is multiplied by.

    Args:
      scale: of the output.
      reads_mlp: whether it is the down kernel.

    Returns:
      The kernel's factor. The cube root in all three is exact only where the
      activation is homogeneous of degree one, which silu is not.
    """
    if self.scales_all:
      return scale ** (1 / 3)
    return scale if reads_mlp else 1.0


def make_upcycling(
  source: ModelConfig, target: ModelConfig, options: ScaleOut, *, path: str
) -> Upcycling:
  """The way from a model to a mixture of more experts.

  Args:
    source: what is there: dense, or a mixture.
    target: what is wanted, with `moe`.
    options: the method, none that merges, and its options.
    path: the dotted name of `target`, for messages.

  Returns:
    The upcycling.

  Raises:
    errors.UserError: where there is none; it names the field, its value, what
      was expected and why.
  """
  check_kept(source, target, path=path)
  moe = target.moe
  if moe is None:
    raise errors.UserError(f"{path}.moe=None: expected the experts to make")
  if source.moe is not None:
    _check_experts(source, target, options, path=path)
  if options.router != "normal" and not moe.router_init_std:
    raise errors.UserError(
      f"{path}.moe.router_init_std=0: expected more, the size that rows have"
      f" with {option(path, 'router')}={options.router!r}"
    )
  if target.is_mixed and target.dense_mlp_dim != source.dense_mlp_dim:
    raise errors.UserError(
      f"{path}.moe.dense_mlp_dim={moe.dense_mlp_dim}: expected"
      f" {source.dense_mlp_dim}, the hidden units of the FFNs that layers"
      f" without experts keep (moe.layers={moe.layers!r})"
    )
  units, shared = _units(source, target, options, path=path)
  shards = _shards(units, target, options, path=path)
  groups = 1 if source.moe is None else source.moe.num_experts
  if moe.num_experts % (groups * shards):
    raise errors.UserError(
      f"{path}.moe.num_experts={moe.num_experts}: expected a multiple of"
      f" {groups * shards}"
      + (f", the source's {groups} experts" if groups > 1 else "")
      + (f" in {shards} shards each" if shards > 1 else "")
    )
  copies = moe.num_experts // (groups * shards)
  num_models = 1 + len(options.sources)
  if copies % num_models:
    raise errors.UserError(
      f"{path}.moe.num_experts={moe.num_experts}: expected a multiple of"
      f" {num_models * shards}, so that each of {num_models} models gives as"
      " many experts"
    )
  method = options.method
  return Upcycling(
    moe=moe,
    of_source=source.moe,
    layers=target.moe_layers,
    num_models=num_models,
    copies=copies,
    shards=shards,
    units=units,
    shared=shared,
    redraw=_given(options.redraw, _REDRAW.get(method, 0.0)),
    redraw_together=options.redraw_units == "together",
    noise=_given(options.noise, _NOISE.get(method, 0.0)),
    noise_share=options.noise_share,
    uniform_gates=options.gate_constant == "uniform",
    scales_all=options.scaled_kernels == "all",
  )


def _given(value: float | None, otherwise: float) -> float:
  return otherwise if value is None else value


def check_kept(source: ModelConfig, target: ModelConfig, *, path: str) -> None:
  """Refuses a target that differs from its source in more than its FFNs.

  Raises:
    errors.UserError: naming the field and both values.
  """
  refuse_masked(source)
  for name, given, needed in differences(target, source):
    if name != "mlp_dim" and name.split(".")[0] != "moe":
      raise errors.UserError(
        f"{path}.{name}={given!r}: expected the source's {needed!r};"
        " Scale-Out makes experts of FFNs, Scale-Up changes sizes"
      )


def _check_experts(
  source: ModelConfig, target: ModelConfig, options: ScaleOut, *, path: str
) -> None:
  """Refuses another kind of mixture than the source is."""
  assert source.moe is not None
  assert target.moe is not None
  for name, given, needed in differences(target, source):
    same = name == "moe.layers" and source.moe_layers == target.moe_layers
    if name.startswith("moe.") and name not in _FREE_OF_EXPERTS and not same:
      raise errors.UserError(
        f"{path}.{name}={given!r}: expected the source's {needed!r};"
        " a mixture grows in the number of its experts"
      )
  if options.router != "normal":
    raise errors.UserError(
      f"{option(path, 'router')}={options.router!r}: expected 'normal'; the"
      " source has experts, and their rows are kept"
    )
  if options.sources:
    raise errors.UserError(
      f"{option(path, 'sources')}: expected none; the source has"
      f" {source.moe.num_experts} experts, and dense models are mixed"
    )


def _units(
  source: ModelConfig, target: ModelConfig, options: ScaleOut, *, path: str
) -> tuple[slice, SharedExpert | None]:
  """The units of the source's FFN that are routed, and the shared expert."""
  moe = target.moe
  assert moe is not None
  width, shared = source.mlp_dim, moe.shared_expert_dim
  if source.moe is not None or not shared:
    return slice(0, width), None
  if shared == width:
    return slice(0, width), SharedExpert(
      units=slice(0, width),
      share=options.shared_share,
      has_gate=moe.shared_expert_gate,
    )
  if shared > width:
    raise errors.UserError(
      f"{path}.moe.shared_expert_dim={shared}: expected {width} for a copy of"
      " the whole FFN, or less for a part of its units"
    )
  return slice(shared, width), SharedExpert(
    units=slice(0, shared), share=1.0, has_gate=moe.shared_expert_gate
  )


def _shards(
  units: slice, target: ModelConfig, options: ScaleOut, *, path: str
) -> int:
  """Into how many shards the routed units are cut."""
  routed = units.stop - units.start
  given = f"{path}.mlp_dim={target.mlp_dim}"
  if target.mlp_dim > routed or routed % target.mlp_dim:
    divisors = [routed // n for n in range(1, routed + 1) if routed % n == 0]
    nearest = min(divisors, key=lambda size: abs(size - target.mlp_dim))
    raise errors.UserError(
      f"{given}: expected a divisor of {routed}, the"
      " hidden units that the routed experts share out; the nearest is"
      f" {nearest}"
    )
  shards = routed // target.mlp_dim
  if options.method == "sparse_upcycling" and shards > 1:
    raise errors.UserError(
      f"{given}: expected {routed}; sparse upcycling copies an FFN whole,"
      " method='granular' cuts it"
    )
  if options.method == "granular" and shards == 1:
    raise errors.UserError(
      f"{given}: expected a part of {routed}, such as {_half(routed)};"
      " method='granular' cuts an FFN into shards"
    )
  return shards


def _half(size: int) -> int:
  """The largest proper divisor."""
  factor = next(
    (n for n in range(2, math.isqrt(size) + 1) if size % n == 0), size
  )
  return size // factor
