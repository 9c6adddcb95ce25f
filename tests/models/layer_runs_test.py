"""Stacks of two kinds of layers, cut into runs."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.models import layer_runs
from aquila_jax.models.layer_runs import Run

D, E = False, True


@pytest.mark.parametrize(
  ("kinds", "runs"),
  [
    ([D, E] * 20, [Run((D, E), 20)]),
    ([D] * 20 + [E] * 20, [Run((D,), 20), Run((E,), 20)]),
    ([D, E, D, E, D], [Run((D,), 1), Run((E, D), 2)]),
    ([D, D, E] * 4 + [E], [Run((D, D, E), 4), Run((E,), 1)]),
    ([D, E], [Run((D, E), 1)]),
    ([E, E, E], [Run((E,), 3)]),
  ],
  ids=["every second", "last half", "odd", "every third", "two", "all"],
)
def test_runs_are_the_fewest_layers_to_compile(kinds, runs):
  assert list(layer_runs.find_runs(tuple(kinds))) == runs


def test_runs_give_the_stack_and_no_cut_has_fewer_layers():
  for kinds in itertools.product([D, E], repeat=6):
    runs = layer_runs.find_runs(kinds)
    assert sum((run.kinds * run.repeats for run in runs), ()) == kinds
    assert sum(len(run.kinds) for run in runs) == _fewest(kinds)


def _fewest(kinds: tuple[bool, ...]) -> int:
  """By trying every first run."""
  found = [len(kinds)]
  for size in range(1, len(kinds)):
    for times in range(1, len(kinds) // size + 1):
      if kinds[:size] * times == kinds[: size * times]:
        found.append(size + _fewest(kinds[size * times :]))
  return min(found)


def test_split_cuts_leaves_by_run_and_layer_and_join_undoes_it():
  runs = layer_runs.find_runs((E, D, E, D, E, E, E, E))
  assert runs == (Run((E, D), 2), Run((E,), 4))
  stack = {
    "norm": {"scale": 10 * jnp.arange(8.0)[:, None] + jnp.arange(3.0)[None]},
    "mlp": jnp.asarray([0.0, 2, 4, 5, 6, 7]),
    "dense_mlp": jnp.asarray([1.0, 3]),
  }
  cut = layer_runs.split(stack, runs)
  assert {
    (run, block): sorted(parts)
    for run, blocks in cut.items()
    for block, parts in blocks.items()
  } == {
    ("run_0", "block_0"): ["mlp", "norm"],
    ("run_0", "block_1"): ["dense_mlp", "norm"],
    ("run_1", "block_0"): ["mlp", "norm"],
  }
  for run, block, layers in (
    ("run_0", "block_0", [0, 2]),
    ("run_0", "block_1", [1, 3]),
    ("run_1", "block_0", [4, 5, 6, 7]),
  ):
    for part, leaf in cut[run][block].items():
      found = leaf["scale"][:, 0] / 10 if part == "norm" else leaf
      assert found.tolist() == layers
  jax.tree.map(np.testing.assert_array_equal, layer_runs.join(cut, runs), stack)


def test_the_gradient_of_a_cut_adds_up_no_leaves():
  """Of slices it would: a leaf of zeros for each."""
  runs = layer_runs.find_runs((D, E, D, E, D, D, D, D))

  def total(leaf):
    cut = layer_runs.split({"norm": leaf}, runs)
    return sum(
      (i + 1) * jnp.sum(jnp.sin(part))
      for i, part in enumerate(jax.tree.leaves(cut))
    )

  leaf = jnp.arange(8.0)
  text = str(jax.make_jaxpr(jax.grad(total))(leaf))
  assert "concatenate" in text
  assert "pad" not in text and "add_any" not in text
  # Blocks in the order of the tree: (0, 2), (1, 3) and the rest.
  factors = jnp.asarray([1.0, 2, 1, 2, 3, 3, 3, 3])
  np.testing.assert_allclose(jax.grad(total)(leaf), factors * jnp.cos(leaf))
