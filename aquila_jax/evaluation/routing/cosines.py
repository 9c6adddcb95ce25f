"""How far the experts of a layer are from each other and from their parent.

One layer's experts are in memory at a time, one of their kernels at a time.

A cosine is of one kernel with another, all entries as one vector, and what is
said of two FFNs is the mean over gate, up and down. So a factor that growth
puts on a kernel does not show, and experts that are copies have a cosine of 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from flax import traverse_util
from jaxtyping import Float

from aquila_jax.core.axes import LeafAxes, Role
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.models import decoder_lm

Index = tuple[int | slice, ...]


@runtime_checkable
class Tree(Protocol):
  """Parameters that are read slice by slice: array_store.TreeReader."""

  def read(self, name: str, *, index: Index = ()) -> np.ndarray:
    """leaf[index], of a leaf whose keys are joined by dots."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
  """What an expert was made of."""

  expert: int | None  # of the parent; None where it is dense
  units: slice  # of the parent's hidden units


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """A parent, and what each expert has of it."""

  config: ModelConfig
  params: Tree
  # By expert; None is of an expert that came from another model.
  origins: Sequence[Origin | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCosines:
  """Of one layer; E experts."""

  layer: int  # of the model
  between: np.ndarray  # float [E E]
  # float [E]; to what the expert was made of, NaN where that is not known.
  to_parent: np.ndarray | None
  # bool [E E]; made of the same units of the same FFN. None without a parent.
  copies: np.ndarray | None

  def pairs(self, *, of_copies: bool = False) -> Float[np.ndarray, "pairs"]:
    """The cosines of all pairs of experts, or of copies of one FFN."""
    wanted = np.triu(np.ones(self.between.shape, bool), 1)
    if of_copies:
      assert self.copies is not None
      wanted &= self.copies
    return self.between[wanted]


def cosines(
  config: ModelConfig,
  params: Tree,
  *,
  family: Family | None = None,
  say: Callable[[str], None] = lambda line: None,
) -> list[LayerCosines]:
  """Compares the experts of every layer that has any.

  Args:
    config: of a mixture.
    params: of it.
    family: what the experts were made of; None where that is not known.
    say: told which layer is read.

  Returns:
    The cosines, layer by layer.
  """
  kernels = _kernels(config)
  found = []
  for layer in config.moe_layers:
    say(f"comparing the experts of layer {layer}")
    between, to_parent = [], []
    for last, (name, axes) in kernels.items():
      kernel = _layer(params, name, axes, layer)
      vectors = kernel.reshape(len(kernel), -1)
      between.append(_cosine_matrix(vectors))
      if family is not None:
        to_parent.append(_to_parent(vectors, family, last, layer))
    found.append(
      LayerCosines(
        layer=layer,
        between=np.mean(between, axis=0),
        to_parent=np.mean(to_parent, axis=0) if to_parent else None,
        copies=None if family is None else _copies(family.origins),
      )
    )
  return found


def _kernels(config: ModelConfig) -> dict[str, tuple[str, LeafAxes]]:
  """Gate, up and down of routed experts, or of a dense FFN, by last name."""
  declared: Any = traverse_util.flatten_dict(
    decoder_lm.parameter_axes(config), sep="."
  )
  return {
    name.rpartition(".")[2]: (name, axes)
    for name, axes in declared.items()
    if axes.has("mlp") and axes.has("expert") == (config.moe is not None)
  }


def _layer(
  params: Tree, name: str, axes: LeafAxes, layer: int
) -> Float[np.ndarray, "..."]:
  row = axes.row_of(layer)
  assert row is not None, (name, layer)
  return params.read(name, index=(row,)).astype(np.float32)


def _cosine_matrix(
  vectors: Float[np.ndarray, "E size"],
) -> Float[np.ndarray, "E E"]:
  products = (vectors @ vectors.T).astype(np.float64)
  norms = np.sqrt(np.diag(products))
  return _over(products, np.outer(norms, norms))


def _over(
  products: Float[np.ndarray, "..."], norms: Float[np.ndarray, "..."]
) -> Float[np.ndarray, "..."]:
  """A vector of zeros has a cosine of 0 with any."""
  ratio = products / np.where(norms > 0, norms, 1)
  return np.clip(ratio, -1, 1)


def _to_parent(
  vectors: Float[np.ndarray, "E size"], family: Family, last: str, layer: int
) -> Float[np.ndarray, "E"]:
  """The cosine of each expert's kernel with that which it was made of."""
  name, axes = _kernels(family.config)[last]
  parent = _layer(family.params, name, axes, layer)
  # Where the hidden units lie in a kernel of one FFN: [D F] or [F D].
  place = -1 if axes.has("mlp", Role.WRITES) else -2
  products, norms = (np.full(len(vectors), np.nan) for _ in range(2))
  for i, origin in enumerate(family.origins):
    if origin is None:
      continue
    ffn = parent if origin.expert is None else parent[origin.expert]
    units = range(ffn.shape[place])[origin.units]
    own, made_of = vectors[i], np.take(ffn, units, axis=place).reshape(-1)
    products[i] = own @ made_of
    norms[i] = np.sqrt((own @ own) * (made_of @ made_of))
  return _over(products, norms)


def _copies(origins: Sequence[Origin | None]) -> np.ndarray:
  def key(origin: Origin | None) -> tuple | None:
    if origin is None:
      return None
    return (origin.expert, origin.units.start, origin.units.stop)

  keys = [key(origin) for origin in origins]
  return np.array([[a is not None and a == b for b in keys] for a in keys])
