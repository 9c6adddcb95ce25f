"""The router: how well each expert suits each token, before any choice."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from aquila_jax.core import axes, dtypes
from aquila_jax.core.model_config import ModelConfig, MoeConfig
from aquila_jax.core.types import Leaf

# The collection of random keys that routers draw from, where `apply` is given
# one: in training, of a config with noise. Without it nothing is drawn.
RNG = "router"
# Added to the variance that logit_normalisation divides by.
_EPSILON = 1e-6


class Affinity(struct.PyTreeNode):
  """What the router says of tokens and E experts; at least float32.

  Tokens are in one axis, [M], or in two, [B T], until they are dispatched.
  """

  plain: Leaf  # float [M E]; logits x W, what the z-loss is of
  logits: Leaf  # float [M E]; normalised and with noise, what scores are of
  bias: Leaf | None  # float [E]; added to scores for the choice
  valid: Leaf  # bool [M]; False for padding: no place, no count

  def flat(self) -> Affinity:
    """Tokens in one axis; what is the same stays the same."""
    plain = self.plain.reshape(-1, self.plain.shape[-1])
    is_plain = self.plain is self.logits
    return self.replace(
      plain=plain,
      logits=plain if is_plain else self.logits.reshape(plain.shape),
      valid=self.valid.reshape(-1),
    )


class Router(nn.Module):
  """Logits x W, at least float32 whatever the compute dtype.

  Under `logit_normalisation` = l, with mean and deviation over the experts
  (Skywork-MoE, arXiv 2406.06563, section 4.1):

    z = x W,   logits = l (z - mean(z)) / sqrt(var(z) + 1e-6)

  In training x is first multiplied by U(1 - e, 1 + e), element by element
  (Switch Transformer, arXiv 2101.03961, section 2.2: the experts get x as it
  is), and N(0, s^2) is added to the logits (Shazeer et al., arXiv 1701.06538,
  section 2.1, whose deviation is learned where ours is fixed).
  """

  config: ModelConfig
  moe: MoeConfig

  @nn.compact
  def __call__(
    self, x: Float[Array, "*tokens D"], *, valid: Bool[Array, "*tokens"]
  ) -> Affinity:
    kernel = self.param(
      "kernel",
      axes.declare(
        nn.initializers.normal(self.moe.router_init_std),
        [axes.reads("embed"), axes.writes("expert")],
      ),
      (self.config.embed_dim, self.moe.num_experts),
      jnp.dtype(self.config.param_dtype),
    )
    dtype = dtypes.at_least_float32(x.dtype)
    x = self._jittered(x.astype(dtype))
    # Accelerators would take float32 as TF32 or bfloat16 and choose others.
    plain = jnp.einsum(
      "...D,DE->...E",
      x,
      kernel.astype(dtype),
      precision=jax.lax.Precision.HIGHEST,
    )
    logits = plain
    if self.moe.logit_normalisation is not None:
      logits = self.moe.logit_normalisation * _normalised(plain)
    return Affinity(
      plain=plain,
      logits=self._noisy(logits),
      bias=self._bias(dtype),
      valid=valid,
    )

  def _bias(self, dtype: jnp.dtype) -> Float[Array, "E"] | None:
    if not self.moe.selection_bias:
      return None
    bias = self.param(
      "selection_bias",
      axes.declare(
        nn.initializers.zeros, [axes.writes("expert")], is_selection_bias=True
      ),
      (self.moe.num_experts,),
      # It moves in steps of 0.001, which half precision would swallow.
      dtypes.at_least_float32(jnp.dtype(self.config.param_dtype)),
    )
    return jax.lax.stop_gradient(bias.astype(dtype))

  def _jittered(
    self, x: Float[Array, "*tokens D"]
  ) -> Float[Array, "*tokens D"]:
    e = self.moe.input_jitter
    if not e or not self.has_rng(RNG):
      return x
    key = self.make_rng(RNG)
    return x * jax.random.uniform(key, x.shape, x.dtype, 1 - e, 1 + e)

  def _noisy(
    self, logits: Float[Array, "*tokens E"]
  ) -> Float[Array, "*tokens E"]:
    if not self.moe.logit_noise or not self.has_rng(RNG):
      return logits
    noise = jax.random.normal(self.make_rng(RNG), logits.shape, logits.dtype)
    return logits + self.moe.logit_noise * noise


def _normalised(logits: Float[Array, "*tokens E"]) -> Float[Array, "*tokens E"]:
  centred = logits - jnp.mean(logits, axis=-1, keepdims=True)
  variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
  return centred * jax.lax.rsqrt(variance + _EPSILON)
