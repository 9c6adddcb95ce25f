"""What the stages of a run share: config, data, devices, and where to talk."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import zlib
from collections.abc import Callable
from typing import Any, Literal

from etils import epath
from jax.sharding import Mesh

from aquila_jax.core import errors, processes
from aquila_jax.core.experiment_config import DataConfig, ExperimentConfig
from aquila_jax.core.lineage import Lineage
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.data.loader import DataState
from aquila_jax.data.prepare import prepare
from aquila_jax.data.prepared import PreparedData
from aquila_jax.evaluation.perplexity import Evaluator
from aquila_jax.models import decoder_lm
from aquila_jax.sharding.mesh import BATCH_AXES, batch_sharding, make_mesh
from aquila_jax.sharding.rules import laid_out, param_shardings

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
  """What the stages of a run share."""

  experiment: ExperimentConfig
  data: PreparedData
  mesh: Mesh
  say: Say  # a line to the person at the terminal

  def stage_seed(self, name: str) -> int:
    """Of a stage's initialisation or growth; no two stages share one."""
    return zlib.crc32(f"{self.experiment.seed}/{name}".encode()) >> 1

  @property
  def data_identity(self) -> dict[str, Any]:
    """What a position in the data is a position of."""
    return {
      "digest": self.data.digest,
      "seed": self.experiment.data.seed,
    }

  def data_state(self, lineage: Lineage, *, name: str) -> DataState:
    """Where a model's last training left these data, or their beginning.

    Args:
      lineage: of the model.
      name: of the stage, for what is said.

    Returns:
      The position.
    """
    state = lineage.data_state
    if state is None:
      return DataState.start(self.data)
    if {key: state[key] for key in self.data_identity} == self.data_identity:
      return DataState.from_json(state)
    self.say(
      f"{name}: the model was trained on other data; these are read from their"
      " beginning"
    )
    return DataState.start(self.data)

  def spread(self, config: ModelConfig) -> Any:
    """The abstract parameters of a model, where they lie on the mesh."""
    shapes = decoder_lm.abstract_params(config)
    axes = decoder_lm.parameter_axes(config)
    return laid_out(shapes, param_shardings(axes, shapes, self.mesh))

  def evaluator(
    self,
    model: ModelConfig,
    *,
    split: Literal["validation", "test"],
    sequence_length: int,
    max_tokens: int,
  ) -> Evaluator:
    """An evaluator whose batches are spread over the mesh."""
    parts = math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)
    wanted = self.experiment.evaluation.batch_size
    return Evaluator(
      model,
      data=self.data,
      split=split,
      batch_size=-(-wanted // parts) * parts,
      sequence_length=sequence_length,
      max_tokens=max_tokens,
      sharding=batch_sharding(self.mesh),
    )


def make_context(
  experiment: ExperimentConfig, workdir: epath.Path, *, say: Say
) -> Context:
  """Makes the mesh, and prepares the data where that is not done.

  Args:
    experiment: the whole config.
    workdir: made if missing; takes the data where the config names none.
    say: see Context.

  Returns:
    The context.

  Raises:
    errors.UserError: where the mesh does not fit, the workdir cannot be made,
      or the data cannot be prepared.
  """
  mesh = make_mesh(experiment.mesh)
  make_workdir(workdir)
  data = open_data(experiment.data, workdir, say=say)
  return Context(experiment=experiment, data=data, mesh=mesh, say=say)


def make_workdir(workdir: epath.Path) -> None:
  """Makes a workdir, if it is missing.

  Raises:
    errors.UserError: where it cannot be made.
  """
  try:
    processes.by_first(
      lambda: workdir.mkdir(parents=True, exist_ok=True), name="workdir"
    )
  except OSError as error:
    raise errors.UserError(
      f"--workdir={str(workdir)!r}: cannot be made: {error.strerror}"
    ) from error


def open_data(
  config: DataConfig, workdir: epath.Path, *, say: Say
) -> PreparedData:
  """The prepared data of a config: `prepared`, or WORKDIR/data.

  Raises:
    errors.UserError: where there are none and none can be made.
  """
  if config.prepared:
    data = PreparedData.open(config.prepared, what="config.data.prepared")
    _check_same(data, where=config.prepared)
    return data
  if "://" in os.fspath(workdir):
    raise errors.UserError(
      f"--workdir={str(workdir)!r}: data are prepared on a local disk; run"
      " prepare_data and give config.data.prepared"
    )
  target = workdir / "data"
  processes.by_first(lambda: prepare(config, target, progress=say), name="data")
  data = PreparedData.open(target, what="data")
  _check_same(data, where=str(target))
  return data


def _check_same(data: PreparedData, *, where: str) -> None:
  """Refuses data that are not those of process 0.

  Raises:
    errors.UserError: in the process that has others.
  """
  digest = processes.from_first(lambda: data.digest, name="digest")
  if digest != data.digest:
    raise errors.UserError(
      f"{where}: these are not the data that process 0 finds there; all"
      " processes need the same"
    )


def say_on_stderr(text: str) -> None:
  """`Say` for the commands; of several processes, the first says it."""
  if processes.is_first():
    print(text, file=sys.stderr, flush=True)
