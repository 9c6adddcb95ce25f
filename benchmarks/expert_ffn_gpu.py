"""Claim: on a GPU a tiled product a block is the fast way to run experts.

  python -m benchmarks.expert_ffn_gpu --output=benchmarks/results/NAME.json

Compares the backends of kernels/expert_ffn, forward and forward with backward,
in bfloat16, on dropless blocks of rows of a skewed choice. A rate counts the
FLOPs of the routed rows only, so that padding costs whoever pads, and stands as
a share of a plain matmul's of the same run. Beside it: one dense FFN of as many
rows, the ceiling of any of them, and torch's grouped_mm where torch is there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from aquila_jax.core.model_config import MoeConfig
from aquila_jax.kernels.expert_ffn import api
from aquila_jax.layers.moe import dispatch
from aquila_jax.layers.moe.router import Affinity
from aquila_jax.layers.moe.selection import choose
from benchmarks import gpu_clock

_OUTPUT = flags.DEFINE_string("output", None, "A JSON file to write.")
_SMALL = flags.DEFINE_bool("small", False, "Tiny shapes: does it run?")

# name, tokens M, width D, hidden F, experts E, top-k A, block Q
_WORKLOADS = (
  ("8 of 5632", 16384, 2048, 5632, 8, 2, 128),
  ("64 of 704", 16384, 2048, 704, 64, 8, 128),
  ("64 of 704", 16384, 2048, 704, 64, 8, 64),
)
_TINY = (("tiny", 256, 64, 96, 4, 2, 32),)
_CALLS, _ROUNDS = 5, 5
_BACKENDS: tuple[api.Implementation, ...] = ("xla", "ragged_dot", "pallas_gpu")
Row = dict[str, Any]


def _dense(rows, kernels):
  gate, up, down = (kernel[0] for kernel in kernels)
  return (jax.nn.silu(rows @ gate) * (rows @ up)) @ down


def _normal(seed: int, *shape: int, std: float = 1.0) -> jax.Array:
  drawn = jax.random.normal(jax.random.key(seed), shape)
  return (std * drawn).astype(jnp.bfloat16)


def _plan(tokens: jax.Array, num_experts: int, top_k: int, size: int) -> Any:
  """Blocks of a choice whose largest load is a few times the mean."""
  logits = jax.random.normal(jax.random.key(3), (len(tokens), num_experts))
  logits = logits + jnp.linspace(0.0, 1.0, num_experts)
  routing = choose(
    Affinity(
      plain=logits,
      logits=logits,
      bias=None,
      valid=jnp.ones(len(tokens), bool),
    ),
    MoeConfig(num_experts=num_experts, top_k=top_k),
  )
  return dispatch.Dropless(size).place(routing)


def _measured(
  function: Callable, rows: jax.Array, kernels: Any, *, flops: float
) -> list[Row]:
  """Forward, and forward with backward."""

  def loss(rows, kernels):
    return jnp.sum(jnp.square(function(rows, kernels).astype(jnp.float32)))

  found = []
  for direction, factor, call in (
    ("forward", 1, function),
    ("forward+backward", 3, jax.value_and_grad(loss, (0, 1))),
  ):
    compiled = jax.jit(call).lower(rows, kernels).compile()
    time = gpu_clock.seconds(
      lambda compiled=compiled: compiled(rows, kernels),
      calls=_CALLS,
      rounds=_ROUNDS,
    )
    found.append(
      dict(
        direction=direction,
        milliseconds=1e3 * time,
        flops_per_s=factor * flops / time,
        temporaries_gib=gpu_clock.temporaries(compiled),
      )
    )
  return found


def _differs(function: Callable, rows, kernels, *, expected) -> float:
  """Of forward: the norm of the difference over that of the oracle."""
  out = jax.jit(function)(rows, kernels).astype(jnp.float32)
  return float(jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected))


def _workload(workload: tuple, *, say: Callable[[str], None]) -> list[Row]:
  name, num_tokens, width, hidden, num_experts, top_k, size = workload
  tokens = _normal(0, num_tokens, width)
  kernels = (
    _normal(1, num_experts, width, hidden, std=width**-0.5),
    _normal(2, num_experts, width, hidden, std=width**-0.5),
    _normal(4, num_experts, hidden, width, std=hidden**-0.5),
  )
  plan = jax.jit(
    functools.partial(_plan, num_experts=num_experts, top_k=top_k, size=size)
  )(tokens)
  rows = plan.gather(tokens)
  blocks = dict(block_expert=plan.block_expert, num_blocks=plan.num_blocks)
  flops = 6.0 * num_tokens * top_k * width * hidden
  loads = jnp.bincount(plan.routing.experts.reshape(-1), length=num_experts)
  wide = tuple(kernel.astype(jnp.float32) for kernel in kernels)
  oracle = functools.partial(
    api.expert_ffn, implementation="cpu_loop", **blocks
  )
  with jax.default_matmul_precision("highest"):
    expected = jax.jit(oracle)(rows.astype(jnp.float32), wide)
  results = []
  for backend in (*_BACKENDS, None):
    label, error = backend or "one dense FFN", None
    if backend is None:
      function: Callable = _dense
      x = rows.reshape(-1, width)[: num_tokens * top_k]
    else:
      function, x = (
        functools.partial(api.expert_ffn, implementation=backend, **blocks),
        rows,
      )
    try:
      if backend is not None:
        error = _differs(function, x, kernels, expected=expected)
      measured = _measured(function, x, kernels, flops=flops)
    except Exception as problem:  # out of memory is a result too
      say(f"{name} {label}: {str(problem)[:300]}")
      measured = [dict(direction="failed", error=str(problem)[:300])]
    for row in measured:
      row |= dict(
        workload=name,
        block_size=size,
        implementation=label,
        relative_error=error,
        largest_load_over_mean=float(jnp.max(loads) / jnp.mean(loads)),
      )
      results.append(row)
      say(_line(row))
  return results


def _line(row: Row) -> str:
  if "milliseconds" not in row:
    return f"{row['workload']:<12}{row['implementation']:<15}failed"
  error = row["relative_error"]
  return (
    f"{row['workload']:<12}{row['block_size']:<5}{row['implementation']:<15}"
    f"{row['direction']:<18}{row['milliseconds']:>9.3f} ms"
    f"{row['flops_per_s'] / 1e12:>8.1f} TFLOP/s"
    f"{row['temporaries_gib']:>8.2f} GiB"
    + ("" if error is None else f"  error {error:.1e}")
  )


def main(argv: list[str]) -> None:
  """Measures, prints the table and writes the JSON."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")

  def say(line: str) -> None:
    print(line, flush=True)

  ceiling = gpu_clock.matmul_flops()
  copied = gpu_clock.copy_bytes()
  say(f"matmul {ceiling / 1e12:.0f} TFLOP/s, copy {copied / 1e12:.2f} TB/s")
  results = []
  for workload in _TINY if _SMALL.value else _WORKLOADS:
    results += _workload(workload, say=say)
  for row in results:
    if "flops_per_s" in row:
      row["of_matmul"] = row["flops_per_s"] / ceiling
  gpu_clock.write_report(
    _OUTPUT.value,
    benchmark="expert_ffn_gpu",
    matmul_flops_per_s=ceiling,
    copy_bytes_per_s=copied,
    results=results,
  )


if __name__ == "__main__":
  app.run(main)
