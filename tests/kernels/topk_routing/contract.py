"""What every backend of topk_routing must do; a subclass names the backend."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as of_numpy

from aquila_jax.kernels.topk_routing import api
from aquila_jax.kernels.topk_routing.rule import Gradients, Routed, RoutingRule
from tests.kernels.topk_routing import oracle

EPSILON = 2.0**-24
SPECIAL = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 3e38, 1e-45]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """A shape, and what is asked for."""

  num_experts: int
  top_k: int
  num_tokens: int = 40
  num_rows: int = 1
  dtype: Any = jnp.float32
  order: Any = "topk_then_softmax"
  renormalise: bool = True
  gate_scale: float = 1.0
  has_bias: bool = False
  has_valid: bool = False

  @property
  def rule(self) -> RoutingRule:
    """The backend's argument."""
    return RoutingRule(
      top_k=self.top_k,
      order=self.order,
      renormalise=self.renormalise,
      gate_scale=self.gate_scale,
    )

  def __str__(self) -> str:
    words = [f"{self.num_experts}/{self.top_k}x{self.num_tokens}", self.order]
    for name, is_on in (
      (f"rows{self.num_rows}", self.num_rows > 1),
      ("bfloat16", self.dtype == jnp.bfloat16),
      ("plain", not self.renormalise),
      (f"scale{self.gate_scale}", self.gate_scale != 1),
      ("bias", self.has_bias),
      ("valid", self.has_valid),
    ):
      words += [name] if is_on else []
    return "-".join(words)


def inputs(case: Case, seed: int = 0):
  """Logits with many ties, bias and mask."""
  rng = np.random.default_rng(seed)
  shape = (case.num_tokens, case.num_experts)
  # Multiples of 1/8 are bfloat16 too, and half of the tokens have ties.
  logits = np.round(8 * rng.normal(size=shape)) / 8
  logits[::2] += rng.normal(size=logits[::2].shape) / 64
  logits = jnp.asarray(logits, case.dtype)
  bias = valid = None
  if case.has_bias:
    bias = jnp.asarray(rng.normal(size=case.num_experts), jnp.float32)
  if case.has_valid:
    valid = jnp.asarray(rng.random(case.num_tokens) > 0.3)
  return logits, bias, valid


def _numpy(x: jax.Array) -> np.ndarray:
  return np.asarray(x.astype(jnp.float32))


def given(case: Case, bias, valid) -> dict[str, Any]:
  """The oracle's arguments."""
  return dict(
    bias=None if bias is None else _numpy(bias),
    valid=None if valid is None else np.asarray(valid),
  )


def compare(found: Routed, expected: dict[str, Any], case: Case) -> None:
  """Equal integers; floats to the roundings of their sums."""
  for name in ("experts", "positions", "counts"):
    np.testing.assert_array_equal(getattr(found, name), expected[name], name)
  # A softmax adds E numbers, some 8 roundings beside them.
  gates = 2 * (case.num_experts + 8) * EPSILON
  np.testing.assert_allclose(found.gates, expected["gates"], rtol=gates)
  # And a sum over tokens one for each.
  sums = gates + case.num_tokens * EPSILON
  for name in ("probability", "z", "entropy"):
    np.testing.assert_allclose(
      getattr(found, name),
      expected[name],
      rtol=2 * sums,
      atol=4 * sums,
      err_msg=name,
    )


class TopkRoutingContract:
  """Subclasses set `backend`: a name of the api or an object."""

  backend: Any
  # jit's; interpreted kernels compile faster unoptimised.
  compiler_options: dict[str, Any] | None = None

  def _routed(self, case: Case, logits, bias, valid) -> Routed:
    return _compiled(self.backend, case, self._options)(logits, bias, valid)

  @property
  def _options(self):
    return tuple((self.compiler_options or {}).items())

  def check(self, case: Case) -> None:
    """Outputs and gradient of a case against the oracle."""
    logits, bias, valid = inputs(case)
    expected = oracle.route(
      _numpy(logits),
      case.rule,
      num_rows=case.num_rows,
      **given(case, bias, valid),
    )
    rng = np.random.default_rng(1)
    gates_grad = rng.normal(size=expected["gates"].shape)
    probability_grad = rng.normal(size=expected["probability"].shape)
    z_grad = 0.7
    weights = Gradients(
      gates=jnp.float32(gates_grad),
      probability=jnp.float32(probability_grad),
      z=jnp.float32(z_grad),
    )
    found, grad = _with_gradient(self.backend, case, self._options)(
      logits, bias, valid, weights
    )
    compare(found, expected, case)
    assert grad.dtype == case.dtype
    exact = oracle.gradient(
      _numpy(logits),
      case.rule,
      gates_grad=gates_grad,
      probability_grad=probability_grad,
      z_grad=z_grad,
      **given(case, bias, valid),
    )
    # Terms of the size of the largest derivative, with a mean over E taken off.
    rounding = 4 * (case.num_experts + 16) * EPSILON
    if case.dtype == jnp.bfloat16:
      rounding = 2.0**-8
    np.testing.assert_allclose(
      np.asarray(grad, np.float64),
      exact,
      rtol=rounding,
      atol=rounding * np.abs(exact).max(),
    )


# What no kernel takes: rule, dtype, number of experts, and the reason given.
REFUSED = [
  (
    RoutingRule(top_k=2, num_groups=4, top_groups=2),
    jnp.float32,
    8,
    "top_groups=2 of num_groups=4",
  ),
  (RoutingRule(top_k=2), jnp.float16, 8, "logits of float16"),
  (RoutingRule(top_k=2), jnp.float32, 513, "num_experts=513, above 512"),
]
# Of nine tokens: whatever a float can be.
ANY_LOGITS = of_numpy.arrays(
  np.float32,
  (9, 11),
  elements=st.one_of(st.floats(width=32), st.sampled_from(SPECIAL)),
)


def check_choice(found: Routed, logits: np.ndarray) -> None:
  """Of three experts a token: those of top_k, and as many in the counts."""
  expected = jax.lax.top_k(jnp.asarray(logits), 3)[1]
  np.testing.assert_array_equal(found.experts, expected)
  np.testing.assert_array_equal(
    found.counts[0], np.bincount(np.asarray(expected).ravel(), minlength=11)
  )


def check_refused(backend, rule, dtype, num_experts: int, reason: str) -> None:
  """An error that gives the reason."""
  logits = jnp.zeros((4, num_experts), dtype)
  with pytest.raises(NotImplementedError) as caught:
    api.topk_routing(logits, rule, implementation=backend)
  assert str(caught.value) == f"implementation='backend': no {reason}"


def _call(backend, case: Case, logits, bias, valid) -> Routed:
  return api.topk_routing(
    logits,
    case.rule,
    bias=bias,
    valid=valid,
    num_rows=case.num_rows,
    implementation=backend,
  )


@functools.cache
def _compiled(backend, case: Case, options):
  return jax.jit(
    functools.partial(_call, backend, case),
    compiler_options=dict(options) or None,
  )


@functools.cache
def _with_gradient(backend, case: Case, options):
  def loss(logits, bias, valid, weights: Gradients):
    found = _call(backend, case, logits, bias, valid)
    total = (
      jnp.sum(weights.gates * found.gates)
      + jnp.sum(weights.probability * found.probability)
      + weights.z * found.z
    )
    return total, found

  def both(*arguments):
    grad, found = jax.grad(loss, has_aux=True)(*arguments)
    return found, grad

  return jax.jit(both, compiler_options=dict(options) or None)
