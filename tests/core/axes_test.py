"""The declaration: what a leaf says of its axes survives Linen."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from aquila_jax.core import axes
from aquila_jax.core.axes import LeafAxes, Role


def test_unknown_axis_name_is_refused():
  with pytest.raises(ValueError) as error:
    axes.reads("width")
  assert str(error.value) == (
    "axis name 'width' is not one of ('layer', 'vocab', 'embed', 'kv_head',"
    " 'q_per_kv', 'head_dim', 'mlp', 'expert',"
    " 'dense_mlp', 'shared_mlp', 'shared_expert')"
  )


def test_leaf_axes_are_found_by_name_and_role():
  leaf = LeafAxes((axes.neither("layer"), axes.reads("embed")))
  assert leaf.names == ("layer", "embed")
  assert leaf.index("embed") == 1
  assert leaf.index("mlp") is None
  assert leaf.has("embed")
  assert leaf.has("embed", Role.READS)
  assert not leaf.has("embed", Role.WRITES)
  assert not leaf.has("mlp")
  assert str(leaf) == "neither layer, reads embed"


def test_role_belongs_to_the_dimension_not_to_the_name():
  square = LeafAxes((axes.reads("embed"), axes.writes("embed")))
  assert square.has("embed", Role.READS)
  assert square.has("embed", Role.WRITES)


def test_declaring_another_rank_than_the_shape_is_refused():
  init = axes.declare(nn.initializers.zeros, [axes.reads("embed")])
  with pytest.raises(ValueError) as error:
    init(jax.random.key(0), (2, 3), jnp.float32)
  assert str(error.value) == (
    "shape (2, 3) has 2 dimensions, declared axes are (reads embed)"
  )


class _Product(nn.Module):
  """x W, declared; as a scan's body it carries x."""

  @nn.compact
  def __call__(self, x, _):
    kernel = self.param(
      "kernel",
      axes.declare(
        nn.initializers.ones, [axes.reads("embed"), axes.writes("mlp")]
      ),
      (3, 3),
      jnp.float32,
    )
    return x @ kernel, None


@pytest.mark.parametrize("remat", [False, True])
def test_scan_and_remat_put_the_layer_axis_in_front(remat):
  body = nn.remat(_Product) if remat else _Product
  stack = nn.scan(
    body,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    length=5,
    metadata_params={nn.meta.PARTITION_NAME: "layer"},
  )()
  shapes, declared = axes.split_declared(
    jax.eval_shape(stack.init, jax.random.key(0), jnp.ones((1, 3)), None)
  )
  assert declared["params"]["kernel"] == LeafAxes(
    (axes.neither("layer"), axes.reads("embed"), axes.writes("mlp"))
  )
  assert shapes["params"]["kernel"].shape == (5, 3, 3)


def test_removing_the_axis_undoes_adding_it():
  box = axes.Declared(value=1, axes=(axes.reads("embed"), axes.writes("mlp")))
  params = {nn.meta.PARTITION_NAME: "layer"}
  assert box.add_axis(1, params).axes == (
    axes.reads("embed"),
    axes.neither("layer"),
    axes.writes("mlp"),
  )
  assert box.add_axis(1, params).remove_axis(1, params) == box


def test_path_is_written_with_slashes():
  (path, _), *_ = jax.tree_util.tree_leaves_with_path(
    {"layers": {"attention": {"query_kernel": 0}}}
  )
  assert axes.path_name(path) == "layers/attention/query_kernel"
