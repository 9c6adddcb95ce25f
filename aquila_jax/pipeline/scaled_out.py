"""Scale-Out inside a pipeline: the models that are mixed, and the text."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from aquila_jax.core import errors, processes
from aquila_jax.core.experiment_config import ScaleOut, TrainConfig
from aquila_jax.core.lineage import Lineage
from aquila_jax.core.model_dir import StoredModel, load_model
from aquila_jax.growth.calibration import what_needs_text
from aquila_jax.growth.routers import Sample
from aquila_jax.growth.scale_out import Plan
from aquila_jax.models import decoder_lm
from aquila_jax.pipeline.context import Context
from aquila_jax.training.inputs import prepared_input


def load_others(
  options: ScaleOut, *, locate: Callable[[str], str], path: str
) -> list[StoredModel]:
  """The models that are mixed in.

  Args:
    options: with `sources`.
    locate: from a stage or a path to where its MODEL lies.
    path: the dotted name of `options`, for messages.

  Returns:
    The models, in order.
  """
  return [
    load_model(
      locate(given),
      like=decoder_lm.abstract_params,
      what=f"{path}.sources[{i}]",
    )
    for i, given in enumerate(options.sources)
  ]


def sample_of(
  context: Context,
  plan: Plan,
  options: ScaleOut,
  *,
  train: TrainConfig,
  lineage: Lineage,
  name: str,
) -> Sample | None:
  """The text that the stage will train on first, where any is needed.

  Args:
    context: with the data.
    plan: of the Scale-Out.
    options: with `sample_tokens`.
    train: of the stage.
    lineage: of the source, which says where it left the data.
    name: of the stage.

  Returns:
    Rows of it, whose domains are the data's languages; None where nothing is
    measured.

  Raises:
    errors.UserError: in a job of several processes, each of which would measure
      its own rows.
  """
  if not what_needs_text(plan.way, options, path=name):
    return None
  if processes.are_several():
    raise errors.UserError(
      f"config.stages.{name}.init: what is measured on text is measured by one"
      " process; make the mixture with scale_out, and load it"
    )
  state = context.data_state(lineage, name=name)
  seed = context.experiment.data.seed
  text = prepared_input(context.data, train=train, seed=seed)
  rows, tokens = [], 0
  for batch, _ in text.batches(state):
    rows.append(batch)
    tokens += int((batch.segments > 0).sum())
    if tokens >= options.sample_tokens:
      break

  def joined(field: str) -> np.ndarray:
    return np.concatenate([np.asarray(getattr(row, field)) for row in rows])

  return Sample(
    tokens=joined("tokens"),
    positions=joined("positions"),
    segments=joined("segments"),
    domains=joined("languages"),
    names=text.languages,
  )
