"""How the next token is chosen: greedy, or by temperature, top-k and top-p."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from aquila_jax.core import errors
from aquila_jax.core.types import Leaf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """The options of a generation.

  Temperature is applied first, then top_k, then top_p to what top_k kept. The
  same seed gives the same text, row by row: each prompt has a key of its own,
  made from the seed and its place in the list.
  """

  max_new_tokens: int = 64
  temperature: float = 1.0  # 0 is greedy
  top_k: int = 0  # so many tokens are kept; 0 keeps the whole vocabulary
  top_p: float = 1.0  # 1 keeps the whole vocabulary
  seed: int = 0
  # Each ends a text and is no part of it; () never stops. None is the model's
  # own, or where it names none its tokenizer's end of text.
  stop_tokens: tuple[int, ...] | None = None

  def __post_init__(self):
    if self.max_new_tokens < 1:
      raise errors.UserError(f"max_new_tokens={self.max_new_tokens}: need >= 1")
    if not 0 <= self.temperature < float("inf"):
      raise errors.UserError(f"temperature={self.temperature}: need >= 0")
    if self.top_k < 0:
      raise errors.UserError(f"top_k={self.top_k}: need >= 0; 0 keeps all")
    if not 0 < self.top_p <= 1:
      raise errors.UserError(f"top_p={self.top_p}: need 0 < top_p <= 1")
    if any(token < 0 for token in self.stop_tokens or ()):
      raise errors.UserError(
        f"stop_tokens={self.stop_tokens}: need ids >= 0; () never stops"
      )


class Chooser(struct.PyTreeNode):
  """`Sampling` on the device. Only `greedy` selects a program."""

  temperature: Leaf  # float32 []
  top_k: Leaf  # int []; 0 keeps all
  top_p: Leaf  # float32 []
  vocab_size: Leaf  # int []; ids from here on have no text and are not chosen
  row_keys: Leaf  # key [B]
  greedy: bool = struct.field(pytree_node=False)


def make_chooser(
  sampling: Sampling,
  *,
  batch_size: int,
  vocab_size: int,
  row_ids: Int[np.ndarray, "B"] | None = None,
) -> Chooser:
  """Places the options, and a key for each row.

  Args:
    sampling: the options.
    batch_size: B.
    vocab_size: of the tokenizer; a model's table may be larger.
    row_ids: the number of each row, which with the seed makes its key; None
      counts from 0.

  Returns:
    The argument of `choose`.
  """
  rows = jnp.arange(batch_size) if row_ids is None else jnp.asarray(row_ids)
  fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
  return Chooser(
    temperature=jnp.asarray(sampling.temperature, jnp.float32),
    # No vocabulary is larger, so that more is all.
    top_k=jnp.asarray(min(sampling.top_k, 2**31 - 1), jnp.int32),
    top_p=jnp.asarray(sampling.top_p, jnp.float32),
    vocab_size=jnp.asarray(vocab_size, jnp.int32),
    row_keys=fold(jax.random.key(sampling.seed), rows),
    greedy=sampling.temperature == 0,
  )


def nucleus(
  logits: Float[Array, "B V"],
  top_p: Float[Array, ""],
  *,
  top_k: Int[Array, ""] | int = 0,
) -> tuple[Bool[Array, "B V"], Int[Array, "B V"]]:
  """The smallest set of most probable tokens that holds at least top_p.

  Nucleus sampling (arXiv 1904.09751, equation 2): a token is kept where the
  probability of all tokens before it in the order is below top_p, so the first
  always is. On ties the lower id comes first.

  Args:
    logits: of the next token, temperature applied.
    top_p: the mass to keep; 1 keeps everything.
    top_k: the most probable tokens, so many, to which the probabilities are
      confined beforehand; 0 confines to nothing.

  Returns:
    For every rank whether it is kept, and the token of every rank.
  """
  order = jnp.argsort(-logits, axis=-1, stable=True)
  ranked = jnp.take_along_axis(logits, order, axis=-1)
  highest = (jnp.arange(logits.shape[-1])[None] < top_k) | (top_k == 0)
  ranked = jnp.where(highest, ranked, -jnp.inf)
  probability = jax.nn.softmax(ranked, axis=-1)
  before = jnp.cumsum(probability, axis=-1) - probability
  # Rounding may bring the sum to 1 before the last rank.
  return highest & ((before < top_p) | (top_p >= 1)), order


def choose(
  logits: Float[Array, "B V"], chooser: Chooser, *, step: Int[Array, ""]
) -> Int[Array, "B"]:
  """The next token of every row.

  Args:
    logits: of the next token.
    chooser: of `make_chooser`.
    step: tokens generated before; makes the keys of this choice.

  Returns:
    Token ids.
  """
  logits = logits.astype(jnp.float32)
  known = jnp.arange(logits.shape[-1]) < chooser.vocab_size
  logits = jnp.where(known[None], logits, -jnp.inf)
  if chooser.greedy:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  # The largest becomes 0 first: however small the temperature, no quotient
  # overflows upwards.
  logits = logits - jnp.max(logits, axis=-1, keepdims=True)
  tiny = jnp.finfo(jnp.float32).tiny
  logits = logits / jnp.maximum(chooser.temperature, tiny)
  kept, order = nucleus(logits, chooser.top_p, top_k=chooser.top_k)
  ranked = jnp.take_along_axis(logits, order, axis=-1)
  keys = _step_keys(chooser.row_keys, step)
  ranks = jax.vmap(jax.random.categorical)(
    keys, jnp.where(kept, ranked, -jnp.inf)
  )
  chosen = jnp.take_along_axis(order, ranks[:, None], axis=-1)[:, 0]
  return chosen.astype(jnp.int32)


def _step_keys(
  row_keys: Key[Array, "B"], step: Int[Array, ""]
) -> Key[Array, "B"]:
  return jax.vmap(jax.random.fold_in, in_axes=(0, None))(row_keys, step)
