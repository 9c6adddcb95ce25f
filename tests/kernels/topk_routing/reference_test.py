"""The XLA reference of top-k routing against loops; and the public call."""

from __future__ import annotations

import functools
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as of_numpy

from aquila_jax.kernels.topk_routing import api
from aquila_jax.kernels.topk_routing.rule import RoutingRule
from tests.kernels.topk_routing import oracle
from tests.kernels.topk_routing.contract import (
  SPECIAL,
  Case,
  TopkRoutingContract,
  compare,
)

ORDERS: Any = ["topk_then_softmax", "softmax_then_topk", "sigmoid"]
CASES = [
  Case(num_experts=8, top_k=2, num_tokens=300, has_valid=True),
  Case(num_experts=64, top_k=8, order="sigmoid", has_bias=True),
  Case(num_experts=256, top_k=8, order="softmax_then_topk", num_rows=4),
  Case(num_experts=384, top_k=8, order="sigmoid", gate_scale=2.5),
  Case(num_experts=60, top_k=4, dtype=jnp.bfloat16, has_valid=True),
  Case(num_experts=7, top_k=3, order="softmax_then_topk", renormalise=False),
  Case(num_experts=512, top_k=1, order="sigmoid", renormalise=False),
  Case(num_experts=24, top_k=20, has_valid=True),
  Case(num_experts=2, top_k=2, num_tokens=1, has_bias=True),
]


class TestXla(TopkRoutingContract):
  backend = "xla"

  @pytest.mark.parametrize("case", CASES, ids=str)
  def test_outputs_and_gradient(self, case):
    self.check(case)

  @pytest.mark.parametrize("order", ORDERS)
  @pytest.mark.parametrize("renormalise", [True, False])
  @pytest.mark.parametrize("has_bias", [True, False])
  def test_products_of_options(self, order, renormalise, has_bias):
    self.check(
      Case(
        num_experts=6,
        top_k=3,
        num_rows=2,
        order=order,
        renormalise=renormalise,
        gate_scale=1.5,
        has_bias=has_bias,
        has_valid=True,
      )
    )


@st.composite
def any_logits(draw):
  """Few tokens with any floats, or with few values and so with ties."""
  shape = (4, draw(st.sampled_from([7, 16])))
  floats = st.floats(width=32)
  elements = st.one_of(floats, st.sampled_from(SPECIAL))
  return draw(of_numpy.arrays(np.float32, shape, elements=elements))


@functools.partial(jax.jit, static_argnums=0)
def _routed(rule: RoutingRule, logits, valid=None):
  return api.topk_routing(
    jnp.asarray(logits), rule, valid=valid, implementation="xla"
  )


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(logits=any_logits(), data=st.data())
def test_the_choice_is_that_of_top_k_whatever_the_logits(logits, data):
  top_k = data.draw(st.sampled_from([1, 3, 7]), label="top_k")
  found = _routed(RoutingRule(top_k=top_k), logits)
  expected = jax.lax.top_k(jnp.asarray(logits), top_k)[1]
  np.testing.assert_array_equal(found.experts, expected)
  np.testing.assert_array_equal(
    found.experts, [oracle.ranked(row)[:top_k] for row in logits]
  )
  counts = np.bincount(np.asarray(expected).ravel(), minlength=logits.shape[1])
  np.testing.assert_array_equal(found.counts[0], counts)


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(
  logits=of_numpy.arrays(
    np.float32, (6, 9), elements=st.floats(-30, 30, width=32)
  ),
  valid=of_numpy.arrays(bool, 6),
  top_k=st.sampled_from([1, 4, 9]),
  order=st.sampled_from(ORDERS),
)
def test_any_finite_values(logits, valid, top_k, order):
  rule = RoutingRule(top_k=top_k, order=order)
  case = Case(num_experts=9, top_k=top_k, num_tokens=6)
  found = _routed(rule, logits, valid)
  expected = oracle.route(logits, rule, bias=None, valid=valid, num_rows=1)
  compare(found, expected, case)


@pytest.mark.parametrize("spoilt", [np.nan, np.inf, -np.inf])
def test_a_spoilt_token_touches_no_other(spoilt):
  logits = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
  valid = np.arange(5) != 2

  def outputs(logits):
    rule = RoutingRule(top_k=2)

    def loss(x):
      found = _routed(rule, x, valid)
      total = jnp.sum(found.gates**2) + jnp.sum(found.probability**2) + found.z
      return total, found

    grad, found = jax.jit(jax.grad(loss, has_aux=True))(logits)
    return found.replace(experts=found.experts[valid]), grad

  expected = outputs(logits)
  logits[2] = spoilt
  jax.tree.map(np.testing.assert_array_equal, outputs(logits), expected)


def test_bad_arguments_are_named():
  logits = jnp.zeros((6, 4))
  with pytest.raises(
    ValueError, match="^top_k=5: need 1 <= top_k <= 4 experts$"
  ):
    api.topk_routing(logits, RoutingRule(top_k=5))
  with pytest.raises(ValueError, match="^num_rows=4: need a divisor of 6$"):
    api.topk_routing(logits, RoutingRule(top_k=1), num_rows=4)
  # Behind the run-time check of types that tests have and users have not.
  unchecked: Any = api._backend
  with pytest.raises(NotImplementedError) as error:
    unchecked.__wrapped__("fast", RoutingRule(top_k=1), logits)
  assert str(error.value) == (
    "implementation='fast'; there are xla, pallas_tpu, pallas_gpu"
  )


def test_a_kernel_never_runs_where_its_device_is_not():
  if jax.default_backend() == "tpu":
    pytest.skip("there is a TPU")
  message = "^implementation='pallas_tpu': no TPU, but "
  with pytest.raises(NotImplementedError, match=message):
    api.topk_routing(
      jnp.zeros((6, 4)), RoutingRule(top_k=1), implementation="pallas_tpu"
    )
