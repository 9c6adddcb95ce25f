"""Maps and methods of a user: used as ours are, and refused in one line."""

from __future__ import annotations

import json

import numpy as np
import pytest

from aquila_jax.core import errors
from aquila_jax.core.axes import Role
from aquila_jax.core.experiment_config import ScaleUp
from aquila_jax.growth import axis_map, methods
from aquila_jax.growth.growth import Growth
from aquila_jax.growth.scale_up import plan_growth
from tests.growth import growing, tiny


def _options(**fields) -> ScaleUp:
  return ScaleUp(source="dense", **fields)


def test_maps_of_a_user_stand_above_the_methods(tmp_path):
  target = tiny.replace(tiny.SOURCE, mlp_dim=12, num_layers=4)
  file = tmp_path / "maps.json"
  maps = {"mlp": [9, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9], "layer": [0, 0, 1, 2]}
  file.write_text(json.dumps(maps))
  options = _options(method="fpi", maps=str(file))
  source, grown = growing.grown(tiny.SOURCE, target, options)
  up = np.asarray(source.params["layers"]["mlp"]["up_kernel"])
  np.testing.assert_array_equal(
    np.asarray(grown.params["layers"]["mlp"]["up_kernel"]),
    up[maps["layer"]][..., maps["mlp"]],
  )


@pytest.mark.parametrize(
  ("maps", "message"),
  [
    (
      {"mlp": [0] * 11},
      ": mlp fills 11 indices; expected a source index for each of the target's"
      " 12",
    ),
    ({"mlp": [*range(11), 10]}, ": mlp[10]=10: expected 0 to 9"),
    ({"mlp": [*range(11), None]}, ": mlp[10]=10: expected 0 to 9"),
    ({"mpl": []}, ": axis='mpl' is unknown; did you mean 'mlp'?"),
    ([1], ": expected an object of lists"),
    ({"mlp": [False, *range(11)]}, ": mlp[0]=false: expected 0 to 9"),
    ({"layer": [0, 0.5, 1]}, ": layer[1]=0.5: expected 0 to 2"),
    ({"layer": [0, None, 1]}, ": layer[1]=null: expected 0 to 2"),
    ({"layer": 3}, ": layer: expected a list"),
    (
      {"layer": []},
      ": layer fills 0 indices; expected a source index for each of the"
      " target's 3",
    ),
    (
      {"vocab": [1, 0, *range(2, 13)]},
      ": vocab[0]=1: expected 0; tokens keep their ids, and new ones stand"
      " behind them",
    ),
    ({"mlp": 3}, ": mlp: expected a list"),
  ],
)
def test_maps_that_do_not_fit_are_refused(maps, message, tmp_path):
  file = tmp_path / "maps.json"
  file.write_text(json.dumps(maps))
  target = tiny.replace(tiny.SOURCE, mlp_dim=12)
  with pytest.raises(errors.UserError) as caught:
    plan_growth(tiny.SOURCE, target, _options(method="fpi", maps=str(file)))
  assert str(caught.value) == f"config.init.maps={str(file)!r}{message}"


def test_a_source_index_that_is_left_out_names_a_leaf(tmp_path):
  file = tmp_path / "maps.json"
  file.write_text(json.dumps({"mlp": [*range(9), *range(9)]}))
  target = tiny.replace(tiny.SOURCE, mlp_dim=18)
  with pytest.raises(errors.UserError) as caught:
    plan_growth(tiny.SOURCE, target, _options(method="fpi", maps=str(file)))
  assert str(caught.value) == (
    "the map of mlp copies index 9 nowhere, so a part of leaf"
    " 'layers.mlp.down_kernel' is lost; Scale-Up does not shrink"
  )


def net2net(pair: methods.Pair) -> Growth:
  """A method of a reader: fresh neurons, and everything else as FPI has it."""
  neurons = axis_map.padded(pair.old["mlp"], pair.new["mlp"], silent=Role.READS)
  return Growth(width=pair.widths(mlp=neurons), layers=pair.layers("llama_pro"))


def mistaken(pair: methods.Pair) -> Growth:
  """A method that names no axis."""
  return Growth(
    width=pair.widths(),
    layers=pair.layers(),
    from_next_layer=frozenset({"mpl"}),
  )


def forgetful(pair: methods.Pair) -> Growth:
  """A method that forgets an axis."""
  width = pair.widths()
  del width["mlp"]
  return Growth(width=width, layers=pair.layers())


def test_a_method_of_ones_own_has_all_that_ours_have():
  target = tiny.replace(tiny.SOURCE, mlp_dim=15, embed_dim=16, num_layers=4)
  options = _options(method=f"{__name__}:net2net")
  plan = plan_growth(tiny.SOURCE, target, options)
  assert plan.exactness.exact
  assert plan.axes["mlp"] == (
    "10 -> 15 (padded): 10 copied once, 5 new, read by zeros"
  )
  assert growing.difference(tiny.SOURCE, target, options) < growing.EXACT
  _, grown = growing.grown(tiny.SOURCE, target, options)
  params = tiny.arrays(grown.params)
  assert not params["layers/mlp/down_kernel"][:, 10:].any()
  assert np.abs(params["layers/mlp/up_kernel"][:, :, 10:]).min() > 0


@pytest.mark.parametrize(
  ("method", "message"),
  [
    (
      "no_such_module:grow",
      "config.init.method='no_such_module:grow': No module named"
      " 'no_such_module'",
    ),
    (":", "config.init.method=':': Empty module name"),
    (
      "builtins:repr",
      "config.init.method='builtins:repr': expected a function from a Pair to a"
      " Growth; it gave a str",
    ),
    (
      f"{__name__}:mistaken",
      "from_next_layer='mpl' is unknown; did you mean 'mlp'?",
    ),
    (
      f"{__name__}:forgetful",
      "the method has no map of mlp, which leaf 'layers.mlp.down_kernel' has:"
      " it grows from 10 to 15",
    ),
  ],
)
def test_methods_that_are_none_are_refused(method, message):
  target = tiny.replace(tiny.SOURCE, mlp_dim=15)
  with pytest.raises(errors.UserError) as caught:
    plan_growth(tiny.SOURCE, target, _options(method=method))
  assert str(caught.value) == message
