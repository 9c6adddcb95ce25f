from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.core import errors
from aquila_jax.core.axes import LeafAxes, neither, path_name, reads, writes
from aquila_jax.core.experiment_config import FreezeConfig
from aquila_jax.core.model_config import ModelConfig, MoeConfig
from aquila_jax.models import decoder_lm
from aquila_jax.training.freezing import select, trainable_masks

_AXES = {
  "table": LeafAxes((neither("vocab"), writes("embed"))),
  "up": LeafAxes((neither("layer"), reads("embed"), writes("mlp"))),
  "square": LeafAxes((reads("embed"), writes("embed"))),
  "bias": LeafAxes((writes("head_dim"),)),
}
_SHAPES = {
  "table": jax.ShapeDtypeStruct((5, 4), jnp.float32),
  "up": jax.ShapeDtypeStruct((3, 4, 6), jnp.float32),
  "square": jax.ShapeDtypeStruct((4, 4), jnp.float32),
  "bias": jax.ShapeDtypeStruct((2,), jnp.float32),
}


def _full(config, **fields):
  """The masks as full arrays."""
  masks = trainable_masks(config, axes=_AXES, shapes=_SHAPES, **fields)
  ones = {k: jnp.ones(v.shape) for k, v in _SHAPES.items()}
  zeros = {k: jnp.zeros(v.shape) for k, v in _SHAPES.items()}
  chosen = select(masks, ones, otherwise=zeros)
  return masks, {k: np.asarray(v) == 1 for k, v in chosen.items()}


def test_no_rule_freezes_nothing():
  masks, _ = _full(FreezeConfig())
  assert masks == {"table": None, "up": None, "square": None, "bias": None}


def test_axes_freeze_whole_leaves():
  masks, full = _full(FreezeConfig(axes=("vocab", "mlp")))
  assert not full["table"].any() and not full["up"].any()
  assert masks["square"] is None and masks["bias"] is None
  assert masks["up"].array().shape == (1, 1, 1)


def test_ffns_beside_experts_freeze_by_an_axis_of_their_own():
  model = ModelConfig(
    vocab_size=5,
    num_layers=2,
    embed_dim=4,
    mlp_dim=6,
    num_heads=1,
    num_kv_heads=1,
    head_dim=4,
    moe=MoeConfig(layers="every_second"),
  )
  masks = trainable_masks(
    FreezeConfig(axes=("dense_mlp",)),
    axes=decoder_lm.parameter_axes(model),
    shapes=decoder_lm.abstract_params(model),
  )
  frozen = {
    path_name(path)
    for path, mask in jax.tree.leaves_with_path(
      masks, is_leaf=lambda node: node is None
    )
    if mask is not None
  }
  assert frozen == {
    f"layers/dense_mlp/{name}_kernel" for name in ("gate", "up", "down")
  }


def test_layers_freeze_a_range_of_the_stack():
  masks, full = _full(FreezeConfig(layers=(1, 3)))
  assert full["up"][0].all() and not full["up"][1:].any()
  assert masks["up"].array().shape == (3, 1, 1)
  assert masks["table"] is None


def test_layers_of_a_leaf_that_some_have_are_those_of_the_model():
  axes = (neither("layer"), reads("embed"))
  leaves = {"every": LeafAxes(axes), "some": LeafAxes(axes, layers=(1, 2, 5))}
  shapes = {
    "every": jax.ShapeDtypeStruct((6, 4), jnp.float32),
    "some": jax.ShapeDtypeStruct((3, 4), jnp.float32),
  }
  for config, new, rows in (
    (FreezeConfig(layers=(0, 2)), None, [False, True, True]),
    (FreezeConfig(layers=(2, 6)), None, [True, False, False]),
    (FreezeConfig(new_only=True), {"layer": [(2, 4)]}, [False, True, False]),
  ):
    masks = trainable_masks(config, axes=leaves, shapes=shapes, new_indices=new)
    assert masks["some"].array()[:, 0].tolist() == rows
  masks = trainable_masks(
    FreezeConfig(layers=(3, 5)), axes=leaves, shapes=shapes
  )
  assert masks["some"] is None
  with pytest.raises(errors.UserError, match="stop <= 6, the layers of"):
    trainable_masks(FreezeConfig(layers=(0, 7)), axes=leaves, shapes=shapes)


def test_new_only_trains_what_is_new_in_any_axis():
  new = {"embed": [(1, 2), (3, 4)], "mlp": [(4, 6)]}
  masks, full = _full(FreezeConfig(new_only=True), new_indices=new)
  for (layer, d, f), trains in np.ndenumerate(full["up"]):
    assert trains == (d in (1, 3) or f in (4, 5)), (layer, d, f)
  for (i, j), trains in np.ndenumerate(full["square"]):
    assert trains == (i in (1, 3) or j in (1, 3)), (i, j)
  for (_, d), trains in np.ndenumerate(full["table"]):
    assert trains == (d in (1, 3))
  assert not full["bias"].any()
  assert masks["table"].array().shape == (1, 4)


def test_new_layers_train_as_a_whole():
  _, full = _full(FreezeConfig(new_only=True), new_indices={"layer": [(1, 2)]})
  assert full["up"][1].all() and not full["up"][[0, 2]].any()
  assert not full["table"].any()


def test_rules_are_joined():
  config = FreezeConfig(axes=("vocab",), layers=(0, 1), new_only=True)
  _, full = _full(config, new_indices={"embed": [(2, 4)]})
  assert not full["table"].any()
  for (layer, d, _), trains in np.ndenumerate(full["up"]):
    assert trains == (layer >= 1 and d >= 2)


@pytest.mark.parametrize(
  "config, new_indices, message",
  [
    (
      FreezeConfig(axes=("embed", "experts")),
      None,
      "config.freeze.axes[1]='experts' is unknown; did you mean 'expert'?",
    ),
    (
      FreezeConfig(layers=(1, 4)),
      None,
      "config.freeze.layers=(1, 4): expected 0 <= start <= stop <= 3, the"
      " layers of the model",
    ),
    (
      FreezeConfig(layers=(2, 1)),
      None,
      "config.freeze.layers=(2, 1): expected 0 <= start <= stop <= 3, the"
      " layers of the model",
    ),
    (
      FreezeConfig(new_only=True),
      None,
      "config.freeze.new_only=True: expected a model that was grown; its"
      " lineage has no scale_up",
    ),
    (
      FreezeConfig(new_only=True),
      {"layer": []},
      "config.freeze.new_only=True: the last growth of the model added nothing",
    ),
    (
      FreezeConfig(axes=("embed", "head_dim")),
      None,
      "config.freeze: it freezes every parameter",
    ),
  ],
)
def test_impossible_rules_are_refused(config, new_indices, message):
  with pytest.raises(errors.UserError) as error:
    trainable_masks(config, axes=_AXES, shapes=_SHAPES, new_indices=new_indices)
  assert str(error.value) == message
