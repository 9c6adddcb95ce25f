"""Loss, perplexity and bits per byte on held-out documents, by language."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from aquila_jax.core import errors, processes
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.types import Batch, Params
from aquila_jax.data import loader
from aquila_jax.data.prepared import PreparedData
from aquila_jax.evaluation.scores import LanguageScore, Scores
from aquila_jax.generation.decoding import inference_config
from aquila_jax.models import decoder_lm
from aquila_jax.models.causality import warn_unless_causal
from aquila_jax.models.chosen_experts import chosen_experts
from aquila_jax.models.target_nats import target_nats
from aquila_jax.sharding.rules import param_shardings

_experts = functools.partial(jax.jit, static_argnames="config")(chosen_experts)


class Evaluator:
  """Measures parameters of one architecture again and again.

  The batches are read once and kept; the program is compiled once. A mixture
  of experts runs dropless, whatever capacity it trains with, so that the batch
  size changes nothing.

  Args:
    config: of the model.
    data: prepared text.
    split: "validation" or "test".
    batch_size: rows at a time.
    sequence_length: T.
    max_tokens: of a language; 0 is the whole split.
    sharding: where the rows of a batch lie; None leaves it to JAX. Its mesh
      must divide the model as sharding/rules.py says.
  """

  def __init__(
    self,
    config: ModelConfig,
    *,
    data: PreparedData,
    split: Literal["validation", "test"],
    batch_size: int,
    sequence_length: int,
    max_tokens: int = 0,
    sharding: NamedSharding | None = None,
  ):
    warn_unless_causal(config, what="perplexity")
    self._config = inference_config(config)
    self._split = split
    self._token_bytes = np.asarray(data.token_bytes, np.int64)
    self._sharding = sharding
    self._batches: dict[str, list[Batch]] = {}
    for language in data.languages:
      batches = loader.evaluation_batches(
        data,
        split=split,
        language=language,
        batch_size=batch_size,
        sequence_length=sequence_length,
        max_tokens=max_tokens,
      )
      kept = [batch for batch in batches if np.any(batch.weights > 0)]
      if kept:
        self._batches[language] = kept
      else:
        logging.warning("the %s split has no %s text", split, language)
    if not self._batches:
      raise errors.UserError(
        f"the {split} split has no text; raise data.{split}_share or give more"
        " documents"
      )

  def scores(
    self, params: Params, *, mask_value: float | None = None
  ) -> Scores:
    """The score of every language that the split has.

    Args:
      params: of the model.
      mask_value: in place of the config's `growth_mask.value`; another one
        compiles nothing.

    Returns:
      The scores.
    """
    params = self._spread(params)
    return Scores(
      split=self._split,
      languages={
        language: self._score(params, batches, mask_value)
        for language, batches in self._batches.items()
      },
    )

  def __call__(
    self, params: Params, *, mask_value: float | None = None
  ) -> dict[str, float]:
    """The numbers of a validation row: `loss`, `loss_LANG` and others."""
    scores = self.scores(params, mask_value=mask_value)
    row = {
      "loss": scores.overall.loss,
      "bits_per_byte": scores.overall.bits_per_byte,
    }
    for language, score in scores.languages.items():
      row[f"loss_{language}"] = score.loss
      row[f"bits_per_byte_{language}"] = score.bits_per_byte
    return row | {"validation_tokens": float(scores.overall.tokens)}

  def route(
    self, params: Params, *, mask_value: float | None = None
  ) -> Int[np.ndarray, "L B T A"]:
    """Where a mixture sends the tokens of the first batch of every language.

    Args:
      params: of the model.
      mask_value: as of `scores`.

    Returns:
      As `chosen_experts`, the rows of all languages behind each other.
    """
    found = []
    for batches in self._batches.values():
      batch = self._placed(batches[0])
      with self._on_mesh():
        experts, _ = _experts(
          self._config, params, batch, mask_value=mask_value
        )
      found.append(processes.fetch(experts))
    return np.concatenate(found, axis=1)

  def _score(
    self, params: Params, batches: Sequence[Batch], mask_value: float | None
  ) -> LanguageScore:
    # Sums in float64 on the host: their order then does not show.
    nats, tokens, num_bytes = 0.0, 0, 0
    for batch in batches:
      values = processes.fetch(self._run(params, batch, mask_value))
      counted = np.asarray(batch.weights) > 0
      nats += float(np.sum(values, dtype=np.float64))
      tokens += int(np.sum(counted))
      targets = np.asarray(batch.targets)[counted]
      num_bytes += int(np.sum(self._token_bytes[targets]))
    return LanguageScore(nats=nats, tokens=tokens, bytes=num_bytes)

  def _run(
    self, params: Params, batch: Batch, mask_value: float | None
  ) -> Float[Array, "B T"]:
    batch = self._placed(batch)
    with self._on_mesh():
      return target_nats(self._config, params, batch, mask_value)

  def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
    """For what the compiler cannot divide, as in a training step."""
    if self._sharding is None:
      return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(self._sharding.mesh.abstract_mesh)

  def _spread(self, params: Params) -> Params:
    """Parameters that each of several processes has, where they belong."""
    if self._sharding is None or not processes.are_several():
      return params
    mesh = self._sharding.mesh
    assert isinstance(mesh, Mesh)
    axes = decoder_lm.parameter_axes(self._config)
    shardings = param_shardings(axes, params, mesh)
    return processes.place(params, shardings)

  def _placed(self, batch: Batch) -> Batch:
    if self._sharding is None:
      return batch
    return processes.place(batch, jax.tree.map(lambda _: self._sharding, batch))


def evaluate(
  config: ModelConfig,
  params: Params,
  *,
  data: PreparedData,
  split: Literal["validation", "test"],
  sequence_length: int,
  batch_size: int = 16,
  max_tokens: int = 0,
) -> Scores:
  """Measures parameters once; see `Evaluator`.

  Args:
    config: of the model.
    params: of the model.
    data: prepared text.
    split: "validation" or "test".
    sequence_length: T; documents are cut into rows of it.
    batch_size: rows at a time; changes nothing but memory and speed.
    max_tokens: of a language; 0 is the whole split.

  Returns:
    The scores.

  Raises:
    errors.UserError: where the split has no text at all.
  """
  evaluator = Evaluator(
    config,
    data=data,
    split=split,
    batch_size=batch_size,
    sequence_length=sequence_length,
    max_tokens=max_tokens,
  )
  return evaluator.scores(params)
