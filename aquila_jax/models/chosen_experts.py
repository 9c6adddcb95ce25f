"""Which experts every token of a batch goes to, in every layer with experts."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float, Int

from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.types import Batch, Params, RoutingStats
from aquila_jax.models import layer_runs
from aquila_jax.models.decoder_lm import DecoderLM
from aquila_jax.models.mixed_layers import stack_captured


def chosen_experts(
  config: ModelConfig,
  params: Params,
  batch: Batch,
  *,
  mask_value: Float[Array, ""] | float | None = None,
) -> tuple[Int[Array, "L B T A"], RoutingStats]:
  """The experts by the model's own forward pass; for use inside `jax.jit`.

  Args:
    config: of a mixture.
    params: of the model.
    batch: rows of text.
    mask_value: of a growth mask.

  Returns:
    Ids, -1 for none, and the statistics; L counts the layers with experts.
    Where experts choose tokens, A is E.
  """
  out: Any
  out, variables = DecoderLM(config).apply(
    {"params": params},
    batch.tokens,
    positions=batch.positions,
    segments=batch.segments,
    mask_value=mask_value,
    # Nobody asks for logits, and the compiler leaves the LM head out.
    last_only=True,
    mutable=["intermediates"],
  )
  captured: Any = variables["intermediates"]
  layers = stack_captured(captured["layers"], config)
  return layers[layer_runs.EXPERTS]["experts"][0], out.routing
