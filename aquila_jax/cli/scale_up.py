r"""Grows a MODEL in width and depth.

  python -m aquila_jax.cli.scale_up --source=MODEL --output=MODEL \
    --config=experiments/configs/quickstart.py --method=aki_pro
  python -m aquila_jax.cli.scale_up --source=MODEL --output=MODEL \
    --target=embed_dim=1152,num_heads=18,num_kv_heads=6 --method=fpi --check

The target is a config's: of several stages, the one that scales up or that
--stage names; what no flag says, and further options, are its init's. Or it is
the source with the fields that --target names; norm_epsilon then is the one at
which the maps are exact.

It says what it will do before it does it, and with --dry_run does not. --check
runs source and target on a text, a layer at a time, and says how far apart they
are; like the rest it goes into the lineage of the MODEL.
"""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import tokenizers
from absl import flags

from aquila_jax.cli import app, config_door, growth_flags, model_flags
from aquila_jax.core import config as config_lib
from aquila_jax.core import errors
from aquila_jax.core.allocator import keep_freed_memory
from aquila_jax.core.experiment_config import (
  GROWTH_METHODS,
  DepthRule,
  OptimizerRule,
  ResidualReading,
  ScaleUp,
  StageConfig,
  WidthMap,
)
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.model_dir import ModelReader
from aquila_jax.growth import checking
from aquila_jax.growth.exactness import Check
from aquila_jax.growth.scale_up import make_growth, plan_growth, scale_up
from aquila_jax.growth.streaming import grown_trees, stream_scale_up

