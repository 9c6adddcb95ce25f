"""The flags of a reproduction's command."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable

from absl import flags
from etils import epath

from aquila_jax.cli import config_door
from aquila_jax.core.experiment_config import ExperimentConfig
from aquila_jax.training.compilation import enable_compilation_cache
from benchmarks.reproduction.job import Job

# So that --help shows them as the command's own.
flags.disclaim_key_flags()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
  """The flags, of `define`."""

  default_config: str
  config: flags.FlagHolder
  workdir: flags.FlagHolder
  seeds: flags.FlagHolder
  smoke: flags.FlagHolder
  output: flags.FlagHolder
  page: flags.FlagHolder

  def job(self, shrunk: Callable[[ExperimentConfig], ExperimentConfig]) -> Job:
    """What the command line asks for.

    Args:
      shrunk: the experiment in miniature, for --smoke.

    Returns:
      The job.

    Raises:
      errors.UserError: on a config that does not fit.
    """
    if not self.config.present:
      flags.FLAGS[self.config.name].value = self.default_config
    experiment = config_door.load(self.config)
    if self.smoke.value:
      experiment = shrunk(experiment)
    enable_compilation_cache()
    workdir = epath.Path(self.workdir.value).expanduser()
    return Job(
      experiment=experiment,
      workdir=workdir,
      seeds=tuple(int(seed) for seed in self.seeds.value),
      output=pathlib.Path(self.output.value or workdir / "results.json"),
      page=pathlib.Path(self.page.value or workdir / "page.md"),
    )


def define(default_config: str) -> Command:
  """Defines the flags; `default_config` is that of --config."""
  return Command(
    default_config=default_config,
    config=config_door.define_flag(required=False),
    workdir=flags.DEFINE_string(
      "workdir", None, "Takes everything that is written.", required=True
    ),
    seeds=flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds, in order."),
    smoke=flags.DEFINE_bool(
      "smoke", False, "All of it with tiny models on a few pages of text."
    ),
    output=flags.DEFINE_string(
      "output", "", 'The results, a JSON file; "" is WORKDIR/results.json.'
    ),
    page=flags.DEFINE_string(
      "page",
      "",
      'Their page; "" is WORKDIR/page.md. The figure lies beside it.',
    ),
  )
