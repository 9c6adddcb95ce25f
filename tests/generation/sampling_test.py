"""The choice of a token, against NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.core import errors
from aquila_jax.generation import sampling
from aquila_jax.generation.sampling import Sampling

STEP = jnp.zeros((), jnp.int32)
_choose, _nucleus = jax.jit(sampling.choose), jax.jit(sampling.nucleus)


def numpy_nucleus(logits: np.ndarray, top_p: float, top_k: int = 0) -> set[int]:
  """Tokens taken from the most probable on until their mass is top_p."""
  weights = np.exp(logits.astype(np.float64) - logits.max())
  if top_k:
    weights[np.argsort(-logits, kind="stable")[top_k:]] = 0.0
  probability = weights / weights.sum()
  kept, mass = set(), 0.0
  for token in sorted(range(len(logits)), key=lambda i: -probability[i]):
    if mass >= top_p or not weights[token]:
      break
    kept.add(token)
    mass += probability[token]
  return kept


def choose_many(row, *, rows: int, **options) -> np.ndarray:
  """The same logits in many rows, each with its own key."""
  chooser = sampling.make_chooser(
    Sampling(**options), batch_size=rows, vocab_size=len(row)
  )
  logits = jnp.broadcast_to(jnp.asarray(row, jnp.float32), (rows, len(row)))
  return np.asarray(_choose(logits, chooser, step=STEP))


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.6, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_nucleus_keeps_the_smallest_set_that_holds_top_p(top_p, seed):
  logits = np.random.default_rng(seed).normal(0, 3, (2, 40))
  logits = logits.astype(np.float32)
  kept, order = _nucleus(jnp.asarray(logits), jnp.asarray(top_p, jnp.float32))
  for row in range(2):
    chosen = set(np.asarray(order)[row][np.asarray(kept)[row]].tolist())
    assert chosen == numpy_nucleus(logits[row], top_p)


@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("top_k", [1, 3, 39, 40, 2**31 - 1])
def test_the_nucleus_is_of_what_top_k_kept(top_p, top_k):
  logits = np.random.default_rng(top_k).normal(0, 2, 40).astype(np.float32)
  kept, order = _nucleus(
    jnp.asarray(logits)[None],
    jnp.asarray(top_p, jnp.float32),
    top_k=jnp.asarray(top_k, jnp.int32),
  )
  chosen = set(np.asarray(order)[0][np.asarray(kept)[0]].tolist())
  assert chosen == numpy_nucleus(logits, top_p, top_k)
  assert len(chosen) <= top_k


def test_top_k_renormalises_before_top_p():
  # Of 0.4, 0.3 and 0.2 alone the first two are 7/9, at least 0.75; of all four
  # they are 0.7, and the third is needed.
  row = np.log([0.4, 0.3, 0.2, 0.1])
  for top_k, expected in ((0, {0, 1, 2}), (3, {0, 1}), (1, {0})):
    chosen = choose_many(row, rows=400, top_k=top_k, top_p=0.75)
    assert set(chosen.tolist()) == expected


def test_top_k_of_equals_takes_the_lowest_ids():
  chosen = choose_many([1.0, 1.0, 1.0, 0.0], rows=200, top_k=2)
  assert set(chosen.tolist()) == {0, 1}


def test_nucleus_of_even_logits_takes_the_lowest_ids():
  # Each of 4 tokens has 0.25: 0.5 is two of them, 0.51 three.
  logits = jnp.zeros((1, 4))
  for top_p, size in ((0.5, 2), (0.51, 3)):
    kept, order = _nucleus(logits, jnp.asarray(top_p, jnp.float32))
    assert np.asarray(order)[0].tolist() == [0, 1, 2, 3]
    assert int(kept.sum()) == size


def test_nothing_outside_of_the_nucleus_is_chosen():
  row = np.log([0.5, 0.3, 0.15, 0.05])
  chosen = choose_many(row, rows=400, top_p=0.7, temperature=1.0)
  # 0.5 < 0.7 <= 0.8: the first two.
  assert set(chosen.tolist()) == {0, 1}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_temperature(temperature):
  row = np.asarray([1.0, 0.0, -1.0])
  rows = 4000
  chosen = choose_many(row, rows=rows, temperature=temperature)
  weights = np.exp(row / temperature)
  expected = weights / weights.sum()
  found = np.bincount(chosen, minlength=3) / rows
  # Four standard deviations of a share of 4000 draws.
  spread = np.sqrt(expected * (1 - expected) / rows)
  np.testing.assert_array_less(np.abs(found - expected), 4 * spread)


def test_temperature_zero_takes_the_largest_and_the_first_of_equals():
  assert choose_many([0.0, 3.0, 3.0], rows=2, temperature=0.0).tolist() == [
    1,
    1,
  ]


def test_a_vanishing_temperature_is_greedy_and_finite():
  # 1e-45 is no normal float32; 3 / 1e-38 would overflow.
  for temperature in (1e-38, 1e-45):
    chosen = choose_many([0.0, 3.0, 2.9], rows=8, temperature=temperature)
    assert set(chosen.tolist()) == {1}


def test_ids_without_text_are_never_chosen():
  logits = jnp.asarray([[0.0, 1.0, 9.0]])
  for temperature in (0.0, 5.0):
    chooser = sampling.make_chooser(
      Sampling(temperature=temperature), batch_size=1, vocab_size=2
    )
    chosen = {
      int(_choose(logits, chooser, step=jnp.asarray(i))[0]) for i in range(20)
    }
    assert chosen <= {0, 1}


def test_steps_rows_and_seeds_draw_independently():
  even = jnp.zeros((2, 1000))

  def draws(seed):
    chooser = sampling.make_chooser(
      Sampling(seed=seed), batch_size=2, vocab_size=1000
    )
    return [
      int(token)
      for step in range(4)
      for token in _choose(even, chooser, step=jnp.asarray(step))
    ]

  # 16 draws of 1000: all different but for one chance in eight, fixed by the
  # seeds.
  assert len({*draws(0), *draws(1)}) >= 15
  assert draws(0) == draws(0)


def test_a_row_draws_the_same_whatever_the_size_of_the_batch():
  row = np.zeros(1000)
  assert (
    choose_many(row, rows=2).tolist() == choose_many(row, rows=5)[:2].tolist()
  )


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(max_new_tokens=0), "max_new_tokens=0: need >= 1"),
    (dict(temperature=-0.5), "temperature=-0.5: need >= 0"),
    (dict(temperature=float("nan")), "temperature=nan: need >= 0"),
    (dict(top_k=-1), "top_k=-1: need >= 0; 0 keeps all"),
    (
      dict(stop_tokens=(2, -1)),
      "stop_tokens=(2, -1): need ids >= 0; () never stops",
    ),
    (dict(top_p=0.0), "top_p=0.0: need 0 < top_p <= 1"),
    (dict(top_p=1.5), "top_p=1.5: need 0 < top_p <= 1"),
  ],
)
def test_refuses_options_out_of_range(options, message):
  with pytest.raises(errors.UserError) as caught:
    Sampling(**options)
  assert str(caught.value) == message


def test_only_greedy_selects_a_program():
  structures = {
    jax.tree.structure(
      sampling.make_chooser(
        Sampling(temperature=t, top_p=p, top_k=k), batch_size=2, vocab_size=5
      )
    )
    for t, p, k in ((0.5, 0.9, 0), (1.0, 1.0, 3), (0.0, 1.0, 0))
  }
  assert len(structures) == 2
