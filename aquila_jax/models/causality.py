"""Models whose output at a token depends on later tokens: experts that choose.

Such a model trains and can be compared with others of its kind. Its loss is too
low by what it sees of the future, and depends on what else is in the batch; a
text cannot be continued with it.
"""

from __future__ import annotations

import functools

from absl import logging

from aquila_jax.core import errors
from aquila_jax.core.model_config import ModelConfig

NOT_CAUSAL = (
  "model.moe.choice='expert' is not causal: experts choose among all tokens of"
  " a batch, later ones included"
)


def is_causal(config: ModelConfig) -> bool:
  """Whether a token's output is the same whatever comes after it."""
  return config.moe is None or config.moe.is_causal


def warn_unless_causal(config: ModelConfig, *, what: str) -> None:
  """Logs a warning, once a process for each `what`: what is measured."""
  if not is_causal(config):
    _warn(f"{what}: {NOT_CAUSAL}; losses and scores know the future")


def check_causal(config: ModelConfig) -> None:
  """Refuses to continue texts with a model that is not causal.

  Raises:
    errors.UserError: naming the field.
  """
  if not is_causal(config):
    raise errors.UserError(
      f"{NOT_CAUSAL}, and no text can be continued with it; expected 'token'"
    )


@functools.cache
def _warn(text: str) -> None:
  logging.warning("%s", text)
