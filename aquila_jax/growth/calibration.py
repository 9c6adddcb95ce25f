"""What Scale-Out measures of a model on text, before it grows it.

One pass over the layers of the source, of which one is in memory at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from aquila_jax.core import errors
from aquila_jax.core.axes import Role
from aquila_jax.core.experiment_config import ScaleOut
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.growth import routers
from aquila_jax.growth.checking import ReadModel, Rows, watch_ffn_inputs
from aquila_jax.growth.merging import Merging
from aquila_jax.growth.methods import option
from aquila_jax.growth.routers import Constants, Sample
from aquila_jax.growth.scale_up import model_leaves
from aquila_jax.growth.upcycling import Upcycling


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
  """What is drawn and measured of routers."""

  # The rows of new routers; None where the source has some.
  rows: Float[np.ndarray, "L D copies"] | None = None
  # None where gates sum to one.
  constants: Constants | None = None
  # The share of the assignments that each expert of the source gets.
  usage: Float[np.ndarray, "L E"] | None = None

  def lines(self) -> Iterator[str]:
    """What was measured, for people."""
    if self.constants is not None:
      yield self.constants.in_words()
    if self.usage is not None:
      share = 100 * self.usage.max(1)
      yield (
        "the expert that is used most gets"
        f" {share.min():.3g} to {share.max():.3g} % of a layer's assignments"
      )


def what_needs_text(
  way: Upcycling | Merging, options: ScaleOut, *, path: str
) -> str:
  """The option for which a text must be read, and why; "" where none is."""
  if isinstance(way, Merging):
    if not way.by_usage:
      return ""
    return f"{option(path, 'method')}='merge_by_usage'"
  if way.of_source is None and options.router != "normal":
    return f"{option(path, 'router')}={options.router!r}"
  return f"{path}.moe.renormalise=False" if way.needs_constant else ""


def calibrate(
  way: Upcycling | Merging,
  source: ReadModel,
  target: ModelConfig,
  options: ScaleOut,
  *,
  sample: Sample | None,
  seed: int,
  path: str,
) -> Calibration:
  """Draws and measures what an upcycling or a merging needs.

  Args:
    way: what every FFN is made of.
    source: the model that grows.
    target: the architecture after it.
    options: the method and its options.
    sample: text; None will do where `what_needs_text` says "".
    seed: of what is drawn.
    path: the dotted name of `target`, for messages.

  Returns:
    What was drawn and measured.

  Raises:
    errors.UserError: where a text is needed and there is none, or its domains
      are not as many as the copies of an FFN.
  """
  what = what_needs_text(way, options, path=path)
  if what and sample is None:
    raise errors.UserError(f"{what}: it is measured on text, and none is given")
  if isinstance(way, Merging):
    if not way.by_usage:
      return Calibration()
    assert sample is not None
    return Calibration(usage=_usage(way, source, sample))
  if way.of_source is not None:
    return Calibration()
  shape = (len(way.layers), target.embed_dim, way.copies)
  rows = routers.drawn_rows(shape, std=way.moe.router_init_std, seed=seed)
  constants = None
  if what:
    assert sample is not None
    rows, constants = _measured(
      way, source, target, options, rows=rows, sample=sample, seed=seed
    )
  dtype = jnp.dtype(target.param_dtype)
  return Calibration(rows=rows.astype(dtype), constants=constants)


def _measured(
  way: Upcycling,
  source: ReadModel,
  target: ModelConfig,
  options: ScaleOut,
  *,
  rows: Float[np.ndarray, "L D copies"],
  sample: Sample,
  seed: int,
) -> tuple[Float[np.ndarray, "L D copies"], Constants | None]:
  """The rows, anew where they are from text, and the constants if needed."""
  rows = rows.copy()
  constants = []

  def watch(layer: int, inputs: np.ndarray) -> None:
    if layer not in way.layers:
      return
    x, row = sample.flat(inputs), way.layers.index(layer)
    if options.router != "normal":
      if options.router == "domains":
        domains = sample.flat(sample.domains)
        means = routers.domain_rows(x, domains, count=way.copies)
      else:
        means = routers.cluster_rows(x, count=way.copies, seed=seed + layer)
      rows[row] = routers.scaled_rows(means, std=way.moe.router_init_std)
    if way.needs_constant:
      kernel = np.repeat(rows[row], way.shards, axis=-1)
      sums = routers.gate_sums(x, kernel, config=target)
      constants.append(routers.constant(sums))

  if options.router == "domains":
    routers.refuse_domains(sample, copies=way.copies, what="router")
  watch_ffn_inputs(source, _rows_of(sample), watch)
  if not way.needs_constant:
    return rows, None
  values, errors_ = np.asarray(constants).T
  return rows, Constants(values=values, errors=errors_)


def _usage(
  way: Merging, source: ReadModel, sample: Sample
) -> Float[np.ndarray, "L E"]:
  usage = np.zeros((len(way.layers), way.moe.num_experts))
  names = {
    name.rpartition(".")[2]: name
    for name, spec in model_leaves(source.config).items()
    if spec.axes.has("expert", Role.WRITES)
  }

  def watch(layer: int, inputs: np.ndarray) -> None:
    if layer not in way.layers:
      return
    row = way.layers.index(layer)
    router = {
      last: source.params.read(name, index=(row, ...))
      for last, name in names.items()
    }
    usage[row] = routers.usage(
      sample.flat(inputs), router, config=source.config
    )

  watch_ffn_inputs(source, _rows_of(sample), watch)
  return usage


def _rows_of(sample: Sample) -> Rows:
  return Rows(
    tokens=sample.tokens, positions=sample.positions, segments=sample.segments
  )
