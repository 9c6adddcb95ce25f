"""From the metrics of steps on the device to rows of the log.

Nothing is fetched from the device but in `fetch`, which the loop calls at
logging steps and before it saves or evaluates.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from aquila_jax.training.metrics import Row
from aquila_jax.training.spikes import Event
from aquila_jax.training.step import StepMetrics

# Steps that may be queued on the device before the host waits for one.
_QUEUE = 2


@dataclasses.dataclass(kw_only=True)
class Window:
  """Sums over the steps since the last row. Saved in checkpoints.

  So a row that spans a stop is the same as if there had been none. Float64 on
  the host: exact enough, and JSON gives back the same bits.
  """

  total_nats: float = 0.0
  nats: float = 0.0
  weight: float = 0.0
  language_nats: list[float] = dataclasses.field(default_factory=list)
  language_weight: list[float] = dataclasses.field(default_factory=list)

  def add(self, step: StepMetrics) -> None:
    if not self.language_nats:
      self.language_nats = [0.0] * len(step.language_nats)
      self.language_weight = [0.0] * len(step.language_weight)
    self.total_nats += float(step.total_loss) * float(step.weight)
    self.nats += float(step.loss) * float(step.weight)
    self.weight += float(step.weight)
    for i, (nats, weight) in enumerate(
      zip(step.language_nats, step.language_weight, strict=True)
    ):
      self.language_nats[i] += float(nats)
      self.language_weight[i] += float(weight)


class Clock:
  """Training seconds of a stage, those of earlier starts included."""

  def __init__(self, seconds: float = 0.0):
    self._before = seconds
    self._since = time.perf_counter()

  @property
  def seconds(self) -> float:
    return self._before + time.perf_counter() - self._since

  def exclude(self, seconds: float) -> None:
    """Takes out time that was not spent on training."""
    self._before -= seconds


class Recorder:
  """Collects the metrics of steps and makes rows of them.

  Args:
    languages: names of the language indices.
    tokens_per_step: of a batch, padding included.
    flops_per_token: forward and backward.
    peak_flops: of the devices together, for MFU.
    moe_layers: of a model with experts, in which layers they are.
    step: from which training goes on.
    wall_s: training seconds of earlier starts.
    window: of a checkpoint.
  """

  def __init__(
    self,
    *,
    languages: Sequence[str],
    tokens_per_step: int,
    flops_per_token: float,
    peak_flops: float,
    moe_layers: Sequence[int] = (),
    step: int = 0,
    wall_s: float = 0.0,
    window: Window | None = None,
  ):
    self._languages = tuple(languages)
    self._tokens_per_step = tokens_per_step
    self._flops_per_token = flops_per_token
    self._peak_flops = peak_flops
    self._moe_layers = tuple(moe_layers)
    self._pending: list[tuple[int, StepMetrics]] = []
    self._last: StepMetrics | None = None  # on the host
    self.window = window or Window()
    self.clock = Clock(wall_s)
    # Rates are of the steps since the last row of this start.
    self._rate_step, self._rate_s = step, wall_s
    self._waited_s = 0.0

  def waited(self, seconds: float) -> None:
    """Notes time spent waiting for data."""
    self._waited_s += seconds

  def add(self, step: int, metrics: StepMetrics) -> None:
    """Keeps the metrics of a step, on the device.

    Waits (without a transfer) for the step before the last, so that the host
    does not run ahead of the device without bound.
    """
    self._pending.append((step, metrics))
    if len(self._pending) > _QUEUE:
      jax.block_until_ready(self._pending[-1 - _QUEUE][1])

  @property
  def is_empty(self) -> bool:
    """Whether `fetch` has nothing to do."""
    return not self._pending

  def fetch(self) -> list[Event]:
    """Brings pending metrics to the host.

    Returns:
      Of the steps fetched, those that got out of hand.
    """
    events = []
    fetched = jax.device_get([metrics for _, metrics in self._pending])
    for (step, _), metrics in zip(self._pending, fetched, strict=True):
      event = _event(step, metrics)
      if event is not None:
        events.append(event)
      # A mean with what is not finite would be none.
      if event is None or event.is_finite or not event.is_skipped:
        self.window.add(metrics)
      self._last = metrics
    self._pending = []
    return events

  def row(self, step: int, *, epochs: dict[str, float]) -> Row:
    """The row of a logging step, after `fetch`; starts a new window.

    Losses are means over the steps since the last row, weighted by tokens; all
    else is of this step. tokens, flops and wall_s are of the stage so far.
    """
    assert self._last is not None, "no step since the start"
    window, last = self.window, self._last
    row: Row = {
      "step": step,
      "loss": _ratio(window.nats, window.weight),
      "total_loss": _ratio(window.total_nats, window.weight),
    }
    for i, name in enumerate(self._languages):
      row[f"loss_{name}"] = _ratio(
        window.language_nats[i], window.language_weight[i]
      )
    row |= _optimisation(last)
    if last.growth_mask is not None:
      row["growth_mask"] = float(last.growth_mask)
    if last.routing is not None:
      row |= routing_fields(
        last, layers=self._moe_layers, languages=self._languages
      )
    row |= self._rates(step)
    row["epochs"] = dict(epochs)
    self.window = Window()
    return row

  def _rates(self, step: int) -> Row:
    wall_s = self.clock.seconds
    seconds = max(wall_s - self._rate_s, 1e-9)
    tokens = (step - self._rate_step) * self._tokens_per_step
    tokens_per_s = tokens / seconds
    fields = {
      "tokens": step * self._tokens_per_step,
      "flops": step * self._tokens_per_step * self._flops_per_token,
      "wall_s": wall_s,
      "tokens_per_s": tokens_per_s,
      "mfu": tokens_per_s * self._flops_per_token / self._peak_flops,
      "data_wait_share": min(self._waited_s / seconds, 1.0),
    }
    self._rate_step, self._rate_s, self._waited_s = step, wall_s, 0.0
    return fields


def _event(step: int, metrics: StepMetrics) -> Event | None:
  """Of metrics on the host; None of a step as it should be."""
  is_finite, is_spike = bool(metrics.finite), bool(metrics.spike or False)
  if is_finite and not is_spike:
    return None
  return Event(
    step=step,
    loss=float(metrics.total_loss),
    gradient_norm=float(metrics.gradient_norm),
    is_finite=is_finite,
    is_spike=is_spike,
    is_skipped=bool(metrics.skipped or False),
  )


def _ratio(sum_of_values: float, weight: float) -> float | None:
  return sum_of_values / weight if weight else None


def _optimisation(last: StepMetrics) -> Row:
  return {
    "lm_z_loss": float(last.lm_z),
    "lm_max_z_loss": float(last.lm_max_z),
    "gradient_norm": float(last.gradient_norm),
    "parameter_norm": float(last.parameter_norm),
    "update_norm": float(last.update_norm),
    "learning_rate": float(last.learning_rate),
  }


def routing_fields(
  last: StepMetrics, *, layers: Sequence[int], languages: Sequence[str]
) -> Row:
  """What a row says of the experts, a layer.

  With the load f [L E] (it sums to one a layer): entropy -sum f log f in nats
  (log E when even, 0 log 0 = 0) and max f / mean f = E max f. A router's own
  entropy and largest gate are means over tokens.

  Args:
    last: the metrics of a step on the host, with routing.
    layers: which layers of the model have experts, in rising order.
    languages: by index.

  Returns:
    Fields of a row. Lists are over the layers of the model, up to the last one
    with experts; one without has None.
  """
  routing = last.routing
  assert routing is not None and last.balance is not None
  load = np.asarray(routing.load, np.float64)
  safe = np.where(load > 0, load, 1.0)

  def by_layer(values: Any) -> list[Any]:
    found = np.asarray(values, np.float64).tolist()
    rows = dict(zip(layers, found, strict=True))
    return [rows.get(layer) for layer in range(layers[-1] + 1)]

  row = {
    "balance_loss": float(np.mean(last.balance)),
    "router_z_loss": float(np.mean(routing.z_loss)),
    "expert_load": by_layer(load),
    "load_entropy": by_layer(-np.sum(safe * np.log(safe), axis=-1) + 0.0),
    "load_max_over_mean": by_layer(load.max(-1) / load.mean(-1)),
    "dropped_share": by_layer(routing.dropped),
    "router_entropy": by_layer(routing.entropy),
    "top_gate": by_layer(routing.top_gate),
  }
  if routing.group_load is not None:
    # Each language's assignments sum to one; None where it has none.
    parts = np.asarray(routing.group_load, np.float64)
    totals = parts.sum(-1, keepdims=True)
    parts = np.divide(parts, totals, where=totals > 0, out=0 * parts)
    row["expert_load_by_language"] = {
      name: by_layer(parts[:, i]) if totals[:, i].all() else None
      for i, name in enumerate(languages)
    }
  if last.balance_weights is not None:
    row["balance_weight"] = by_layer(last.balance_weights)
  return row
