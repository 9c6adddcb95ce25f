"""Which experts every token of a batch goes to, in every layer with experts."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.types import Batch, Params
from aquila_jax.models import layer_runs
from aquila_jax.models.decoder_lm import DecoderLM


def chosen_experts(
  config: ModelConfig,
  params: Params,
  batch: Batch,
  *,
  mask_value: Float[Array, ""] | float | None = None,
) -> Int[Array, "L B T A"]:
  """The experts by the model's own forward pass; for use inside `jax.jit`.

  Args:
    config: of a mixture.
    params: of the model.
    batch: rows of text.
    mask_value: of a growth mask.

  Returns:
    Ids, -1 for none; L counts the layers with experts. Where experts choose
    tokens, A is E.
  """
  _, variables = DecoderLM(config).apply(
    {"params": params},
    batch.tokens,
    positions=batch.positions,
    segments=batch.segments,
    mask_value=mask_value,
    # Nothing of the head is looked at, and XLA leaves it out.
    last_only=True,
    mutable=["intermediates"],
  )
  captured: Any = variables["intermediates"]
  return of_captured(captured["layers"], config)


def of_captured(layers: Any, config: ModelConfig) -> Int[Array, "L B T A"]:
  """The experts out of what `DecoderLM.apply` captured of its layers.

  Args:
    layers: the intermediates under `layers`, of a scanned decoder.
    config: of the decoder.

  Returns:
    As `chosen_experts`.
  """
  if not config.is_mixed:
    return layers[layer_runs.EXPERTS]["experts"][0]
  found = []
  kinds = tuple(i in config.moe_layers for i in range(config.num_layers))
  for r, run in enumerate(layer_runs.find_runs(kinds)):
    blocks = [
      layers[layer_runs.run_name(r)][layer_runs.block_name(i)]
      for i, has_experts in enumerate(run.kinds)
      if has_experts
    ]
    if blocks:
      ids = [block[layer_runs.EXPERTS]["experts"][0] for block in blocks]
      stacked = jnp.stack(ids, axis=1)  # (repeats, layers of a block, ...)
      found.append(stacked.reshape(-1, *stacked.shape[2:]))
  return jnp.concatenate(found)
