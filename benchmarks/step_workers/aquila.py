"""Worker: our training step."""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
from typing import Any

import jax

from aquila_jax.core.allocator import keep_freed_memory
from aquila_jax.core.experiment_config import OptimizerConfig, TrainConfig
from aquila_jax.core.model_config import ModelConfig, MoeConfig
from benchmarks.step_workers import protocol, shape
from benchmarks.training_step import compiled_step


def model(case: str) -> ModelConfig:
  """The architecture of a case: dense, dropless or capacity."""
  moe = None
  if case != "dense":
    moe = MoeConfig(
      num_experts=shape.EXPERTS,
      top_k=shape.TOP_K,
      capacity_factor=shape.CAPACITY_FACTOR if case == "capacity" else None,
    )
  return ModelConfig(
    vocab_size=shape.VOCAB_SIZE,
    num_layers=shape.LAYERS,
    embed_dim=shape.WIDTH,
    mlp_dim=shape.DENSE_WIDTH if moe is None else shape.EXPERT_WIDTH,
    num_heads=shape.HEADS,
    num_kv_heads=shape.KV_HEADS,
    head_dim=shape.HEAD_DIM,
    context_length=shape.TOKENS,
    qkv_bias=False,
    compute_dtype="float32",
    # What suits a few layers on CPU; parameters lie the same.
    scan_layers=False,
    moe=moe,
  )


def train_config() -> TrainConfig:
  """Batch and optimizer."""
  return TrainConfig(
    steps=1000,
    batch_size=shape.BATCH,
    sequence_length=shape.TOKENS,
    optimizer=OptimizerConfig(
      learning_rate=shape.LEARNING_RATE,
      schedule="constant",
      beta1=shape.BETAS[0],
      beta2=shape.BETAS[1],
      epsilon=shape.EPSILON,
      weight_decay=shape.WEIGHT_DECAY,
      clip_norm=shape.CLIP_NORM,
    ),
  )


def _start(case: str) -> tuple[protocol.Step, dict[str, Any]]:
  built = compiled_step(model(case), train_config())
  state = built.state
  parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))

  def step() -> float:
    nonlocal state
    state, metrics = built.call(state, built.batch)
    return float(metrics.loss)

  versions = {
    name: importlib.metadata.version(name) for name in ("jax", "jaxlib")
  }
  return step, dict(
    parameters=parameters, versions=versions, compile_s=built.compile_s
  )


def main() -> None:
  """Serves dense, dropless and capacity."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--keep_freed_memory", action="store_true")
  if parser.parse_args().keep_freed_memory:
    assert keep_freed_memory(), "no such allocator here"
  jax.config.update("jax_platforms", "cpu")
  names = ("dense", "dropless", "capacity")
  protocol.serve({name: functools.partial(_start, name) for name in names})


if __name__ == "__main__":
  main()
