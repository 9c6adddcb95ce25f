"""A model that is read expert by expert computes what it computes whole."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from aquila_jax.core.model_config import GrowthMask
from aquila_jax.growth import checking, streamed_layers
from aquila_jax.growth.grown_tree import ArrayTree
from tests.growth import tiny

MOE = tiny.MOE
CONFIGS: dict[str, dict[str, Any]] = {
  "dense": dict(),
  "mixture": dict(moe=dataclasses.replace(MOE, shared_expert_dim=5)),
  "some layers": dict(
    moe=dataclasses.replace(
      MOE,
      layers=(1,),
      router_order="sigmoid",
      selection_bias=True,
      capacity_factor=0.7,
    )
  ),
  "experts choose": dict(
    moe=dataclasses.replace(
      MOE, choice="expert", router_order="softmax_then_topk", renormalise=False
    )
  ),
  "masked": dict(
    moe=MOE,
    growth_mask=GrowthMask(
      value=0.25,
      embed_dim=6,
      mlp_dim=7,
      num_kv_heads=1,
      queries_per_kv=3,
      new_layers=(1,),
    ),
  ),
}


@pytest.mark.mostly_long(one_in=4)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_decoder(name, monkeypatch):
  # 10 hidden units in parts of 4, 4 and 2.
  monkeypatch.setattr(streamed_layers, "_UNITS", 4)
  config = tiny.replace(tiny.SOURCE, **CONFIGS[name])
  params = tiny.params(config)
  model = checking.ReadModel(config=config, params=ArrayTree(params))
  found = checking.logits(model, tiny.TOKENS)[0]
  wanted = tiny.logits(config, params)
  np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)


def test_of_a_mixture_one_kernel_is_read_at_a_time():
  config = tiny.replace(tiny.SOURCE, moe=dataclasses.replace(MOE))
  tree = ArrayTree(tiny.params(config))
  read: list[tuple[str, int]] = []

  class Seen:
    def read(self, name, *, index=()):
      value = tree.read(name, index=index)
      read.append((name, value.size))
      return value

  model = checking.ReadModel(config=config, params=Seen())
  checking.logits(model, tiny.TOKENS)
  of_experts = [size for name, size in read if name.startswith("layers.mlp.")]
  assert max(of_experts) == 8 * 10  # one kernel of one expert
  # 3 layers of 4 experts of 3 kernels, and a router.
  assert len(of_experts) <= 3 * (4 * 3 + 1)
