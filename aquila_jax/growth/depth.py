"""Depth: which source layer every target layer copies, and which add nothing.

A block adds to the residual stream. An inserted block keeps the function when
what it adds is zero: when the leaves through which it writes the residual
(`out_kernel`, `down_kernel`: those that read something and write `embed`) are
zero, or sum to zero over the copies of whatever they read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool

from aquila_jax.core import errors
from aquila_jax.growth.axis_map import AxisMap


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LayerMap:
  """The source layer of every target layer, and how much of it counts."""

  copies: AxisMap
  # Layers that add nothing to the residual.
  silent: Bool[np.ndarray, " target"]
  # Noise on the shares of the copies in a silent layer, relative to their
  # root mean square; it sums to zero. 0 leaves plain zeros.
  silent_noise: float = 0.0

  def in_words(self) -> str:
    words = self.copies.in_words()
    if self.silent.any():
      words += f"; {int(self.silent.sum())} of them add nothing at first"
    return words


def rows_of(copies: AxisMap, layers: tuple[int, ...] | None) -> AxisMap:
  """The map of a leaf that only some layers have, from row to row.

  Args:
    copies: the source layer of every target layer; each source layer is copied.
    layers: of the target, those that have the leaf; None is all. In the source
      it is in the layers that these copy.

  Returns:
    For every row of the target's leaf the row of the source's.
  """
  if layers is None:
    return copies
  copied = copies.source[np.asarray(layers)]
  having, rows = np.unique(copied, return_inverse=True)
  return AxisMap(source=rows, source_size=len(having), rule=copies.rule)


def _copying(source: np.ndarray, num_source: int, *, rule: str) -> LayerMap:
  return LayerMap(
    copies=AxisMap(source=source, source_size=num_source, rule=rule),
    silent=np.zeros(len(source), bool),
  )


def interpolate(num_source: int, num_target: int) -> LayerMap:
  """Target layer l copies source layer floor(l L_src / L_tgt).

  A layer stands beside its copy: 32 -> 40 doubles 0, 4, 8, ..., 28. (AquilaMoE,
  section 2.2, where the formula is misprinted.)
  """
  source = np.arange(num_target) * num_source // num_target
  return _copying(source, num_source, rule="interpolate")


def stack(num_source: int, num_target: int) -> LayerMap:
  """Target layer l copies source layer l mod L_src: the source upon itself."""
  source = np.arange(num_target) % num_source
  return _copying(source, num_source, rule="stack")


def stack_top(num_source: int, num_target: int) -> LayerMap:
  """Whole copies upon each other, and then the topmost layers once more.

  bert2BERT (arXiv 2110.07143, section 3.4): what is left over by the whole
  copies is taken from the top of the source, not from its bottom.
  """
  rest = num_target % num_source
  whole = np.arange(num_target - rest) % num_source
  top = np.arange(num_source - rest, num_source)
  source = np.concatenate([whole, top])
  return _copying(source, num_source, rule="stack_top")


def solar(num_source: int, num_target: int) -> LayerMap:
  """The first n - m layers of one copy, then the last n - m of another.

  SOLAR (arXiv 2312.15166, section 2) of n = L_src layers; the m that each copy
  loses follows from L_tgt = 2 (n - m).
  """
  if num_target % 2 or not num_source <= num_target <= 2 * num_source:
    raise errors.UserError(
      f"num_layers={num_target}: expected an even number from {num_source} to"
      f" {2 * num_source}; depth='solar' joins as many layers of the bottom as"
      " of the top"
    )
  half = num_target // 2
  source = np.concatenate(
    [np.arange(half), np.arange(num_source - half, num_source)]
  )
  return _copying(source, num_source, rule="solar")


def zero_blocks(
  num_source: int, num_target: int, *, noise: float = 0.0, rule: str
) -> LayerMap:
  """Blocks that add nothing, inserted evenly among the source's layers.

  Inserted block j of n = L_tgt - L_src stands behind source layer
  ceil((j + 1) L_src / n) - 1 and copies it (LLaMA-Pro, arXiv 2401.02415,
  section 3.1, where n divides L_src).

  Args:
    num_source: layers of the source.
    num_target: layers of the target.
    noise: see `LayerMap.silent_noise`.
    rule: its name.

  Returns:
    The map.
  """
  inserted = num_target - num_source
  after = -(-(np.arange(inserted) + 1) * num_source // max(inserted, 1)) - 1
  source = np.concatenate([np.arange(num_source), after])
  silent = np.arange(num_target) >= num_source
  order = np.argsort(source, kind="stable")  # a layer, then its copies
  return LayerMap(
    copies=AxisMap(source=source[order], source_size=num_source, rule=rule),
    silent=silent[order],
    silent_noise=noise,
  )


def llama_pro(num_source: int, num_target: int) -> LayerMap:
  """`zero_blocks` whose writers are zero."""
  return zero_blocks(num_source, num_target, rule="llama_pro")


def lemon(num_source: int, num_target: int) -> LayerMap:
  """`zero_blocks` whose writers cancel each other over the copies they read.

  LEMON (arXiv 2310.07999, appendix on depth): where width grows too, the
  shares of a neuron's copies are random and sum to zero, so that what feeds
  them has a gradient from the first step. Where nothing is copied they are
  zeros, as LLaMA-Pro's.
  """
  return zero_blocks(num_source, num_target, noise=1.0, rule="lemon")


DepthRule = Callable[[int, int], LayerMap]

RULES: dict[str, DepthRule] = {
  "interpolate": interpolate,
  "stack": stack,
  "stack_top": stack_top,
  "solar": solar,
  "llama_pro": llama_pro,
  "lemon": lemon,
}


def given(
  num_source: int, num_target: int, layers: tuple[int, ...]
) -> LayerMap:
  """Chosen layers: target layer l copies source layer layers[l].

  Raises:
    errors.UserError: where they are not as many as the target has layers, are
      no layers of the source, or leave one of it out.
  """
  field = f"layers={layers}"
  if len(layers) != num_target:
    raise errors.UserError(
      f"{field}: it fills {len(layers)} layers; expected a source layer for"
      f" each of the target's {num_target}"
    )
  outside = [layer for layer in layers if not 0 <= layer < num_source]
  if outside:
    raise errors.UserError(
      f"{field}: the source has no layer {outside[0]}; expected 0 to"
      f" {num_source - 1}"
    )
  found = _copying(np.asarray(layers), num_source, rule="repeat")
  if found.copies.unused:
    raise errors.UserError(
      f"{field}: layer {found.copies.unused[0]} of the source is used nowhere;"
      " Scale-Up does not shrink"
    )
  return found
