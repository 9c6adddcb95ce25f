"""Types that the packages hand to each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import struct

# A field of a pytree: an array, or whatever a tree transformation puts in its
# place (a shape, a sharding). Its own shape stands in a comment beside it.
if TYPE_CHECKING:
  Leaf = jax.Array
else:
  Leaf = Any

# jax.Device is a class at run time, but to pyright a variable.
if TYPE_CHECKING:
  Device = Any
else:
  Device = jax.Device

# Nested dicts of arrays; leaves and structure are declared by the model.
Params = Any


class Batch(struct.PyTreeNode):
  """Packed rows of text.

  `segments` numbers the documents of a row from 1; 0 is padding. `positions`
  restart at 0 in every document. A target is the next token of the same
  document; where there is none its weight is 0.
  """

  tokens: Leaf  # int [B T]
  targets: Leaf  # int [B T]
  weights: Leaf  # float [B T]
  segments: Leaf  # int [B T]
  positions: Leaf  # int [B T]
  languages: Leaf  # int [B T]; index into the data's list of languages


class RoutingStats(struct.PyTreeNode):
  """What one MoE layer, or with a leading axis L a stack, says of its routing.

  L counts the layers with experts alone: `ModelConfig.moe_layers` says which
  layers of the model they are. Padding tokens never count. At least float32
  throughout.
  """

  load: Leaf  # float [*L E]; f, the share of the assignments an expert gets
  probability: Leaf  # float [*L E]; P, the mean probability of an expert
  sequence_balance: Leaf  # float [*L]; E sum f P of each row, mean over rows
  z_loss: Leaf  # float [*L]; mean logsumexp(router logits)^2
  entropy: Leaf  # float [*L]; mean entropy of a token's probabilities, nats
  top_gate: Leaf  # float [*L]; mean of a token's largest gate
  dropped: Leaf  # float [*L]; share of the assignments that found no slot
  # float [*L I E]; share of all assignments that are of a token of group i and
  # of an expert. None where tokens have no groups.
  group_load: Leaf | None = None

  @property
  def balance_loss(self) -> jax.Array:
    """E sum_i f_i P_i of these very tokens, [*L]; 1 when balanced."""
    return self.balance(self.load)

  def balance(self, load: jax.Array) -> jax.Array:
    """The same with an f [*L E] from elsewhere; f carries no gradient."""
    product = jax.lax.stop_gradient(load) * self.probability
    return load.shape[-1] * jnp.sum(product, axis=-1)


class TrainState(struct.PyTreeNode):
  """Everything that a training step changes.

  `step` counts the optimizer steps of this stage; the Adam counter inside
  `opt_state` goes on through growth.
  """

  step: Leaf  # int []
  params: Params
  opt_state: Any
  ema: Params | None = None
  # float32 [L]; the weight of each layer's balance loss, where it adapts.
  balance_weights: Leaf | None = None
  # float32 [2 W]; of the last steps, where spikes are watched for.
  recent: Leaf | None = None
