"""The depth rules, by hand and on the paper's sizes."""

from __future__ import annotations

import pytest

from aquila_jax.core import errors
from aquila_jax.growth import depth


@pytest.mark.parametrize(
  ("rule", "num_source", "num_target", "expected"),
  [
    ("interpolate", 4, 6, [0, 0, 1, 2, 2, 3]),
    ("interpolate", 2, 4, [0, 0, 1, 1]),
    ("interpolate", 3, 3, [0, 1, 2]),
    ("stack", 4, 6, [0, 1, 2, 3, 0, 1]),
    ("stack", 2, 4, [0, 1, 0, 1]),
    ("stack_top", 4, 6, [0, 1, 2, 3, 2, 3]),
    ("stack_top", 3, 8, [0, 1, 2, 0, 1, 2, 1, 2]),
    ("stack_top", 3, 3, [0, 1, 2]),
    # SOLAR's own sizes are 32, 8 and 48.
    ("solar", 4, 6, [0, 1, 2, 1, 2, 3]),
    ("solar", 4, 8, [0, 1, 2, 3, 0, 1, 2, 3]),
    ("solar", 4, 4, [0, 1, 2, 3]),
  ],
)
def test_source_layer_of_every_target_layer(
  rule, num_source, num_target, expected
):
  found = depth.RULES[rule](num_source, num_target)
  assert found.copies.source.tolist() == expected
  assert found.copies.unused == []
  assert not found.silent.any()


@pytest.mark.parametrize(
  ("num_source", "num_target", "expected", "silent"),
  [
    # LLaMA-Pro's form: behind every group of L / n layers.
    (4, 6, [0, 1, 1, 2, 3, 3], [2, 5]),
    (3, 5, [0, 1, 1, 2, 2], [2, 4]),
    (2, 6, [0, 0, 0, 1, 1, 1], [1, 2, 4, 5]),
    (3, 3, [0, 1, 2], []),
    (1, 3, [0, 0, 0], [1, 2]),
  ],
)
@pytest.mark.parametrize("rule", ["llama_pro", "lemon"])
def test_zero_blocks_stand_evenly_and_the_source_keeps_its_order(
  rule, num_source, num_target, expected, silent
):
  found = depth.RULES[rule](num_source, num_target)
  assert found.copies.source.tolist() == expected
  assert [i for i, s in enumerate(found.silent) if s] == silent
  assert found.copies.source[~found.silent].tolist() == list(range(num_source))
  assert found.silent_noise == (rule == "lemon")


def test_the_papers_growth_doubles_every_fourth_layer():
  doubled = depth.interpolate(32, 40).copies
  assert [k for k, c in enumerate(doubled.counts) if c == 2] == list(
    range(0, 32, 4)
  )
  assert set(doubled.counts) == {1, 2}


def test_chosen_layers_may_repeat_in_any_order():
  found = depth.given(3, 5, (0, 1, 1, 2, 0))
  assert found.copies.source.tolist() == [0, 1, 1, 2, 0]


@pytest.mark.parametrize(
  ("layers", "message"),
  [
    (
      (0, 1, 2),
      "layers=(0, 1, 2): it fills 3 layers; expected a source layer for each of"
      " the target's 4",
    ),
    (
      (0, 1, 2, 3),
      "layers=(0, 1, 2, 3): the source has no layer 3; expected 0 to 2",
    ),
    (
      (0, 1, 1, 0),
      "layers=(0, 1, 1, 0): layer 2 of the source is used nowhere; Scale-Up"
      " does not shrink",
    ),
  ],
)
def test_layers_that_do_not_fit_are_refused(layers, message):
  with pytest.raises(errors.UserError) as caught:
    depth.given(3, 4, layers)
  assert str(caught.value) == message


@pytest.mark.parametrize("num_target", [5, 10])
def test_solar_needs_two_equal_parts(num_target):
  with pytest.raises(errors.UserError) as caught:
    depth.solar(4, num_target)
  assert str(caught.value) == (
    f"num_layers={num_target}: expected an even number from 4 to 8;"
    " depth='solar' joins as many layers of the bottom as of the top"
  )
