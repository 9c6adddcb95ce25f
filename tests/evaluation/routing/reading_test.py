"""Counts of a model's own pass, against loops over layers and tokens."""

from __future__ import annotations

import collections
from typing import Any

import jax
import numpy as np
import pytest

from aquila_jax.core import errors
from aquila_jax.evaluation.routing import reading
from aquila_jax.generation.decoding import inference_config
from aquila_jax.models import decoder_lm
from aquila_jax.models.decoder_lm import DecoderLM
from tests.evaluation import tiny
from tests.evaluation.routing import tiny_moe
from tests.growth.tiny import params as random_params

CONFIGS = {
  "token choice": tiny_moe.CONFIG,
  "mixed stack": tiny_moe.with_moe(layers=(1,)),
  "expert choice": tiny_moe.with_moe(
    choice="expert",
    router_order="sigmoid",
    renormalise=False,
    capacity_factor=None,
  ),
}


def _routes(config, params):
  """Of a batch the routing, and by layer the experts of every token.

  Those of a mixed stack are of a decoder whose layers stand in a list, each
  under its number.
  """
  if not config.is_mixed:

    def scanned(batch) -> Any:
      ids, routing = reading._routes(config, params, batch)
      return routing, dict(zip(config.moe_layers, ids, strict=True))

    return scanned
  listed = decoder_lm.list_layers(params, config)

  @jax.jit
  def run(batch) -> Any:
    out: Any
    out, variables = DecoderLM(config, listed=True).apply(
      {"params": listed},
      batch.tokens,
      positions=batch.positions,
      segments=batch.segments,
      mutable=["intermediates"],
    )
    captured: Any = variables["intermediates"]
    return out.routing, {
      layer: captured[f"layer_{layer}"]["mlp"]["experts"][0]
      for layer in config.moe_layers
    }

  return run


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_are_those_of_plain_loops(name):
  config = CONFIGS[name]
  params = random_params(config, seed=1)
  batches = tiny_moe.batches()
  said = []
  counts = reading.read(config, params, batches, num_domains=2, say=said.append)
  run = _routes(inference_config(config), params)
  occurrences, domain_tokens = collections.Counter(), collections.Counter()
  load, together, met = (collections.Counter() for _ in range(3))
  sums: Any = collections.Counter()
  for batch in batches:
    routing, experts = run(batch)
    real = np.argwhere(np.asarray(batch.segments) > 0)
    for b, t in real:
      occurrences[int(batch.tokens[b, t])] += 1
      domain_tokens[int(batch.languages[b, t])] += 1
    for row, layer in enumerate(config.moe_layers):
      ids = np.asarray(experts[layer])
      for b, t in real:
        chosen = [int(e) for e in ids[b, t] if e >= 0]
        for e in chosen:
          load[row, int(batch.languages[b, t]), e] += 1
          met[row, int(batch.tokens[b, t]), e] += 1
          for other in chosen:
            together[row, e, other] += 1
      for field in ("entropy", "top_gate", "z_loss", "dropped"):
        value = float(getattr(routing, field)[row])
        sums[field, row] += value * len(real)
      over = np.maximum(np.asarray(routing.load[row]) - 1 / 4, 0).sum()
      sums["over", row] += float(over) * len(real)
  assert said[-1] == "read 17 tokens" and counts.num_tokens == 17
  assert counts.layers == config.moe_layers
  assert dict(enumerate(counts.occurrences)) == {
    token: occurrences[token] for token in range(11)
  }
  assert counts.domain_tokens.tolist() == [domain_tokens[0], domain_tokens[1]]
  for row in range(len(config.moe_layers)):
    entries = zip(*counts.token_experts[row].entries(), strict=True)
    assert {(t, e): n for t, e, n in entries} == {
      (t, e): n for (r, t, e), n in met.items() if r == row
    }
    for e in range(4):
      for k in range(2):
        assert counts.load[row, k, e] == load[row, k, e]
      for other in range(4):
        assert counts.together[row, e, other] == together[row, e, other]
    for field in ("entropy", "top_gate", "z_loss", "dropped"):
      # Means of 17 float32 values, by two programs.
      expected = sums[field, row] / 17
      assert counts.mean(field)[row] == pytest.approx(expected, rel=1e-5)
  if name != "expert choice":
    expected = [sums["over", row] / 17 for row in range(len(counts.layers))]
    np.testing.assert_allclose(counts.mean("over"), expected, rtol=1e-5)
    assert counts.load.sum() == 2 * 17 * len(config.moe_layers)


def test_batches_are_those_of_the_evaluation():
  data = tiny.prepared(tiny.TEXTS)
  found = list(
    reading.batches(
      data,
      split="test",
      languages=["zh"],
      batch_size=2,
      sequence_length=8,
      max_tokens=12,
    )
  )
  read = sum(int((batch.segments > 0).sum()) for batch in found)
  assert read == 12
  assert {int(n) for batch in found for n in np.ravel(batch.languages)} == {1}


def test_a_language_without_text_is_refused():
  data = tiny.prepared({"en": ["a"], "zh": []})
  batches = reading.batches(
    data,
    split="test",
    languages=["en", "zh"],
    batch_size=1,
    sequence_length=8,
    max_tokens=0,
  )
  with pytest.raises(errors.UserError) as caught:
    list(batches)
  assert str(caught.value) == (
    "the test split has no zh text; choose another split, or languages that it"
    " has"
  )
