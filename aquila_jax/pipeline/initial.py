"""Where the weights of a stage come from: scratch, a MODEL, or a growth."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from aquila_jax.core import errors
from aquila_jax.core.experiment_config import (
  Load,
  ScaleOut,
  ScaleUp,
  Scratch,
  StageConfig,
  TrainConfig,
)
from aquila_jax.core.lineage import Event, Lineage
from aquila_jax.core.model_config import ModelConfig, differences
from aquila_jax.core.model_dir import (
  StoredModel,
  load_model,
  read_header,
  read_tokenizer,
)
from aquila_jax.growth.scale_out import plan_scale_out, scale_out
from aquila_jax.growth.scale_up import grown_header, make_growth, scale_up
from aquila_jax.models import decoder_lm
from aquila_jax.pipeline import scaled_out
from aquila_jax.pipeline.budget import source_of
from aquila_jax.pipeline.context import Context
from aquila_jax.pipeline.host import on_host
from aquila_jax.pipeline.learned_growth import GrowthJob, learn_growth
from aquila_jax.sharding.rules import param_shardings
from aquila_jax.training.inputs import prepared_input

# What a stage does not set but takes from the MODEL.
_TAKEN = ("growth_mask",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
  """The start of a stage: its weights and, where it has one, its source."""

  context: Context
  name: str
  stage: StageConfig
  # Of a stage of this experiment or a path, to where its MODEL lies.
  locate: Callable[[str], str]

  @property
  def path(self) -> str:
    return f"config.stages.{self.name}"

  @functools.cached_property
  def source(self) -> StoredModel | None:
    """The MODEL that the stage starts from; None from scratch.

    Raises:
      errors.UserError: where there is none, or its tokenizer is not the data's.
    """
    given = source_of(self.stage)
    if not given:
      return None
    what = source_field(self.stage, self.name)
    check_tokenizer(self.context, self.locate(given), what=what)
    with self._on_host():
      return load_model(
        self.locate(given), like=decoder_lm.abstract_params, what=what
      )

  def forget_source(self) -> None:
    """Frees the source; the next look at it reads it again."""
    self.__dict__.pop("source", None)

  def model(self, method: str | None = None) -> StoredModel:
    """The stage's model before its training.

    Args:
      method: of Scale-Up, in place of the config's; without moments.

    Returns:
      The model; its lineage has one more event than its source's.
    """
    init, target = self.stage.init, self.stage.model
    check_vocabulary(target, self.context, path=f"{self.path}.model")
    seed = self.context.stage_seed(self.name)
    if isinstance(init, Scratch):
      return self._scratch(seed)
    assert self.source is not None
    model_path = f"{self.path}.model"
    if isinstance(init, Load):
      return load(self.source, target, path=model_path)
    if isinstance(init, ScaleOut):
      return self._scaled_out(self.source, init, seed=seed)
    options = init if method is None else with_method(init, method)
    if options.method == "ligo":
      return self._learned(self.source, options, seed=seed)
    return scale_up(
      self.source,
      target,
      options,
      seed=seed,
      name=self.name,
      path=model_path,
      shardings=self._shardings(),
    )

  def _scaled_out(
    self, source: StoredModel, options: ScaleOut, *, seed: int
  ) -> StoredModel:
    path, target = f"{self.path}.model", self.stage.model
    plan = plan_scale_out(source.config, target, options, path=path)
    return scale_out(
      source,
      target,
      options,
      others=self._others(options),
      sample=scaled_out.sample_of(
        self.context,
        plan,
        options,
        train=self.stage.train,
        lineage=source.lineage,
        name=self.name,
      ),
      seed=seed,
      name=self.name,
      path=path,
      shardings=self._shardings(),
    )

  def _on_host(self) -> contextlib.AbstractContextManager:
    mesh = self.context.mesh
    platform = mesh.devices.flat[0].platform
    return on_host(platform, num_devices=mesh.size)

  def _others(self, options: ScaleOut) -> list[StoredModel]:
    with self._on_host():
      return scaled_out.load_others(
        options, locate=self.locate, path=f"{self.path}.init"
      )

  def _shardings(self) -> Any:
    """Where the stage's parameters lie; None on a single device."""
    mesh = self.context.mesh
    if mesh.size == 1:
      return None
    config = self.stage.model
    return param_shardings(
      decoder_lm.parameter_axes(config),
      decoder_lm.abstract_params(config),
      mesh,
    )

  def _learned(
    self, source: StoredModel, options: ScaleUp, *, seed: int
  ) -> StoredModel:
    """A growth that is learned on the text of the stage."""
    context, target = self.context, self.stage.model
    chosen: dict[str, Any] = dict(seed=seed, path=f"{self.path}.model")
    header = grown_header(source, target, options, name=self.name, **chosen)
    growth = make_growth(source.config, target, options, **chosen)

    def batches(train: TrainConfig):
      state = context.data_state(source.lineage, name=self.name)
      order = context.experiment.data.seed
      text = prepared_input(
        context.data, train=train, seed=order, mesh=context.mesh
      )
      return text.batches(state)

    learned = learn_growth(
      GrowthJob(
        name=self.name,
        source=source,
        target=target,
        width=growth.width,
        layers=growth.layers.copies,
        config=options.ligo,
        train=self.stage.train,
        mesh=context.mesh,
        batches=batches,
        seed=seed,
        path=f"{self.path}.init.ligo",
      )
    )
    event = learned.recorded(
      header.lineage.events[-1], data_identity=context.data_identity
    )
    return dataclasses.replace(
      header,
      lineage=source.lineage.then(event),
      params=learned.params,
      ema=learned.ema,
    )

  def _scratch(self, seed: int) -> StoredModel:
    initialise = jax.jit(
      functools.partial(decoder_lm.init_params, self.stage.model),
      out_shardings=self._shardings(),
    )
    event = Event(kind="scratch", name=self.name, options={"seed": seed})
    return StoredModel(
      config=self.stage.model,
      lineage=Lineage(events=(event,)),
      params=initialise(key=jax.random.key(seed)),
      tokenizer=self.context.data.tokenizer_text,
    )


