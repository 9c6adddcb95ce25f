"""Claim: on CPU a text comes faster than from transformers.

  python -m benchmarks.generation_cpu --output=benchmarks/results/NAME.json

Greedy decoding in float32 by `generate_tokens` and by transformers' own
`generate`, with the same weights, prompts and number of threads, in turns in
one process: whatever else the machine does slows both. Without --model the
weights are random, in the shapes of SmolLM2-135M.

A rate is that of decoding alone: the time for all new tokens less that for one,
which is the prefill. transformers runs with its default cache and with its
static one; the ratio is to the faster. Beside them stand what the machine can
do, measured in the same round: a large matmul, and reading memory. A step of
one row reads every weight once, so that the second bounds it.

It needs torch and transformers.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from aquila_jax.core import errors
from aquila_jax.core.lineage import Lineage
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.model_dir import StoredModel, load_model, save_model
from aquila_jax.generation.sampling import Sampling
from aquila_jax.generation.tokens import generate_tokens
from aquila_jax.interop.export_model import export_model
from aquila_jax.models import decoder_lm
from benchmarks.machine import device

_MODEL = flags.DEFINE_string("model", None, "A MODEL; random without it.")
_BATCH_SIZES: Any = flags.DEFINE_list("batch_sizes", ["1", "8"], "Of a call.")
_PROMPT_TOKENS: Any = flags.DEFINE_integer("prompt_tokens", 32, "Each.", 1)
_NEW_TOKENS: Any = flags.DEFINE_integer("new_tokens", 128, "Each.", 2)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Measurements of everything.", 1)
_THREADS: Any = flags.DEFINE_integer(
  "threads", os.cpu_count(), "Of torch; JAX takes all cores.", 1
)
_STATIC: Any = flags.DEFINE_bool(
  "static", True, "Also transformers with its static cache."
)
_OUTPUT = flags.DEFINE_string("output", None, "A JSON file to write.")

SMOLLM2_135M = ModelConfig(
  vocab_size=49152,
  num_layers=30,
  embed_dim=576,
  mlp_dim=1536,
  num_heads=9,
  num_kv_heads=3,
  head_dim=64,
  context_length=8192,
  rope_theta=1e5,
  norm_epsilon=1e-5,
  qkv_bias=False,
  tied_embeddings=True,
  compute_dtype="float32",
)
_MATMUL = 2048  # rows and columns
_READ_BYTES = 2**29

# From prompts and a number of new tokens to all new tokens.
Generate = Callable[[list[list[int]], int], np.ndarray]


def _ours(stored: StoredModel) -> Generate:
  config = dataclasses.replace(stored.config, compute_dtype="float32")

  def generate(prompts: list[list[int]], new_tokens: int) -> np.ndarray:
    sampling = Sampling(
      max_new_tokens=new_tokens, temperature=0.0, stop_tokens=()
    )
    rows = generate_tokens(config, stored.params, prompts, sampling=sampling)
    return np.asarray([row.tokens for row in rows])

  return generate


def _theirs(directory: pathlib.Path) -> dict[str, Generate]:
  """Those of transformers, with either of its caches."""
  import torch  # pyright: ignore[reportMissingImports]
  import transformers  # pyright: ignore[reportMissingImports]

  torch.set_num_threads(_THREADS.value)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    directory, dtype=torch.float32
  ).eval()

  def generate(prompts, new_tokens: int, **options: Any) -> np.ndarray:
    ids = torch.tensor(prompts)
    with torch.inference_mode():
      found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        **options,
      )
    return found[:, ids.shape[1] :].numpy()

  found: dict[str, Generate] = {"transformers": generate}
  if _STATIC.value:
    static = dict(cache_implementation="static", disable_compile=True)
    found["transformers, static cache"] = functools.partial(generate, **static)
  return found


def _stored(directory: pathlib.Path) -> tuple[StoredModel, pathlib.Path]:
  """The MODEL to measure, and the same for transformers to read."""
  source = directory / "model"
  if _MODEL.value:
    source = pathlib.Path(_MODEL.value).expanduser()
  else:
    init = jax.jit(functools.partial(decoder_lm.init_params, SMOLLM2_135M))
    stored = StoredModel(
      config=SMOLLM2_135M,
      lineage=Lineage(),
      params=init(key=jax.random.key(0)),
      tokenizer=None,
    )
    axes = decoder_lm.parameter_axes(SMOLLM2_135M)
    save_model(source, stored, axes=axes)
  export_model(
    source, directory / "hf", dtype="float32", progress=lambda text: None
  )
  stored = load_model(
    source, like=decoder_lm.abstract_params, with_optimizer=False
  )
  return stored, directory / "hf"


def _seconds(call: Callable[[], Any]) -> float:
  start = time.perf_counter()
  jax.block_until_ready(call())
  return time.perf_counter() - start


def _ceilings() -> Callable[[], dict[str, float]]:
  """Measures what the machine can do now."""
  square = jnp.ones((_MATMUL, _MATMUL), jnp.float32)
  large = jnp.ones(_READ_BYTES // 4, jnp.float32)
  matmul, total = jax.jit(jnp.matmul), jax.jit(jnp.sum)

  def measure() -> dict[str, float]:
    product = min(_seconds(lambda: matmul(square, square)) for _ in range(3))
    read = min(_seconds(lambda: total(large)) for _ in range(3))
    return dict(
      matmul_gflops=2e-9 * _MATMUL**3 / product,
      read_gbytes_s=1e-9 * _READ_BYTES / read,
    )

  measure()  # compiles
  return measure


def _same_tokens(one: np.ndarray, other: np.ndarray) -> float:
  """Share of the tokens up to where a row first differs."""
  same = np.cumprod(one == other, axis=1)
  return float(np.mean(same))


def measure(
  generators: dict[str, Generate], *, vocab_size: int
) -> tuple[dict[tuple[str, int], list[dict[str, float]]], dict[int, float]]:
  """Everything once a round, in turns.

  Args:
    generators: by name.
    vocab_size: V, for random prompts.

  Returns:
    For each name and batch size prefill_ms and decode_tokens_s of every round;
    for each batch size the share of tokens on which all agree.
  """
  sizes = [int(size) for size in _BATCH_SIZES.value]
  count = _NEW_TOKENS.value
  rng = np.random.default_rng(0)
  shape = (max(sizes), _PROMPT_TOKENS.value)
  prompts = rng.integers(1, vocab_size, shape).tolist()
  found: dict[tuple[str, int], list[dict[str, float]]] = {}
  agreement = {}
  for size in sizes:  # compiles, and compares
    rows = [g(prompts[:size], count) for g in generators.values()]
    agreement[size] = min(_same_tokens(rows[0], row) for row in rows)
    for generate in generators.values():
      generate(prompts[:size], 1)
  for i in range(_ROUNDS.value):
    print(f"round {i + 1} of {_ROUNDS.value}", flush=True)
    for size in sizes:
      for name, generate in generators.items():
        call = functools.partial(generate, prompts[:size])
        first = _seconds(functools.partial(call, 1))
        whole = _seconds(functools.partial(call, count))
        found.setdefault((name, size), []).append(
          dict(
            prefill_ms=1e3 * first,
            decode_tokens_s=size * (count - 1) / max(whole - first, 1e-9),
          )
        )
  return found, agreement


def _summary(
  found: dict[tuple[str, int], list[dict[str, float]]],
  *,
  weight_bytes: int,
  read_gbytes_s: float,
) -> list[dict[str, Any]]:
  """Medians and ranges; ratios of rounds to the faster transformers."""
  results = []
  for size in sorted({size for _, size in found}):
    rates = {
      name: [one["decode_tokens_s"] for one in rounds]
      for (name, other), rounds in found.items()
      if other == size
    }
    theirs = max(
      (name for name in rates if name != "aquila_jax"),
      key=lambda name: statistics.median(rates[name]),
    )
    for name, measured in rates.items():
      ratios = [a / b for a, b in zip(measured, rates[theirs], strict=True)]
      rate = statistics.median(measured)
      prefill = [one["prefill_ms"] for one in found[name, size]]
      results.append(
        dict(
          batch_size=size,
          implementation=name,
          prefill_ms=_rounded(statistics.median(prefill)),
          decode_tokens_s=_rounded(rate),
          decode_tokens_s_range=_range(measured),
          of_memory=_rounded(1e-9 * weight_bytes * rate / size / read_gbytes_s),
          ratio=_rounded(statistics.median(ratios)),
          ratio_range=_range(ratios),
        )
      )
  return results


def _rounded(value: float) -> float:
  return float(f"{value:.3g}")


def _range(values: list[float]) -> list[float]:
  return [_rounded(min(values)), _rounded(max(values))]


def _table(report: dict[str, Any]) -> str:
  lines = [
    f"{report['device']}; matmul {report['matmul_gflops']:g} GFLOP/s, memory"
    f" {report['read_gbytes_s']:g} GB/s;"
    f" {report['prompt_tokens']} + {report['new_tokens']} tokens",
    f"{'batch':<7}{'implementation':<28}{'prefill ms':>10}{'tokens/s':>10}"
    f"{'range':>16}{'of memory':>11}{'ratio':>7}{'range':>14}",
  ]
  for row in report["results"]:
    low, high = row["decode_tokens_s_range"]
    least, most = row["ratio_range"]
    lines.append(
      f"{row['batch_size']:<7}{row['implementation']:<28}"
      f"{row['prefill_ms']:>10.4g}{row['decode_tokens_s']:>10.4g}"
      f"{f'{low:.4g} to {high:.4g}':>16}{row['of_memory']:>11.0%}"
      f"{row['ratio']:>7.2f}{f'{least:.2f} to {most:.2f}':>14}"
    )
  return "\n".join(lines)


def _report() -> dict[str, Any]:
  ceilings = _ceilings()
  with tempfile.TemporaryDirectory() as directory:
    stored, exported = _stored(pathlib.Path(directory))
    generators = {"aquila_jax": _ours(stored), **_theirs(exported)}
  before = ceilings()
  found, agreement = measure(generators, vocab_size=stored.config.vocab_size)
  after = ceilings()
  best = {name: max(before[name], after[name]) for name in before}
  weight_bytes = 4 * sum(leaf.size for leaf in jax.tree.leaves(stored.params))
  return dict(
    benchmark="generation_cpu",
    date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    device=device(),
    versions={
      name: importlib.metadata.version(name)
      for name in ("jax", "jaxlib", "torch", "transformers")
    },
    weights="of a MODEL" if _MODEL.value else "random, SmolLM2-135M's shapes",
    threads=_THREADS.value,
    rounds=_ROUNDS.value,
    prompt_tokens=_PROMPT_TOKENS.value,
    new_tokens=_NEW_TOKENS.value,
    matmul_gflops=_rounded(best["matmul_gflops"]),
    read_gbytes_s=_rounded(best["read_gbytes_s"]),
    same_tokens={str(size): share for size, share in agreement.items()},
    results=_summary(
      found,
      weight_bytes=weight_bytes,
      read_gbytes_s=best["read_gbytes_s"],
    ),
  )


def main(argv: list[str]) -> None:
  """Measures, prints the table and writes the JSON."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  missing = [
    name
    for name in ("torch", "transformers")
    if importlib.util.find_spec(name) is None
  ]
  if missing:
    raise SystemExit(
      f"generation_cpu: {' and '.join(missing)} must be installed:"
      f" pip install {' '.join(missing)}"
    )
  jax.config.update("jax_platforms", "cpu")
  try:
    report = _report()
  except errors.UserError as error:
    raise SystemExit(f"generation_cpu: {error}") from error
  print(_table(report))
  for size, share in report["same_tokens"].items():
    print(f"batch {size}: the same tokens up to {share:.1%}")
  if _OUTPUT.value:
    text = json.dumps(report, indent=2) + "\n"
    pathlib.Path(_OUTPUT.value).write_text(text, encoding="utf-8")


if __name__ == "__main__":
  app.run(main)
