"""Top-k routing by loops, in NumPy: what every backend is compared with.

Complex logits are taken: for a tiny h the imaginary part of f(x + i h v) over h
is the derivative along v, to all digits. The choice is of the real parts.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from aquila_jax.kernels.topk_routing.rule import RoutingRule


def ranked(row: np.ndarray) -> np.ndarray:
  """Experts from the best to the worst, as jax.lax.top_k orders floats."""
  bits = np.asarray(row, np.float32).view(np.int32).astype(np.int64)
  keys = np.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
  return np.lexsort((np.arange(len(row)), -keys))


def choose(
  logits: np.ndarray, rule: RoutingRule, bias: np.ndarray | None
) -> np.ndarray:
  """Experts [M A]; float32 ranks, as a float64 oracle would break no ties."""
  logits = np.asarray(logits, np.float32)
  ranks = logits
  if bias is not None:
    if rule.order == "softmax_then_topk":
      shifted = np.exp(logits - logits.max(-1, keepdims=True))
      ranks = shifted / shifted.sum(-1, keepdims=True)
    elif rule.order == "sigmoid":
      ranks = 1 / (1 + np.exp(-logits))
    ranks = ranks + np.asarray(bias, np.float32)
  return np.stack([ranked(row)[: rule.top_k] for row in ranks])


def _token(x: np.ndarray, experts: np.ndarray, rule: RoutingRule):
  """Gates, probabilities and logsumexp of one token; complex or real."""
  largest = np.real(x).max()
  exps = np.exp(x - largest)
  softmax = exps / exps.sum()
  logsumexp = largest + np.log(exps.sum())
  probability = softmax
  if rule.order == "topk_then_softmax":
    gates = exps[experts] / exps[experts].sum()
  else:
    scores = softmax
    if rule.order == "sigmoid":
      scores = 1 / (1 + np.exp(-x))
      probability = scores / scores.sum()
    gates = scores[experts]
    if rule.renormalise:
      gates = gates / gates.sum()
  return rule.gate_scale * gates, probability, logsumexp


def route(
  logits: np.ndarray,
  rule: RoutingRule,
  *,
  bias: np.ndarray | None,
  valid: np.ndarray | None,
  num_rows: int,
) -> dict[str, Any]:
  """The fields of Routed; and what each token adds to them, `of_tokens`."""
  num_tokens, num_experts = logits.shape
  valid = np.ones(num_tokens, bool) if valid is None else valid
  experts = choose(np.real(logits), rule, bias)
  dtype = np.complex128 if np.iscomplexobj(logits) else np.float64
  x = np.asarray(logits, dtype)
  gates = np.zeros(experts.shape, dtype)
  probability = np.zeros(x.shape, dtype)
  square = np.zeros(num_tokens, dtype)
  entropy = 0.0
  positions = np.full(experts.shape, -1)
  counts = np.zeros((num_rows, num_experts), int)
  before = np.zeros(num_experts, int)
  for m in np.flatnonzero(valid):
    gates[m], probability[m], logsumexp = _token(x[m], experts[m], rule)
    square[m] = logsumexp**2
    p = probability[m].real
    entropy -= np.sum(p[p > 0] * np.log(p[p > 0]))
    positions[m] = before[experts[m]]
    before[experts[m]] += 1
    counts[m * num_rows // num_tokens, experts[m]] += 1
  return dict(
    experts=experts,
    gates=gates,
    positions=positions,
    counts=counts,
    probability=probability.reshape(num_rows, -1, num_experts).sum(1),
    z=square.sum(),
    entropy=entropy,
    of_tokens=(gates, probability, square),
  )


def gradient(
  logits: np.ndarray,
  rule: RoutingRule,
  *,
  gates_grad: np.ndarray,
  probability_grad: np.ndarray,
  z_grad: float,
  **given: Any,
) -> np.ndarray:
  """Of sum(gates_grad gates) + sum(probability_grad probability) + z_grad z.

  Tokens do not touch each other, so one evaluation gives one expert's column.
  """
  num_tokens, num_experts = logits.shape
  num_rows = probability_grad.shape[0]
  of_row = np.repeat(probability_grad, num_tokens // num_rows, axis=0)
  grad = np.zeros(logits.shape)
  tiny = 1e-30
  for expert in range(num_experts):
    moved = logits.astype(np.complex128)
    # Not a sum: -0.0 stays -0.0, which is below 0.0.
    moved.imag[:, expert] = tiny
    found = route(moved, rule, num_rows=num_rows, **given)
    gates, probability, square = found["of_tokens"]
    loss = (
      np.sum(gates_grad * gates, -1)
      + np.sum(of_row * probability, -1)
      + z_grad * square
    )
    grad[:, expert] = loss.imag / tiny
  return grad