def source_field(stage: StageConfig, name: str) -> str:
  """The dotted name of what a stage starts from."""
  field = "path" if isinstance(stage.init, Load) else "source"
  return f"config.stages.{name}.init.{field}"


def check_tokenizer(context: Context, path: str, *, what: str) -> None:
  """Refuses a MODEL whose tokenizer is not the data's.

  Args:
    context: with the data.
    path: of the MODEL.
    what: the field that named it, for messages.

  Raises:
    errors.UserError: saying what to do.
  """
  has_tokenizer = read_header(path, what=what).has_tokenizer
  if not has_tokenizer:
    raise errors.UserError(
      f"{what}={path!r}: it has no tokenizer.json, so its tokens cannot be"
      " compared with the data's; import it with --tokenizer"
    )
  if not context.data.tokenizes_as(read_tokenizer(path)):
    raise errors.UserError(
      f"{what}={path!r}: its tokenizer is not the data's; give"
      f" config.data.tokenizer.path='{path}/tokenizer.json' and prepare the"
      " data with it"
    )


def with_method(init: ScaleUp, method: str) -> ScaleUp:
  """The same growth by another method, to look at its loss."""
  if method == "aki_pro":  # whose depth is its own
    init = dataclasses.replace(init, depth=None, layers=())
  return dataclasses.replace(init, method=method, optimizer="reset")


def check_same_architecture(
  source: ModelConfig, target: ModelConfig, *, path: str
) -> None:
  """Refuses to load a MODEL of another architecture.

  Raises:
    errors.UserError: naming the field and both values.
  """
  found = differences(target.spelled_out(), source.spelled_out())
  for name, wanted, given in found:
    if name not in _TAKEN:
      raise errors.UserError(
        f"{path}.{name}={wanted!r}: the MODEL has {given!r}; a stage that"
        " loads a MODEL takes it as it is"
      )


def load(source: StoredModel, target: ModelConfig, *, path: str) -> StoredModel:
  """A MODEL as it is, its growth mask too, in the target's dtypes.

  Raises:
    errors.UserError: as `check_same_architecture`.
  """
  check_same_architecture(source.config, target, path=path)
  params = decoder_lm.as_declared(source.params, target)
  taken = {name: getattr(source.config, name) for name in _TAKEN}
  return dataclasses.replace(
    source, config=dataclasses.replace(target, **taken), params=params
  )


def check_vocabulary(target: ModelConfig, context: Context, *, path: str):
  """Refuses a model whose table is smaller than the tokenizer.

  Raises:
    errors.UserError: naming the field and the least size.
  """
  needed = context.data.vocab_size
  if target.vocab_size < needed:
    raise errors.UserError(
      f"{path}.vocab_size={target.vocab_size}: expected at least {needed}, the"
      " tokens of the data's tokenizer"
    )
