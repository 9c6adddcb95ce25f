"""Worker: MaxText's own training step, on its synthetic data.

Unrolled, remat "minimal", experts by batched products with a capacity: its
fastest settings on CPU. It runs under MaxText's Python (3.12).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import tempfile
from typing import Any

from benchmarks.step_workers import protocol, shape


def _arguments(directory: str) -> list[str]:
  package: Any = importlib.import_module("maxtext")
  base = os.path.join(os.path.dirname(package.__file__), "configs", "base.yml")
  settings = dict(
    run_name="train_step_cpu",
    base_output_directory=directory,
    hardware="cpu",
    skip_jax_distributed_system=True,
    dataset_type="synthetic",
    steps=1000,
    enable_checkpointing=False,
    enable_goodput_recording=False,
    decoder_block="mixtral",
    vocab_size=shape.VOCAB_SIZE,
    base_emb_dim=shape.WIDTH,
    base_mlp_dim=shape.EXPERT_WIDTH,
    base_moe_mlp_dim=shape.EXPERT_WIDTH,
    base_num_decoder_layers=shape.LAYERS,
    base_num_query_heads=shape.HEADS,
    base_num_kv_heads=shape.KV_HEADS,
    head_dim=shape.HEAD_DIM,
    mlp_activations="['silu','linear']",
    num_experts=shape.EXPERTS,
    num_experts_per_tok=shape.TOP_K,
    capacity_factor=shape.CAPACITY_FACTOR,
    sparse_matmul=False,
    megablox=False,
    logits_via_embedding=False,
    enable_dropout=False,
    per_device_batch_size=shape.BATCH,
    max_target_length=shape.TOKENS,
    dtype="float32",
    weight_dtype="float32",
    attention="dot_product",
    scan_layers=False,
    remat_policy="minimal",
    opt_type="adamw",
    learning_rate=shape.LEARNING_RATE,
    adam_weight_decay=shape.WEIGHT_DECAY,
    gradient_clipping_threshold=shape.CLIP_NORM,
  )
  return ["", base, *(f"{key}={value}" for key, value in settings.items())]


def _start() -> tuple[protocol.Step, dict[str, Any]]:
  """As MaxText's train_loop, up to its first step."""
  jax: Any = importlib.import_module("jax")
  nnx: Any = importlib.import_module("flax.nnx")
  train: Any = importlib.import_module("maxtext.trainers.pre_train.train")
  with tempfile.TemporaryDirectory() as directory:
    config, recorder = train.initialize(_arguments(directory))
    setup = train.train_utils.setup_train_loop(config, recorder)
  _, _, state_shardings, _, mesh, _, _, loader, rampup, _, state = setup
  graph, state = nnx.split(state)
  sharding = train.sharding
  params_shardings, state_shardings = (
    sharding.maybe_update_params_sharding_with_opt(config, state_shardings)
  )
  jitted, _ = train.train_utils.jit_train_and_eval_step(
    config,
    graph,
    mesh,
    state,
    state_shardings,
    train.train_step,
    train.eval_step,
    None,
    params_shardings,
  )
  _, params, _ = nnx.split(nnx.merge(graph, state).model, nnx.Param, ...)
  parameters = sum(leaf.size for leaf in jax.tree.leaves(params))

  def step() -> float:
    nonlocal state
    batch = loader.load_next_batch(rampup_manager=rampup)
    rules = train.logical_axis_rules(config.logical_axis_rules)
    with jax.set_mesh(mesh), rules:
      state, metrics = jitted(state, batch)
    return float(metrics["scalar"]["learning/loss"])

  versions = {
    name: importlib.metadata.version(name) for name in ("maxtext", "jax")
  }
  return step, dict(parameters=parameters, versions=versions)


if __name__ == "__main__":
  protocol.serve({"mixtral": _start})
