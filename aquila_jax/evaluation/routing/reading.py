"""Reads a text with a mixture, and counts where its tokens go."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np

from aquila_jax.core import errors
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.types import Batch, Params
from aquila_jax.data import loader
from aquila_jax.data.prepared import PreparedData, Split
from aquila_jax.evaluation.routing.counts import RoutingCounts
from aquila_jax.generation.decoding import inference_config
from aquila_jax.models.chosen_experts import chosen_experts

Say = Callable[[str], None]


_routes = functools.partial(jax.jit, static_argnames="config")(chosen_experts)


def read(
  config: ModelConfig,
  params: Params,
  batches: Iterable[Batch],
  *,
  num_domains: int,
  say: Say = lambda line: None,
) -> RoutingCounts:
  """Runs the model over batches, dropless as evaluation does.

  Args:
    config: of a model with experts.
    params: of the model.
    batches: of one shape, or each shape is compiled.
    num_domains: K; `languages` of a batch are below it.
    say: told how many tokens have been read, after every batch.

  Returns:
    The counts.
  """
  moe = config.moe
  assert moe is not None
  counts = RoutingCounts(
    config.moe_layers,
    num_experts=moe.num_experts,
    num_domains=num_domains,
    vocab_size=config.vocab_size,
    capacity_factor=moe.capacity_factor,
  )
  for batch in batches:
    found = _routes(inference_config(config), params, batch)
    ids, stats = jax.device_get(found)
    counts.add(batch, np.asarray(ids), stats)
    say(f"read {counts.num_tokens:,} tokens")
  return counts


def batches(
  data: PreparedData,
  *,
  split: Split,
  languages: Sequence[str],
  batch_size: int,
  sequence_length: int,
  max_tokens: int,
) -> Iterable[Batch]:
  """The batches of an evaluation, language by language.

  Args:
    data: prepared text.
    split: which.
    languages: of `data.languages`.
    batch_size: rows at a time.
    sequence_length: T.
    max_tokens: of a language; 0 is the whole split.

  Yields:
    Batches with at least one token that is no padding.

  Raises:
    errors.UserError: where a language has no text in the split.
  """
  for language in languages:
    found = False
    for batch in loader.evaluation_batches(
      data,
      split=split,
      language=language,
      batch_size=batch_size,
      sequence_length=sequence_length,
      max_tokens=max_tokens,
    ):
      if np.any(batch.segments > 0):
        found = True
        yield batch
    if not found:
      raise errors.UserError(
        f"the {split} split has no {language} text; choose another split, or"
        " languages that it has"
      )
