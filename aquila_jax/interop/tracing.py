"""Where two implementations of a model first part.

The outputs of every part, in the order of computing:

  embedding
  layer 0: attention, feed-forward, residual    residual = x + both
  ...
  final norm
  logits

A difference grows on its way through the layers, so that its size at the end
says little of where it began. Each part of ours is therefore also run on what
the other implementation's part was given: what differs then is the part's own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.types import Params
from aquila_jax.layers import rotary
from aquila_jax.layers.embedding import Embedding, LMHead
from aquila_jax.models import decoder_lm
from aquila_jax.models.decoder_lm import Block
from aquila_jax.models.layer_runs import DENSE, EXPERTS

Part = Literal[
  "embedding", "attention", "feed-forward", "residual", "final norm", "logits"
]
_IN_LAYER: tuple[Part, ...] = ("attention", "feed-forward", "residual")

# One rounding of float32, relative.
_ROUNDING = 2.0**-24


@dataclasses.dataclass(frozen=True)
class Place:
  """A part of the model whose output is looked at."""

  part: Part
  layer: int | None = None  # from 0; None outside the layers

  def __str__(self) -> str:
    return (
      self.part if self.layer is None else f"layer {self.layer} {self.part}"
    )


# Of one text: float [T D], of the logits [T V].
Trace = Mapping[Place, np.ndarray]


def places(num_layers: int) -> list[Place]:
  """All places, in the order of computing."""
  return [
    Place("embedding"),
    *(Place(part, i) for i in range(num_layers) for part in _IN_LAYER),
    Place("final norm"),
    Place("logits"),
  ]


def trace_model(
  config: ModelConfig, params: Params, tokens: Sequence[int]
) -> dict[Place, np.ndarray]:
  """The outputs of every part of our model.

  Args:
    config: of the model; computes in its `compute_dtype`.
    params: of the model.
    tokens: of one text.

  Returns:
    One array a place.
  """
  return _trace(config, params, tokens, given=None)


def trace_parts(
  config: ModelConfig,
  params: Params,
  tokens: Sequence[int],
  *,
  given: Trace,
) -> dict[Place, np.ndarray]:
  """The outputs of every part of ours, each on the inputs of another's.

  A layer gets the other's residual stream, and the final norm and the head get
  the other's too. Inside a layer, parts get what ours before them gave.

  Args:
    config: of the model.
    params: of the model.
    tokens: of one text.
    given: the trace of the other implementation for the same text.

  Returns:
    One array a place.
  """
  return _trace(config, params, tokens, given=given)


def _trace(
  config: ModelConfig,
  params: Params,
  tokens: Sequence[int],
  *,
  given: Trace | None,
) -> dict[Place, np.ndarray]:
  """Layer by layer; parts get the outputs of `given`, or of ours."""
  row = jnp.asarray(tokens, jnp.int32)[None]
  embedding = Embedding(config).apply({"params": params["embedding"]}, row)
  found = {Place("embedding"): np.asarray(embedding)[0]}
  before = Place("embedding")

  def read(place: Place) -> Float[Array, "1 T D"]:
    outputs = found if given is None else given
    return jnp.asarray(outputs[place], jnp.dtype(config.compute_dtype))[None]

  for i in range(config.num_layers):
    layer = decoder_lm.layer_params(params, config, i)
    outputs = jax.device_get(
      _captured_block(
        config, layer, read(before), has_experts=i in config.moe_layers
      )
    )
    found |= {Place(part, i): out[0] for part, out in outputs.items()}
    before = Place("residual", i)
  normed: Any = decoder_lm.final_norm(config).apply(
    {"params": params["final_norm"]}, read(before)
  )
  found[Place("final norm")] = np.asarray(normed)[0]
  logits = _head(config, params, read(Place("final norm")))
  found[Place("logits")] = np.asarray(logits)[0]
  return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartDifference:
  """How far two implementations are apart behind one part.

  Differences are relative: of a token's vector, |ours - theirs| / |theirs| in
  the 2-norm, the largest over the tokens.
  """

  place: Place
  total: float  # of the whole models up to here
  own: float  # of this part alone, given the same inputs
  limit: float  # of `own`, by rounding

  @property
  def parted(self) -> bool:
    """Whether rounding does not explain what this part adds."""
    return not self.own <= self.limit


def rounding_limit(num_tokens: int) -> float:
  """The largest relative difference of a part that rounding explains.

  256 + T roundings of float32: sums of some thousand terms in another order
  leave 10 to 100, measured on SmolLM2-135M (docs/parity.md); the angle of RoPE
  at position t is off by t roundings of its frequency.
  """
  return (256 + num_tokens) * _ROUNDING


def compare_traces(
  config: ModelConfig,
  params: Params,
  tokens: Sequence[int],
  *,
  reference: Trace,
) -> list[PartDifference]:
  """Our model against the trace of another implementation, part by part.

  Args:
    config: of the model, in float32.
    params: of the model.
    tokens: of one text.
    reference: the other's trace of it.

  Returns:
    The differences, in the order of computing.
  """
  ours = trace_model(config, params, tokens)
  parts = trace_parts(config, params, tokens, given=reference)
  limit = rounding_limit(len(tokens))
  return [
    PartDifference(
      place=place,
      total=relative_difference(ours[place], reference[place]),
      own=relative_difference(
        parts[place], reference[place], scale=_scale(place, reference)
      ),
      limit=limit,
    )
    for place in places(config.num_layers)
  ]


def first_parted(differences: Sequence[PartDifference]) -> Place | None:
  """The first part that adds more than rounding, or None."""
  return next((one.place for one in differences if one.parted), None)


def relative_difference(
  found: Float[np.ndarray, "T D"],
  expected: Float[np.ndarray, "T D"],
  *,
  scale: Float[np.ndarray, " T"] | None = None,
) -> float:
  """The largest |found - expected| / |expected| of a token, in the 2-norm.

  Args:
    found: a vector a token.
    expected: the same.
    scale: in place of |expected|.

  Returns:
    The ratio; 0 where both are zeros, NaN where one is not finite.
  """
  wide = np.asarray(expected, np.float64)
  difference = np.linalg.norm(np.asarray(found, np.float64) - wide, axis=-1)
  size = np.linalg.norm(wide, axis=-1) if scale is None else scale
  tiny = np.finfo(np.float32).tiny
  return float(np.max(difference / np.maximum(size, tiny)))


def _scale(place: Place, trace: Trace) -> Float[np.ndarray, " T"] | None:
  """Of a sum that may cancel, the larger of what went in and what came out."""
  if place.part != "residual":
    return None
  assert place.layer is not None
  before = (
    Place("residual", place.layer - 1) if place.layer else Place("embedding")
  )
  into, out = (np.linalg.norm(trace[at], axis=-1) for at in (before, place))
  return np.maximum(into, out)


def _is_part(module: nn.Module, method: str) -> bool:
  del module
  return method == "__call__"


def _feed_forward(layer: Any) -> Any:
  """The output of an FFN, or of a mixture, which answers with statistics."""
  name = DENSE if DENSE in layer else EXPERTS
  out = layer[name]["__call__"][0]
  return out[0] if isinstance(out, tuple) else out


@functools.partial(jax.jit, static_argnames=("config", "has_experts"))
def _captured_block(
  config: ModelConfig,
  params: Params,
  x: Float[Array, "B T D"],
  *,
  has_experts: bool,
) -> dict[Part, Float[Array, "B T D"]]:
  positions = jnp.arange(x.shape[1])[None]
  out: Any
  out, variables = Block(config, has_experts=has_experts).apply(
    {"params": params},
    x,
    None,
    rotary.tables_of(config, positions),
    jnp.ones_like(positions),
    capture_intermediates=_is_part,
    mutable=["intermediates"],
  )
  captured: Any = variables["intermediates"]
  return {
    "attention": captured["attention"]["__call__"][0][0],
    "feed-forward": _feed_forward(captured),
    "residual": out[0],
  }


def _head(
  config: ModelConfig, params: Params, x: Float[Array, "B T D"]
) -> Float[Array, "B T V"]:
  if config.tied_embeddings:
    tied: Any = Embedding(config)
    return tied.apply({"params": params["embedding"]}, x, method="attend")
  head: Any = LMHead(config)
  return head.apply({"params": params["lm_head"]}, x)
