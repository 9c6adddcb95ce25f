"""Worker: a training step of transformers, in torch.

Mixtral with grouped_mm experts and Llama, with transformers' default attention
(sdpa), torch's fused AdamW and its clipping. No router losses, which
transformers leaves out by default and which cost little.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
from typing import Any

from benchmarks.step_workers import protocol, shape


def _model(case: str) -> Any:
  transformers: Any = importlib.import_module("transformers")
  sizes = dict(
    vocab_size=shape.VOCAB_SIZE,
    hidden_size=shape.WIDTH,
    num_hidden_layers=shape.LAYERS,
    num_attention_heads=shape.HEADS,
    num_key_value_heads=shape.KV_HEADS,
    head_dim=shape.HEAD_DIM,
    max_position_embeddings=shape.TOKENS,
    tie_word_embeddings=False,
    use_cache=False,
  )
  auto = transformers.AutoModelForCausalLM
  if case == "dense":
    return auto.from_config(
      transformers.LlamaConfig(intermediate_size=shape.DENSE_WIDTH, **sizes)
    )
  config = transformers.MixtralConfig(
    intermediate_size=shape.EXPERT_WIDTH,
    num_local_experts=shape.EXPERTS,
    num_experts_per_tok=shape.TOP_K,
    **sizes,
  )
  return auto.from_config(config, experts_implementation="grouped_mm")


def _start(case: str, *, threads: int) -> tuple[protocol.Step, dict[str, Any]]:
  torch: Any = importlib.import_module("torch")
  torch.set_num_threads(threads)
  torch.manual_seed(0)
  model = _model(case).train()
  optimizer = torch.optim.AdamW(
    model.parameters(),
    lr=shape.LEARNING_RATE,
    betas=shape.BETAS,
    eps=shape.EPSILON,
    weight_decay=shape.WEIGHT_DECAY,
    fused=True,
  )
  # The labels are shifted by the model.
  tokens = torch.randint(shape.VOCAB_SIZE, (shape.BATCH, shape.TOKENS))

  def step() -> float:
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), shape.CLIP_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())

  return step, dict(
    parameters=sum(p.numel() for p in model.parameters()),
    threads=threads,
    versions={
      name: importlib.metadata.version(name)
      for name in ("torch", "transformers")
    },
  )


def main() -> None:
  """Serves dense (Llama) and mixtral."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--threads", type=int, required=True)
  threads = parser.parse_args().threads
  protocol.serve(
    {
      name: functools.partial(_start, name, threads=threads)
      for name in ("dense", "mixtral")
    }
  )


if __name__ == "__main__":
  main()
