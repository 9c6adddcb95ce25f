"""Claim: what share of a GPU's matmul rate a training step gets.

  python -m benchmarks.train_step_gpu --output=benchmarks/results/NAME.json

Steps of AdamW on random tokens, bfloat16 compute on float32 parameters: a dense
decoder, and 8 experts of the same FFN of which a token meets two, with every
backend of kernels/expert_ffn. Model FLOPs (planning/counting.py) a second, over
the rate of a bfloat16 matmul measured in the same run.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any
from unittest import mock

from absl import app, flags

from aquila_jax.core.experiment_config import (
  OptimizerConfig,
  TrainConfig,
)
from aquila_jax.core.model_config import ModelConfig, MoeConfig
from aquila_jax.kernels.expert_ffn import api
from aquila_jax.planning import counting
from benchmarks import gpu_clock
from benchmarks.training_step import compiled_step

_OUTPUT = flags.DEFINE_string("output", None, "A JSON file to write.")
_SMALL = flags.DEFINE_bool("small", False, "Tiny shapes: does it run?")

_DENSE = ModelConfig(
  vocab_size=32768,
  num_layers=4,
  embed_dim=2048,
  mlp_dim=5632,
  num_heads=16,
  num_kv_heads=4,
  head_dim=128,
  context_length=2048,
  compute_dtype="bfloat16",
)
_TINY = ModelConfig(
  vocab_size=512,
  num_layers=2,
  embed_dim=64,
  mlp_dim=96,
  num_heads=4,
  num_kv_heads=2,
  head_dim=16,
  context_length=64,
  compute_dtype="bfloat16",
)
_MOE = MoeConfig(num_experts=8, top_k=2, block_size=128)
_STEPS = 10
Row = dict[str, Any]


def _cases(dense: ModelConfig) -> list[tuple[str, ModelConfig, str]]:
  def mixture(**fields) -> ModelConfig:
    return dataclasses.replace(dense, moe=dataclasses.replace(_MOE, **fields))

  return [
    ("dense", dense, "xla"),
    ("dropless", mixture(), "pallas_gpu"),
    ("dropless", mixture(), "ragged_dot"),
    ("dropless", mixture(), "xla"),
    ("capacity 1.25", mixture(capacity_factor=1.25), "xla"),
  ]


def _measure(model: ModelConfig, config: TrainConfig) -> Row:
  started = time.perf_counter()
  step = compiled_step(model, config)
  state = step.state
  metrics: Any
  state, metrics = step.call(state, step.batch)
  first = last = float(metrics.loss)
  compile_s = time.perf_counter() - started
  times = []
  for _ in range(3):
    started = time.perf_counter()
    for _ in range(_STEPS):
      state, metrics = step.call(state, step.batch)
    last = float(metrics.loss)
    times.append((time.perf_counter() - started) / _STEPS)
  step_s = sorted(times)[1]
  tokens = config.tokens_per_step
  flops = tokens * counting.train_flops_per_token(
    model, sequence_length=config.sequence_length
  )
  return dict(
    parameters=counting.count(model).total.parameters,
    step_ms=1e3 * step_s,
    tokens_per_s=tokens / step_s,
    flops_per_s=flops / step_s,
    temporaries_gib=gpu_clock.temporaries(step.call),
    compile_s=compile_s,
    loss_first=first,
    loss_last=last,
  )


def main(argv: list[str]) -> None:
  """Measures, prints the table and writes the JSON."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")

  def say(line: str) -> None:
    print(line, flush=True)

  dense = _TINY if _SMALL.value else _DENSE
  config = TrainConfig(
    steps=1000,
    batch_size=8,
    sequence_length=dense.context_length,
    optimizer=OptimizerConfig(learning_rate=1e-4, schedule="constant"),
  )
  ceiling = gpu_clock.matmul_flops()
  say(f"matmul {ceiling / 1e12:.0f} TFLOP/s")
  results = []
  for name, model, backend in _cases(dense):
    with mock.patch.object(api, "platform_default", return_value=backend):
      try:
        row = _measure(model, config)
      except Exception as problem:  # out of memory is a result too
        say(f"{name} {backend}: {str(problem)[:400]}")
        results.append(dict(case=name, implementation=backend, failed=True))
        continue
    row |= dict(
      case=name,
      implementation=backend,
      of_matmul=row["flops_per_s"] / ceiling,
    )
    say(
      f"{name:<15}{backend:<12}{row['step_ms']:>9.1f} ms"
      f"{row['tokens_per_s']:>10,.0f} tokens/s{row['of_matmul']:>8.1%}"
      f"{row['temporaries_gib']:>8.2f} GiB  compiled {row['compile_s']:.0f} s"
      f"  loss {row['loss_first']:.3f} -> {row['loss_last']:.3f}"
    )
    results.append(row)
  gpu_clock.write_report(
    _OUTPUT.value,
    benchmark="train_step_gpu",
    model=dataclasses.asdict(dense),
    batch=[config.batch_size, config.sequence_length],
    matmul_flops_per_s=ceiling,
    results=results,
  )


if __name__ == "__main__":
  app.run(main)
