"""The moments' rule against the gradients that the grown model really has."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from aquila_jax.core.experiment_config import ScaleUp
from aquila_jax.growth.scale_up import scale_up
from tests.growth import tiny


@pytest.mark.mostly_long(one_in=3)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("moe", [None, tiny.MOE])
def test_grown_moments_are_those_of_the_grown_models_gradient(tied, moe):
  config = tiny.replace(tiny.SOURCE, tied_embeddings=tied, moe=moe)
  target = tiny.replace(
    config, embed_dim=24, mlp_dim=17, num_kv_heads=4, num_heads=20
  )
  # The source's moments are its gradient and the squares of it.
  options = ScaleUp(source="dense", method="fpi")
  grown = scale_up(tiny.stored(config), target, options)
  assert grown.moments is not None
  gradient = tiny.arrays(tiny.gradients(target, grown.params))
  scale = max(np.abs(leaf).max() for leaf in gradient.values())
  mu, nu = tiny.arrays(grown.moments.mu), tiny.arrays(grown.moments.nu)
  for name, leaf in gradient.items():
    # Sums over hundreds of terms in float64.
    np.testing.assert_allclose(mu[name], leaf, rtol=0, atol=1e-13 * scale)
    np.testing.assert_allclose(nu[name], leaf**2, rtol=0, atol=1e-13 * scale**2)
  assert int(grown.moments.count) == 7


def test_reset_leaves_the_moments_out():
  target = tiny.replace(tiny.SOURCE, embed_dim=16)
  options = ScaleUp(source="dense", method="fpi", optimizer="reset")
  assert scale_up(tiny.stored(tiny.SOURCE), target, options).moments is None


def test_a_source_without_moments_grows_without():
  target = tiny.replace(tiny.SOURCE, embed_dim=16)
  source = tiny.stored(tiny.SOURCE, moments=None)
  grown = scale_up(source, target, ScaleUp(source="dense", method="fpi"))
  assert grown.moments is None


def test_moments_of_aki_come_from_the_layer_of_their_parameters():
  config = tiny.SOURCE
  source = tiny.stored(config)
  assert source.moments is not None
  # Moments that are 1000 times the parameters, of which none is divided twice.
  scaled = jax.tree.map(lambda p: 1000 * p, source.params)
  source = tiny.stored(
    config, moments=source.moments.replace(mu=scaled, nu=scaled)
  )
  # Nothing that a leaf reads grows, and counts of what it writes are 2.
  target = tiny.replace(config, mlp_dim=20)
  grown = scale_up(source, target, ScaleUp(source="dense", method="aki"))
  assert grown.moments is not None
  params, mu, nu = map(
    tiny.arrays, (grown.params, grown.moments.mu, grown.moments.nu)
  )
  name = "layers/mlp/gate_kernel"
  np.testing.assert_allclose(mu[name], 500 * params[name], rtol=1e-15)
  np.testing.assert_allclose(nu[name], 250 * params[name], rtol=1e-15)
