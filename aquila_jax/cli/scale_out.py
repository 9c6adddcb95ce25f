r"""Makes a mixture of experts of a MODEL, or one FFN of the experts of one.

  python -m aquila_jax.cli.scale_out --source=MODEL --output=MODEL \
    --num_experts=8 --top_k=2 --check
  python -m aquila_jax.cli.scale_out --source=MODEL --output=MODEL \
    --method=granular --target=mlp_dim=384 --num_experts=32 --top_k=8
  python -m aquila_jax.cli.scale_out --source=MIXTURE --output=MODEL \
    --num_experts=16 --top_k=4
  python -m aquila_jax.cli.scale_out --source=MIXTURE --output=MODEL \
    --method=merge_by_usage --sample=FILE

The target is a config's (of several stages, the one that scales out or that
--stage names), or the source with --num_experts, --top_k and the fields that
--target names, such as moe.shared_expert_dim=5504 or
moe.router_order=softmax_then_topk.

It says what it will do before it does it, and with --dry_run does not. --check
runs source and target on a text, a layer at a time, and says how far apart they
are. What is measured of routers is measured on --sample.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from absl import flags

from aquila_jax.cli import app, config_door, growth_flags, model_flags
from aquila_jax.core import config as config_lib
from aquila_jax.core import errors
from aquila_jax.core.allocator import keep_freed_memory, release_freed_memory
from aquila_jax.core.experiment_config import (
  MERGING_METHODS,
  WITHOUT_MOMENTS,
  ScaleOut,
)
from aquila_jax.core.model_config import ModelConfig, MoeConfig
from aquila_jax.core.model_dir import ModelReader, open_model
from aquila_jax.growth import checking
from aquila_jax.growth.calibration import (
  Calibration,
  calibrate,
  what_needs_text,
)
from aquila_jax.growth.checking import ReadModel
from aquila_jax.growth.exactness import Check
from aquila_jax.growth.routers import Sample
from aquila_jax.growth.scale_out import Plan, plan_scale_out
from aquila_jax.growth.streaming import scaled_out_trees, stream_scale_out
from aquila_jax.models import decoder_lm

_CONFIG = config_door.define_flag(required=False)
_STAGE = model_flags.define_stage()
_SOURCE = flags.DEFINE_string("source", None, "A MODEL.", required=True)
_SOURCES = flags.DEFINE_list(
  "sources", None, "Of branch_train_mix: MODELs whose FFNs are experts as well."
)
_OUTPUT = flags.DEFINE_string("output", None, "A new MODEL.")
_NUM_EXPERTS = flags.DEFINE_integer(
  "num_experts", None, "Experts a layer; 8, or twice those of the source."
)
_TOP_K = flags.DEFINE_integer(
  "top_k",
  None,
  "Experts that a token goes to; 2, or as many more as there are more experts.",
)
_MOE_LAYERS = flags.DEFINE_string(
  "moe_layers",
  None,
  "Which get experts: all, every_second, last_half, or numbers as 1,3,5.",
)
_TARGET = flags.DEFINE_list(
  "target", [], "Other fields of the target, as mlp_dim=384."
)
_METHOD = flags.DEFINE_string("method", None, "How; sparse_upcycling.")
_REDRAW = flags.DEFINE_float(
  "redraw", None, "The share of an expert's hidden units drawn anew."
)
_REDRAW_UNITS = flags.DEFINE_string(
  "redraw_units", None, "together, or independent in gate, up and down."
)
_NOISE = flags.DEFINE_float(
  "noise", None, "Noise on the copies, in standard deviations of a kernel."
)
_NOISE_SHARE = flags.DEFINE_float(
  "noise_share", None, "The share of the entries that get noise."
)
_SHARED_SHARE = flags.DEFINE_float(
  "shared_share", None, "What a shared copy of the FFN gives of the output."
)
_GATE_CONSTANT = flags.DEFINE_string(
  "gate_constant",
  None,
  "Where gates do not sum to one: measured, or uniform gates.",
)
_SCALED_KERNELS = flags.DEFINE_string(
  "scaled_kernels", None, "Where constants go: down, or all."
)
_ROUTER = flags.DEFINE_string(
  "router", None, "Rows: normal, domains or clusters."
)
_SAMPLE = flags.DEFINE_list(
  "sample", None, "Text for what is measured: files, or domain:file of several."
)
_SAMPLE_TOKENS = flags.DEFINE_integer(
  "sample_tokens", None, "How much of it is read."
)
_OPTIMIZER = flags.DEFINE_string(
  "optimizer",
  None,
  "grow the optimizer state (as by default, where there is one), or reset.",
)
_SEED = model_flags.define_seed("Of all that is drawn.")
_CHECK = growth_flags.define_check()
_DRY_RUN = growth_flags.define_dry_run()

# Tokens of a row of --sample.
_SAMPLE_ROW = 512

# The flags of the same name as an option.
_OPTIONS = (
  _METHOD,
  _REDRAW,
  _REDRAW_UNITS,
  _NOISE,
  _NOISE_SHARE,
  _SHARED_SHARE,
  _GATE_CONSTANT,
  _SCALED_KERNELS,
  _ROUTER,
  _SAMPLE_TOKENS,
  _OPTIMIZER,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Job:
  """What is made of what."""

  sources: list[ModelReader]
  target: ModelConfig
  options: ScaleOut
  name: str  # of the stage
  path: str  # names the target, for messages


def main() -> None:
  keep_freed_memory()
  if not _DRY_RUN.value:
    growth_flags.check_output(_OUTPUT.value, _SOURCE.value)
  _CHECK.refuse_file_alone()
  job = _job()
  source = job.sources[0]
  plan = plan_scale_out(
    source.model.config, job.target, job.options, path=job.path
  )
  needs_text = bool(what_needs_text(plan.way, job.options, path=job.path))
  if _SAMPLE.value and not needs_text:
    raise errors.UserError("--sample: nothing is measured; expected none")
  for line in plan.lines():
    print(line, flush=True)
  calibration = _calibrated(job, plan, needs_text=needs_text)
  release_freed_memory()
  checked = None
  if _CHECK.wanted:
    checked = _checked(job, plan, calibration)
    release_freed_memory()
    growth_flags.say_checked(plan.exactness, checked)
  if not _DRY_RUN.value:
    _write(job, plan, calibration, checked=checked)


def _job() -> _Job:
  name, path, init, target = "", "--target", ScaleOut(source=""), None
  if _CONFIG.value:
    if any(f.value for f in (_TARGET, _NUM_EXPERTS, _TOP_K, _MOE_LAYERS)):
      raise errors.UserError(
        "--config: it has the target; expected no --target, --num_experts,"
        " --top_k and --moe_layers"
      )
    experiment = config_door.load(_CONFIG)
    name = model_flags.stage_name(experiment, _STAGE.value, kind="scale_out")
    stage = experiment.stages[name]
    path, target = f"config.stages.{name}.model", stage.model
    if isinstance(stage.init, ScaleOut):
      init = stage.init
  options = _options(init)
  source = model_flags.open_source(_SOURCE.value, optimizer=_OPTIMIZER.value)
  others = [
    open_model(path, like=decoder_lm.abstract_params, what="--sources")
    for path in options.sources
  ]
  if target is None:
    target = _target(source.model.config, options)
  return _Job(
    sources=[source, *others],
    target=target,
    options=options,
    name=name,
    path=path,
  )


def _options(init: ScaleOut) -> ScaleOut:
  """The options of a config, and over them those that flags give."""
  given: dict[str, Any] = {
    flag.name: flag.value for flag in _OPTIONS if flag.value is not None
  }
  if _SOURCES.value is not None:
    given["sources"] = tuple(_SOURCES.value)
  method = given.get("method", init.method)
  if method in WITHOUT_MOMENTS and _METHOD.value is not None:
    given.setdefault("optimizer", "reset")
  fields = config_lib.to_dict(init) | {"source": _SOURCE.value} | given
  return model_flags.build(ScaleOut, **fields)


def _target(source: ModelConfig, options: ScaleOut) -> ModelConfig:
  """The source's architecture with the experts that flags name."""
  # Of a source with a growth mask this is refused.
  fields = config_lib.to_dict(source) | {"growth_mask": None}
  old = source.moe
  if options.method in MERGING_METHODS:
    if _NUM_EXPERTS.value is not None or _TOP_K.value is not None:
      raise errors.UserError(
        f"--method={options.method}: it makes one FFN of all experts; expected"
        " no --num_experts and --top_k"
      )
    fields["moe"] = None
    if old is not None:
      fields["mlp_dim"] = source.mlp_dim + old.shared_expert_dim
    return growth_flags.changed(fields, _TARGET.value)[0]
  num_experts, top_k = _NUM_EXPERTS.value, _TOP_K.value
  moe: dict[str, Any]
  if old is None:
    moe = {"num_experts": num_experts or 8, "top_k": top_k or 2}
  else:
    num_experts = num_experts or 2 * old.num_experts
    more = max(1, num_experts // old.num_experts)
    moe = config_lib.to_dict(old) | {
      "num_experts": num_experts,
      "top_k": top_k or more * old.top_k,
      "dense_mlp_dim": None,  # see _with_kept_ffns
    }
  if _MOE_LAYERS.value is not None:
    moe["layers"] = _MOE_LAYERS.value
  fields["moe"] = moe
  try:
    # Names a flag where it is the flag's value that is wrong.
    model_flags.build(MoeConfig, **moe)
    target = growth_flags.changed(fields, _TARGET.value)[0]
  except errors.UserError as error:
    message = str(error)
    for given in ("--target.moe.layers=", "--target: moe.layers=", "--layers="):
      message = message.replace(given, "--moe_layers=")
    raise errors.UserError(message) from error
  return _with_kept_ffns(target, source)


def _with_kept_ffns(target: ModelConfig, source: ModelConfig) -> ModelConfig:
  """Where experts get another width, other layers keep that of the source."""
  moe, kept = target.moe, source.dense_mlp_dim
  if moe is None or moe.dense_mlp_dim is not None:
    return target
  if not target.is_mixed or target.mlp_dim == kept:
    return target
  moe = dataclasses.replace(moe, dense_mlp_dim=kept)
  return dataclasses.replace(target, moe=moe)


def _calibrated(job: _Job, plan: Plan, *, needs_text: bool) -> Calibration:
  source = job.sources[0]
  sample = _sample(source, job.options) if needs_text else None
  calibration = calibrate(
    plan.way,
    ReadModel(config=source.model.config, params=source.params),
    job.target,
    job.options,
    sample=sample,
    seed=_SEED.value,
    path=job.path,
  )
  for line in calibration.lines():
    print(f"  {line}", flush=True)
  return calibration


def _sample(source: ModelReader, options: ScaleOut) -> Sample:
  """Rows of the texts of --sample, as many tokens of each."""
  length = min(source.model.config.context_length, _SAMPLE_ROW)
  files = dict(_named(part) for part in _SAMPLE.value or [":"])
  share = max(2, options.sample_tokens // len(files))
  rows: list[tuple[int, list[int]]] = []
  for domain, path in enumerate(files.values()):
    text = growth_flags.read_text(path, flag="sample")
    ids = growth_flags.encode(text, source)[:share]
    if len(ids) < 2:
      raise errors.UserError(
        f"--sample={path!r}: it has {len(ids)} tokens; expected at least 2"
      )
    starts = range(0, len(ids), length)
    rows += [(domain, ids[start : start + length]) for start in starts]
  width = max(len(row) for _, row in rows)
  shape = (len(rows), width)
  tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  domains = np.zeros(shape, np.int32)
  for i, (domain, row) in enumerate(rows):
    tokens[i, : len(row)], segments[i, : len(row)] = row, 1
    domains[i] = domain
  places = np.arange(width, dtype=np.int32)
  return Sample(
    tokens=tokens,
    positions=np.broadcast_to(places, shape),
    segments=segments,
    domains=domains,
    names=tuple(files),
  )


def _named(part: str) -> tuple[str, str]:
  """A domain's name and its file: of domain:file, or of a file alone."""
  name, colon, path = part.partition(":")
  return (name, path) if colon else (part, part)


def _checked(job: _Job, plan: Plan, calibration: Calibration) -> Check:
  source = job.sources[0]
  trees = scaled_out_trees(
    job.sources, plan, job.options, calibration=calibration, seed=_SEED.value
  )
  return checking.check(
    ReadModel(config=source.model.config, params=source.params),
    ReadModel(config=job.target, params=trees["params"]),
    _CHECK.tokens(source),
  )


def _write(
  job: _Job, plan: Plan, calibration: Calibration, *, checked: Check | None
) -> None:
  output = _OUTPUT.value
  assert output is not None
  made = stream_scale_out(
    job.sources,
    output,
    plan,
    job.options,
    calibration=calibration,
    seed=_SEED.value,
    name=job.name,
    checked=checked,
    progress=model_flags.now_and_then(),
  )
  source = job.sources[0]
  with_optimizer = (
    job.options.optimizer == "grow" and source.optimizer is not None
  )
  model_flags.say_written(output, made, with_optimizer=with_optimizer)


if __name__ == "__main__":
  app.run(main)
