r"""Turns every FFN of a dense MODEL into experts.

  python -m aquila_jax.cli.scale_out \
    --source=MODEL --output=MODEL --num_experts=8 --top_k=2

Every expert is a copy of the FFN; the router is drawn afresh. With --moe_layers
the other layers keep their FFN.
"""

from __future__ import annotations

import dataclasses

from absl import flags

from aquila_jax.cli import app, model_flags
from aquila_jax.core import errors
from aquila_jax.core.allocator import keep_freed_memory
from aquila_jax.core.experiment_config import ScaleOut
from aquila_jax.core.model_config import ModelConfig, MoeConfig
from aquila_jax.growth.streaming import stream_scale_out

_SOURCE = flags.DEFINE_string("source", None, "A dense MODEL.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "A new MODEL.", required=True)
_NUM_EXPERTS = flags.DEFINE_integer("num_experts", 8, "Experts a layer.")
_TOP_K = flags.DEFINE_integer("top_k", 2, "Experts that a token goes to.")
_MOE_LAYERS = flags.DEFINE_string(
  "moe_layers",
  "all",
  "Which get experts: all, every_second, last_half, or numbers as 1,3,5.",
)
_METHOD = flags.DEFINE_string("method", "sparse_upcycling", "How.")
_OPTIMIZER = flags.DEFINE_string(
  "optimizer",
  None,
  "grow the optimizer state (as by default, where there is one), or reset.",
)
_SEED = model_flags.define_seed("Of the router.")


def main() -> None:
  keep_freed_memory()
  options = model_flags.build(
    ScaleOut,
    source=_SOURCE.value,
    method=_METHOD.value,
    optimizer=_OPTIMIZER.value or "grow",
  )
  moe = _experts()
  model_flags.check_output(_OUTPUT.value)
  source = model_flags.open_source(_SOURCE.value, optimizer=_OPTIMIZER.value)
  grown = stream_scale_out(
    source,
    _OUTPUT.value,
    _target(source.model.config, moe),
    options,
    seed=_SEED.value,
    progress=model_flags.now_and_then(),
  )
  with_optimizer = options.optimizer == "grow" and source.optimizer is not None
  model_flags.say_written(_OUTPUT.value, grown, with_optimizer=with_optimizer)


def _experts() -> MoeConfig:
  """The mixture of the flags.

  Raises:
    errors.UserError: naming the flag.
  """
  try:
    return model_flags.build(
      MoeConfig,
      num_experts=_NUM_EXPERTS.value,
      top_k=_TOP_K.value,
      layers=_MOE_LAYERS.value,
    )
  except errors.UserError as error:
    message = str(error).replace("--layers=", "--moe_layers=")
    raise errors.UserError(message) from error


def _target(source: ModelConfig, moe: MoeConfig) -> ModelConfig:
  """The source's architecture with experts.

  Raises:
    errors.UserError: where it has not all of --moe_layers.
  """
  try:
    # Of a source with a growth mask this is refused later.
    return dataclasses.replace(source, moe=moe, growth_mask=None)
  except ValueError as error:
    message = str(error).replace("moe.layers=", "--moe_layers=")
    raise errors.UserError(message) from error


if __name__ == "__main__":
  app.run(main)
