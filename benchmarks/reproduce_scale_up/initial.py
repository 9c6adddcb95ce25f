"""Losses right after growth: by every method, to five sizes.

What AquilaMoE printed of two sources is measured here of one, beside the other
methods that this project has.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any

import numpy as np
from etils import epath

from aquila_jax.core import files
from aquila_jax.core.experiment_config import ScaleUp, StageConfig
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.model_dir import load_model
from aquila_jax.core.types import Batch
from aquila_jax.data import loader
from aquila_jax.evaluation.perplexity import Evaluator
from aquila_jax.growth.scale_up import make_growth
from aquila_jax.models import decoder_lm
from aquila_jax.pipeline.context import Context
from aquila_jax.pipeline.initial import Start
from aquila_jax.training.metrics import read_rows

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
  """How much wider and deeper the target is."""

  width: Fraction = Fraction(1)
  depth: Fraction = Fraction(1)

  def of(self, source: ModelConfig) -> ModelConfig:
    """The target: key/value groups stay, query heads grow inside them."""
    return dataclasses.replace(
      source,
      num_layers=_times(source.num_layers, self.depth),
      **{
        field: _times(getattr(source, field), self.width)
        for field in ("embed_dim", "mlp_dim", "num_heads")
      },
    )


def _times(size: int, factor: Fraction) -> int:
  grown = size * factor
  assert grown.denominator == 1, f"{size} times {factor} is no size"
  return int(grown)


SIZES = {
  "width x2": Size(width=Fraction(2)),
  "width x1.25": Size(width=Fraction(5, 4)),
  "depth x4/3": Size(depth=Fraction(4, 3)),
  "width x2, depth x4/3": Size(width=Fraction(2), depth=Fraction(4, 3)),
  "width x1.25, depth x4/3": Size(width=Fraction(5, 4), depth=Fraction(4, 3)),
}
# That of the arms that train, and the only one of LiGO, which trains to grow.
MAIN = "width x2, depth x4/3"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
  """A method of Scale-Up with its options, and where it says something new."""

  options: Mapping[str, Any]  # fields of ScaleUp
  widens: bool = False  # only where width grows
  deepens: bool = False  # only where depth grows
  whole: bool = False  # only where width grows by a whole factor
  only: str = ""  # a name of SIZES

  def fits(self, name: str) -> bool:
    """Whether it is measured at a size of `SIZES`."""
    size = SIZES[name]
    return (
      (size.width > 1 or not self.widens)
      and (size.depth > 1 or not self.deepens)
      and (not self.whole or size.width > 1 == size.width.denominator)
      and (not self.only or self.only == name)
    )


def _methods() -> Iterator[tuple[str, Method]]:
  yield "FPI, interpolation", Method(options=dict(method="fpi"))
  for depth, words in (
    ("stack", "stacking"),
    ("solar", "SOLAR"),
    ("llama_pro", "LLaMA-Pro's zero blocks"),
    ("lemon", "LEMON's zero blocks"),
  ):
    options = dict(method="fpi", depth=depth)
    yield f"FPI, {words}", Method(options=options, deepens=True)
  readings = ("next_layer", "own_layer")
  for depth, words in (("stack", "stacking"), ("interpolate", "interpolation")):
    for reading in readings:
      options = dict(method="aki", depth=depth, aki_residual=reading)
      yield (
        f"AKI, {words}, {reading}",
        Method(options=options, widens=True, deepens=True),
      )
  for reading in readings:
    options = dict(method="aki_pro", aki_residual=reading)
    yield f"AKI-Pro, {reading}", Method(options=options, widens=True)
  for reading in readings:
    options = dict(method="bert2bert", aki_residual=reading)
    yield (
      f"bert2BERT, {reading}",
      Method(options=options, widens=True, deepens=True),
    )
  yield (
    "HyperCloning, noise",
    Method(options=dict(method="hypercloning"), whole=True),
  )
  yield (
    "HyperCloning, no noise",
    Method(options=dict(method="hypercloning", split_noise=0.0), whole=True),
  )
  yield "LEMON", Method(options=dict(method="lemon"))
  yield "MSG, masked", Method(options=dict(method="msg"))
  yield "LiGO", Method(options=dict(method="ligo"), only=MAIN)
  yield "random", Method(options=dict(method="random"))


METHODS = dict(_methods())


def grid() -> list[tuple[str, str]]:
  """Size and method of every row, in order."""
  return [
    (size, name)
    for size in SIZES
    for name, method in METHODS.items()
    if method.fits(size)
  ]


def measure(
  context: Context,
  *,
  arm: StageConfig,
  model: epath.Path,
  output: epath.Path,
  rows: list[tuple[str, str]] | None = None,
) -> None:
  """Measures the rows that a file does not have, and writes each at once.

  Args:
    context: of the source's run.
    arm: a growth by Scale-Up from the source: rows take from it everything but
      size and method.
    model: the source.
    output: takes a line of JSON a row; the first is the source itself.
    rows: size and method of each; None is the whole grid.
  """
  done = read(output)
  found = {(row["size"], row["method"]) for row in done}
  evaluators = functools.cache(
    functools.partial(
      context.evaluator,
      split="validation",
      sequence_length=arm.train.sequence_length,
      max_tokens=arm.train.evaluate_tokens,
    )
  )
  todo = [("", "source"), *(grid() if rows is None else rows)]
  for number, (size, method) in enumerate(todo):
    if (size, method) in found:
      continue
    begun = time.monotonic()
    if not size:
      row = _source_row(model, evaluators)
      row["unigram"] = _unigram_loss(context, arm)
    else:
      start = _start(context, arm=arm, model=model, size=size, method=method)
      row = _row(start, evaluators)
    row = {"size": size, "method": method, **row}
    row["wall_s"] = round(time.monotonic() - begun, 2)
    done.append(row)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in done]
    files.replace_text(output, "".join(lines))
    words = "exact" if row["exact"] else "not exact"
    context.say(
      f"initial loss {number}/{len(todo) - 1}: {size or 'the source'}:"
      f" {method}: {row['loss']:.4f}, predicted {words}"
    )


def read(path: epath.Path) -> list[Record]:
  """The rows of a file of `measure`; none where there is no file."""
  return read_rows(path) if path.exists() else []


def _source_row(
  model: epath.Path, evaluators: Callable[[ModelConfig], Evaluator]
) -> Record:
  stored = load_model(
    str(model), like=decoder_lm.abstract_params, with_optimizer=False
  )
  loss = evaluators(stored.config)(stored.params)["loss"]
  return {"loss": loss, "exact": True, "reasons": []}


def _unigram_loss(context: Context, arm: StageConfig) -> float:
  """Of the frequencies of tokens alone, on the same validation text."""
  data, length = context.data, arm.train.sequence_length
  counts = np.ones(data.vocab_size)  # no token is impossible
  batches = loader.train_batches(
    data,
    state=loader.DataState.start(data),
    batch_size=16,
    sequence_length=length,
    seed=context.experiment.data.seed,
  )
  for batch, _ in itertools.islice(batches, 200):
    np.add.at(counts, np.asarray(batch.targets)[_counted(batch)], 1)
  nats = -np.log(counts / counts.sum())
  found = [
    nats[np.asarray(batch.targets)[_counted(batch)]]
    for language in data.languages
    for batch in loader.evaluation_batches(
      data,
      split="validation",
      language=language,
      batch_size=16,
      sequence_length=length,
      max_tokens=arm.train.evaluate_tokens,
    )
  ]
  return float(np.mean(np.concatenate(found)))


def _counted(batch: Batch) -> np.ndarray:
  return np.asarray(batch.weights) > 0


def _row(
  start: Start, evaluators: Callable[[ModelConfig], Evaluator]
) -> Record:
  grown = start.model()
  growth = grown.lineage.events[-1].growth
  assert growth is not None, "a Scale-Up leaves its plan in the lineage"
  return {
    "loss": evaluators(grown.config)(grown.params)["loss"],
    "exact": growth["exact"],
    "reasons": growth["reasons"],
  }


def _start(
  context: Context,
  *,
  arm: StageConfig,
  model: epath.Path,
  size: str,
  method: str,
) -> Start:
  """The start of a stage that is never trained."""
  source = context.experiment.stages["source"].model
  assert isinstance(arm.init, ScaleUp)
  # None: the method's own depth rule, of an arm that may name one.
  given = {"depth": None, "optimizer": "reset", **METHODS[method].options}
  init = dataclasses.replace(arm.init, **given)
  target = SIZES[size].of(source)
  return Start(
    context=context,
    name=f"{size}: {method}",
    stage=dataclasses.replace(
      arm, init=init, model=_with_epsilon(source, target, init)
    ),
    locate=lambda _: str(model),
  )


def _with_epsilon(
  source: ModelConfig, target: ModelConfig, init: ScaleUp
) -> ModelConfig:
  """The target with the epsilon at which the growth's norms are exact."""
  if init.method == "random":
    return target
  factor = make_growth(source, target, init).mean_square_factor
  if factor is None:
    return target
  return dataclasses.replace(target, norm_epsilon=source.norm_epsilon * factor)
