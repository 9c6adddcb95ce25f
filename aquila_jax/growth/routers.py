"""Rows of a new router, and what is measured of routers on text.

A router's logit of copy c is x w_c, with x what the FFN reads. Its rows are

  normal    drawn from N(0, router_init_std^2) (AquilaMoE, section 2.3);
  domains   the mean x of each domain (a language, a source) of a sample;
  clusters  the mean x of each k-means cluster of a sample, in every layer.

Of the last two the mean of all rows is taken away, which changes neither the
choice nor softmax, and what is left is scaled to the deviation of drawn rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped
from scipy.cluster import vq

from aquila_jax.core import errors
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.layers.moe.mixture import make_choice
from aquila_jax.layers.moe.router import Affinity, Router
from aquila_jax.layers.moe.selection import choose


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
  """Rows of text on which something is measured."""

  tokens: Int[np.ndarray, "B T"]
  positions: Int[np.ndarray, "B T"]
  segments: Int[np.ndarray, "B T"]  # 0 is padding
  domains: Int[np.ndarray, "B T"]
  names: Sequence[str]  # of the domains

  def flat(
    self, x: Shaped[np.ndarray, "B T *rest"]
  ) -> Shaped[np.ndarray, "M *rest"]:
    """What `x` has for tokens that are no padding."""
    return x[self.segments > 0]


def drawn_rows(
  shape: tuple[int, ...], *, std: float, seed: int
) -> Float[np.ndarray, "L D copies"]:
  """Rows from N(0, std^2), float32."""
  drawn = jax.random.normal(jax.random.key(seed), shape, jnp.float32)
  return np.asarray(std * drawn)


def domain_rows(
  x: Float[np.ndarray, "M D"], domains: Int[np.ndarray, "M"], *, count: int
) -> Float[np.ndarray, "D count"]:
  """The mean of each domain."""
  return np.stack([x[domains == i].mean(0) for i in range(count)], axis=1)


def cluster_rows(
  x: Float[np.ndarray, "M D"], *, count: int, seed: int
) -> Float[np.ndarray, "D count"]:
  """The mean of each of `count` clusters (k-means++, then Lloyd's steps)."""
  centres, _ = vq.kmeans2(x, count, minit="++", rng=np.random.default_rng(seed))
  return centres.T


def scaled_rows(
  rows: Float[np.ndarray, "D copies"], *, std: float
) -> Float[np.ndarray, "D copies"]:
  """Without their mean, and with the deviation of drawn rows."""
  rows = rows - rows.mean(1, keepdims=True)
  size = float(np.sqrt(np.mean(np.square(rows))))
  return rows * (std / size) if size else rows


def _affinity(
  x: Float[jax.Array, "M D"],
  params: Mapping[str, jax.Array],
  *,
  config: ModelConfig,
) -> Affinity:
  """What a router of one layer says of tokens, of what their FFN reads."""
  assert config.moe is not None
  found: Any = Router(config, config.moe).apply(
    {"params": params}, x, valid=jnp.ones(len(x), bool)
  )
  return found


def gate_sums(
  x: Float[np.ndarray, "M D"],
  kernel: Float[np.ndarray, "D E"],
  *,
  config: ModelConfig,
) -> Float[np.ndarray, "M"]:
  """What the gates of each token sum to, of a router without a bias yet."""
  assert config.moe is not None
  params = {"kernel": kernel}
  if config.moe.selection_bias:
    params["selection_bias"] = np.zeros(kernel.shape[1], kernel.dtype)
  return np.asarray(_gates(config, x, params), np.float64).sum(-1)


@functools.partial(jax.jit, static_argnums=0)
def _gates(config, x, params) -> jax.Array:
  return choose(_affinity(x, params, config=config), config.moe).gates


def usage(
  x: Float[np.ndarray, "M D"],
  params: Mapping[str, np.ndarray],
  *,
  config: ModelConfig,
) -> Float[np.ndarray, "E"]:
  """The share of the assignments that each expert gets."""
  assert config.moe is not None
  counts = np.asarray(_counts(config, x, dict(params)), np.float64)
  return counts / counts.sum()


@functools.partial(jax.jit, static_argnums=0)
def _counts(config, x, params) -> jax.Array:
  found = _affinity(x, params, config=config)
  return make_choice(config.moe).dispatch(found, num_rows=1)[1].counts[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constants:
  """What experts are multiplied by where gates do not sum to one."""

  values: Float[np.ndarray, "L"]
  # Root mean square of what the sum of the gates times the constant differs
  # from one by, over the tokens of the sample.
  errors: Float[np.ndarray, "L"]

  def in_words(self) -> str:
    low, high = self.values.min(), self.values.max()
    return (
      f"gates sum to about 1 / {low:.3g} to 1 / {high:.3g}, which the experts'"
      " down kernels make up for; what is left is"
      f" {100 * self.errors.max():.2g} % of an FFN's output at most, root mean"
      " square over the tokens of the sample"
    )


def constant(
  sums: Float[np.ndarray, "M"],
) -> tuple[float, float]:
  """The k at which k * sums is nearest to one, and how near: rms of k s - 1."""
  k = float(sums.sum() / np.square(sums).sum())
  return k, float(np.sqrt(np.mean(np.square(k * sums - 1))))


def refuse_domains(sample: Sample, *, copies: int, what: str) -> None:
  """Refuses a sample that has not one domain for every copy.

  Raises:
    errors.UserError: saying how many there are.
  """
  seen = np.unique(sample.domains[sample.segments > 0])
  if len(seen) != copies or len(sample.names) != copies:
    raise errors.UserError(
      f"{what}='domains': there are {copies} copies of an FFN and {len(seen)}"
      f" domains in the sample ({', '.join(sample.names)}); expected as many,"
      " or 'clusters'"
    )
