"""Claim: right after upcycling, an expert's squared gradient is nu / (A E).

  python -m benchmarks.upcycled_moments --model=MODEL --data=DATA

growth/upcycled_tree.py divides Adam's second moments of an FFN by A E. This
takes the gradients of a dense MODEL and of its upcycling on the same batches,
and compares their mean squares; nu / E^2 would be right if the gradients of all
batches were the same. The MODEL and the data of a finished `make quickstart`
will do.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from aquila_jax.core.experiment_config import LossConfig, ScaleOut
from aquila_jax.core.model_config import ModelConfig, MoeConfig
from aquila_jax.core.model_dir import load_model
from aquila_jax.core.types import Batch, Params
from aquila_jax.data import loader
from aquila_jax.data.prepared import PreparedData
from aquila_jax.growth.scale_out import scale_out
from aquila_jax.models import decoder_lm
from aquila_jax.training import losses

_MODEL = flags.DEFINE_string("model", None, "A dense MODEL.", required=True)
_DATA = flags.DEFINE_string("data", None, "Prepared data.", required=True)
_BATCHES = flags.DEFINE_integer("batches", 60, "How many.", 2)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Rows a batch.", 1)
_NUM_EXPERTS = flags.DEFINE_integer("num_experts", 8, "E.", 2)
_TOP_K = flags.DEFINE_integer("top_k", 2, "A.", 1)
_OUTPUT = flags.DEFINE_string("output", None, "A JSON file to write.")


def _ffn_gradient(config: ModelConfig, num_languages: int):
  """The gradient of the cross-entropy for the leaves of the FFNs."""
  decoder = decoder_lm.DecoderLM(config)

  @jax.jit
  def gradient(params: Params, batch: Batch) -> Params:
    def loss(params):
      out: Any = decoder.apply(
        {"params": params},
        batch.tokens,
        positions=batch.positions,
        segments=batch.segments,
      )
      return losses.loss_terms(
        out.logits,
        None,
        batch=batch,
        totals=losses.batch_totals(batch),
        config=LossConfig(),
        num_languages=num_languages,
      ).total

    return jax.grad(loss)(params)["layers"]["mlp"]

  return gradient


def _measure() -> dict[str, dict[str, float]]:
  """For each leaf: mean squares of an expert's gradient over the dense's."""
  source = load_model(
    _MODEL.value, like=decoder_lm.abstract_params, what="--model"
  )
  moe = MoeConfig(num_experts=_NUM_EXPERTS.value, top_k=_TOP_K.value)
  target = dataclasses.replace(source.config, moe=moe)
  upcycled = scale_out(source, target, ScaleOut(source=_MODEL.value))
  data = PreparedData.open(_DATA.value, what="--data")
  batches = loader.train_batches(
    data,
    state=loader.DataState.start(data),
    batch_size=_BATCH_SIZE.value,
    sequence_length=source.config.context_length,
    seed=0,
  )
  of_dense = _ffn_gradient(source.config, len(data.languages))
  of_mixture = _ffn_gradient(target, len(data.languages))
  sums: dict[str, Any] = {}
  for _ in range(_BATCHES.value):
    batch = jax.tree.map(jnp.asarray, next(batches)[0])
    dense, mixture = (
      jax.device_get(of_dense(source.params, batch)),
      jax.device_get(of_mixture(upcycled.params, batch)),
    )
    for name, leaf in dense.items():
      found = sums.setdefault(name, [0.0, 0.0, np.zeros(leaf.shape)])
      found[0] += float(np.sum(np.square(leaf)))
      found[1] += float(np.sum(np.square(mixture[name]))) / moe.num_experts
      found[2] += leaf
  count = _BATCHES.value
  return {
    name: {
      "measured": square_expert / square_dense,
      "share of the mean": float(np.sum(np.square(total / count)))
      * count
      / square_dense,
    }
    for name, (square_dense, square_expert, total) in sums.items()
  }


def main(argv: list[str]) -> None:
  del argv
  measured = _measure()
  num_experts, top_k = _NUM_EXPERTS.value, _TOP_K.value
  rules = {"1/(A E)": 1 / (top_k * num_experts), "1/E^2": 1 / num_experts**2}
  print(
    "E[g_expert^2] / E[g_dense^2], and the share of (E g)^2 in E[g_dense^2]"
  )
  for name, row in measured.items():
    print(f"{name:12} {row['measured']:.4f}  {row['share of the mean']:.3f}")
  print(", ".join(f"{name} = {value:.4f}" for name, value in rules.items()))
  if _OUTPUT.value:
    report = {
      "date": datetime.date.today().isoformat(),
      "jax": jax.__version__,
      "num_experts": num_experts,
      "top_k": top_k,
      "batches": _BATCHES.value,
      "batch_size": _BATCH_SIZE.value,
      "leaves": measured,
      "rules": rules,
    }
    text = json.dumps(report, indent=2) + "\n"
    pathlib.Path(_OUTPUT.value).write_text(text, encoding="utf-8")


if __name__ == "__main__":
  app.run(main)