_CONFIG = config_door.define_flag(required=False)
_STAGE = model_flags.define_stage()
_TARGET = flags.DEFINE_list(
  "target",
  [],
  "In place of --config: fields of the source's architecture to change, as"
  " embed_dim=1152,num_layers=40.",
)
_SOURCE = flags.DEFINE_string("source", None, "A MODEL.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "A new MODEL.")
_METHOD = flags.DEFINE_string(
  "method",
  None,
  f"One of {', '.join(GROWTH_METHODS)}, or module:function of your own;"
  " aki_pro by default.",
)
_DEPTH = flags.DEFINE_string(
  "depth", None, f"One of {', '.join(get_args(DepthRule))}."
)
_LAYERS = flags.DEFINE_list(
  "layers", None, "In place of --depth: the source layer of every layer."
)
_WIDTH_MAP = flags.DEFINE_string(
  "width_map", None, f"One of {', '.join(get_args(WidthMap))}."
)
_MAPS = flags.DEFINE_string(
  "maps", None, "A JSON file of maps by axis name; see ScaleUp.maps."
)
_AKI_RESIDUAL = flags.DEFINE_string(
  "aki_residual", None, f"One of {', '.join(get_args(ResidualReading))}."
)
_SPLIT_NOISE = flags.DEFINE_float(
  "split_noise", None, "Noise on the shares of copies; see ScaleUp.split_noise."
)
_OPTIMIZER = flags.DEFINE_string(
  "optimizer", None, "grow the optimizer state, or reset; or the config's."
)
_TOKENIZER = flags.DEFINE_string(
  "tokenizer", "", "Of a vocabulary that grows: a tokenizer.json."
)
_SEED = model_flags.define_seed("Of all that is drawn.")
_CHECK = growth_flags.define_check()
_DRY_RUN = growth_flags.define_dry_run()


def main() -> None:
  keep_freed_memory()
  if not _DRY_RUN.value:
    growth_flags.check_output(_OUTPUT.value, _SOURCE.value)
  _CHECK.refuse_file_alone()
  if bool(_TARGET.value) == bool(_CONFIG.value):
    raise errors.UserError("give one of --config and --target")
  if _CONFIG.value:
    experiment = config_door.load(_CONFIG)
    name = model_flags.stage_name(experiment, _STAGE.value, kind="scale_up")
    stage = experiment.stages[name]
    options, path = _options(stage, name), f"config.stages.{name}.model"
    source = model_flags.open_source(_SOURCE.value, optimizer=_OPTIMIZER.value)
    target = stage.model
  else:
    name, path = "", "--target"
    options = _given(
      ScaleUp(source=_SOURCE.value, vocabulary="mean", context="extend"), ""
    )
    source = model_flags.open_source(_SOURCE.value, optimizer=_OPTIMIZER.value)
    target = _changed(source.model.config, options)
  source = _with_tokenizer(source, target)
  chosen: dict[str, Any] = dict(seed=_SEED.value, path=path)
  plan = plan_growth(source.model.config, target, options, **chosen)
  for line in plan.lines():
    print(line, flush=True)
  checked = None
  if _CHECK.wanted:
    checked = _checked(source, target, options, config=plan.config, **chosen)
    growth_flags.say_checked(plan.exactness, checked)
  if not _DRY_RUN.value:
    _write(source, target, options, checked=checked, name=name, **chosen)


def _write(
  source: ModelReader,
  target: ModelConfig,
  options: ScaleUp,
  *,
  checked: Check | None,
  **chosen: Any,
) -> None:
  output = _OUTPUT.value
  assert output is not None
  if options.method == "random":  # reads nothing of the source
    model_flags.save(output, scale_up(source.model, target, options, **chosen))
    return
  grown = stream_scale_up(
    source,
    output,
    target,
    options,
    checked=checked,
    progress=model_flags.now_and_then(),
    **chosen,
  )
  with_optimizer = options.optimizer == "grow" and source.optimizer is not None
  model_flags.say_written(output, grown, with_optimizer=with_optimizer)


def _options(stage: StageConfig, name: str) -> ScaleUp:
  """The init of the stage where it scales up, and the flags over it."""
  init = stage.init if isinstance(stage.init, ScaleUp) else ScaleUp(source="")
  init = dataclasses.replace(init, source=_SOURCE.value, compare=())
  return _given(init, f"config.stages.{name}.init.")


def _given(init: ScaleUp, path: str) -> ScaleUp:
  """Options with those that flags give."""
  given: dict[str, Any] = {}
  for flag, valid in (
    (_DEPTH, get_args(DepthRule)),
    (_WIDTH_MAP, get_args(WidthMap)),
    (_AKI_RESIDUAL, get_args(ResidualReading)),
    (_OPTIMIZER, get_args(OptimizerRule)),
  ):
    if flag.value is not None:
      if flag.value not in valid:
        raise errors.unknown_name(f"--{flag.name}", flag.value, valid)
      given[flag.name] = flag.value
  method = _METHOD.value
  if method is not None:
    if method not in GROWTH_METHODS and ":" not in method:
      raise errors.unknown_name("--method", method, GROWTH_METHODS)
    given["method"] = method
  for flag in (_MAPS, _SPLIT_NOISE):
    if flag.value is not None:
      given[flag.name] = flag.value
  if _LAYERS.value is not None:
    if not any(_LAYERS.value):
      raise errors.UserError("--layers=: expected numbers of layers")
    try:
      given["layers"] = tuple(int(layer) for layer in _LAYERS.value)
    except ValueError as error:
      raise errors.UserError(
        f"--layers={','.join(_LAYERS.value)}: expected numbers of layers"
      ) from error
  try:
    return dataclasses.replace(init, **given)
  except ValueError as error:
    raise errors.UserError(f"{path or '--'}{error}") from error


def _changed(source: ModelConfig, options: ScaleUp) -> ModelConfig:
  """The source's architecture with the fields of --target."""
  target, named = growth_flags.changed(
    config_lib.to_dict(source), _TARGET.value
  )
  if "norm_epsilon" in named or options.method == "random":
    return target
  factor = make_growth(
    source, target, options, seed=_SEED.value, path="--target"
  ).mean_square_factor
  if factor is None or factor == 1:
    return target
  return dataclasses.replace(
    target,
    norm_epsilon=source.norm_epsilon * factor,
    qk_norm_epsilon=source.head_norm_epsilon if source.qk_norm else None,
  )


def _with_tokenizer(source: ModelReader, target: ModelConfig) -> ModelReader:
  """The source with the tokenizer that the target is to have.

  Raises:
    errors.UserError: where that of --tokenizer has other ids for the tokens
      that are there, or more tokens than the target has rows.
  """
  text = model_flags.read_tokenizer_flag(_TOKENIZER.value)
  if text is None:
    return source
  flag = f"--tokenizer={_TOKENIZER.value!r}"
  new = tokenizers.Tokenizer.from_str(text).get_vocab()
  if new and max(new.values()) >= target.vocab_size:
    raise errors.UserError(
      f"{flag}: it has ids up to {max(new.values())}; expected at most"
      f" {target.vocab_size - 1}, the last row of the target"
    )
  if source.model.tokenizer is not None:
    old = tokenizers.Tokenizer.from_str(source.model.tokenizer).get_vocab()
    for token, row in sorted(old.items(), key=lambda item: item[1]):
      if new.get(token) != row:
        raise errors.UserError(
          f"{flag}: the token {token!r} has the id {new.get(token)}; expected"
          f" {row}, as in the source's tokenizer: growth adds tokens at the end"
        )
  model = dataclasses.replace(source.model, tokenizer=text)
  return dataclasses.replace(source, model=model)


def _checked(
  source: ModelReader,
  target: ModelConfig,
  options: ScaleUp,
  *,
  config: ModelConfig,
  **chosen: Any,
) -> Check:
  if options.method == "random":
    raise errors.UserError(
      "--check: method='random' keeps nothing that could be compared"
    )
  return checking.check(
    checking.ReadModel(config=source.model.config, params=source.params),
    checking.ReadModel(
      config=config,
      params=grown_trees(source, target, options, **chosen)["params"],
    ),
    _CHECK.tokens(source),
  )


if __name__ == "__main__":
  app.run(main)
