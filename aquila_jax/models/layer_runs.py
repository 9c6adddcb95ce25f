"""A stack whose layers are of two kinds, cut into pieces that can be scanned.

A scan runs one program again and again, so what it scans over must repeat. A
run is a block of p layers, some with experts and some dense, that stands n
times in a row:

  every second     (dense, experts) x L/2
  last half        (dense) x L/2, (experts) x L/2
  1, 4 of 5        (dense, experts, dense) x 1, (dense, experts) x 1

The cut is the one with the fewest layers to compile, which is the sum of the p:
of a pattern that repeats it does not grow with the depth.

Parameters are stored as the stack has them, whatever the cut: what all layers
have is stacked over all of them, what one kind has over the layers of that
kind. `split` cuts such leaves for the runs and `join` puts them together.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# In a mixed stack, the parts of a layer of one kind: experts and dense FFN. In
# a uniform one both are called by the first name.
EXPERTS, DENSE = "mlp", "dense_mlp"


@dataclasses.dataclass(frozen=True)
class Run:
  """A block of layers that stands several times in a row."""

  kinds: tuple[bool, ...]  # of each layer of the block: whether it has experts
  repeats: int

  def layers(self, part: str) -> list[int]:
    """Which layers of the block have a part of a layer."""
    return [
      i
      for i, kind in enumerate(self.kinds)
      if part not in (EXPERTS, DENSE) or kind == (part == EXPERTS)
    ]

  def size(self, part: str) -> int:
    """How many layers of the block have it."""
    return len(self.layers(part))


@functools.cache
def find_runs(kinds: tuple[bool, ...]) -> tuple[Run, ...]:
  """The runs of a stack, with the fewest layers to compile.

  Args:
    kinds: of every layer, whether it has experts.

  Returns:
    The runs from the bottom up; of several such cuts one with the fewest.
  """
  length = len(kinds)
  # Of the layers from i on: the cost of the best cut, and its runs.
  best: list[tuple[tuple[int, int], tuple[Run, ...]]] = [((0, 0), ())]
  for start in reversed(range(length)):
    found = []
    for period in range(1, length - start + 1):
      block = kinds[start : start + period]
      stop = start + period
      while stop <= length and kinds[stop - period : stop] == block:
        (layers, runs), rest = best[length - stop]
        run = Run(block, (stop - start) // period)
        found.append(((layers + period, runs + 1), (run, *rest)))
        stop += period
    best.append(min(found, key=lambda one: one[0]))
  return best[length][1]


def block_name(layer: int) -> str:
  """Of a layer of a block."""
  return f"block_{layer}"


def run_name(index: int) -> str:
  """Of a run of a stack."""
  return f"run_{index}"


def split(stack: Mapping[str, Any], runs: Sequence[Run]) -> dict[str, Any]:
  """The variables of a stack, cut for its runs.

  Args:
    stack: by part of a layer, trees of leaves [layers with that part, ...].
    runs: of `find_runs`.

  Returns:
    By `run_name` and `block_name`, such trees of leaves [repeats, ...].
  """
  found: dict[str, Any] = {
    run_name(r): {block_name(i): {} for i in range(len(run.kinds))}
    for r, run in enumerate(runs)
  }
  for part, tree in stack.items():
    leaves, structure = jax.tree.flatten(tree)
    cuts = [
      _cut(leaf, [(run.repeats, run.size(part)) for run in runs])
      for leaf in leaves
    ]
    for r, run in enumerate(runs):
      for place, i in enumerate(run.layers(part)):
        found[run_name(r)][block_name(i)][part] = structure.unflatten(
          [cut[r][place] for cut in cuts]
        )
  return found


def _cut(
  leaf: Float[Array, "rows *rest"], sizes: Sequence[tuple[int, int]]
) -> list[list[Float[Array, "repeats *rest"]]]:
  """Of every run, of every layer of its block: the rows.

  By `jax.lax.split`, the gradient of which is one concatenation. That of
  slices would be a sum of leaves that are zero but for a slice.
  """
  rows = [repeats * size for repeats, size in sizes]
  pieces = iter(jax.lax.split(leaf, [n for n in rows if n]))
  found: list[list[Any]] = []
  for repeats, size in sizes:
    if not size:
      found.append([])
      continue
    piece = next(pieces).reshape(repeats, size, *leaf.shape[1:])
    layers = jax.lax.split(piece, [1] * size, axis=1)
    found.append([jnp.squeeze(layer, 1) for layer in layers])
  return found


def join(variables: Mapping[str, Any], runs: Sequence[Run]) -> dict[str, Any]:
  """The inverse of `split`."""
  stack: dict[str, Any] = {}
  for part in {
    name: None
    for run in variables.values()
    for block in run.values()
    for name in block
  }:
    blocks = [
      [variables[run_name(r)][block_name(i)][part] for i in run.layers(part)]
      for r, run in enumerate(runs)
    ]
    stack[part] = _joined([block for block in blocks if block])
  return stack


def _joined(blocks: Sequence[Sequence[Any]]) -> Any:
  """One tree of leaves [rows, ...] out of those of runs and their layers."""

  def join_run(*leaves: Array) -> Array:
    return jnp.stack(leaves, axis=1).reshape(-1, *leaves[0].shape[1:])

  runs = [jax.tree.map(join_run, *layers) for layers in blocks]
  return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *runs)
