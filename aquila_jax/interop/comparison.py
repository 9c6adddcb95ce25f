"""Whether another implementation of a model computes what ours does.

Both are given the same tokens in float32. Where the reference's two best logits
are further apart than twice the tolerance, the choice between them is decided:
both implementations must then have the same best token, and continue the text
with it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from aquila_jax.core import errors
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.model_dir import StoredModel
from aquila_jax.core.types import Params
from aquila_jax.interop import families
from aquila_jax.interop.tracing import Trace
from aquila_jax.models.decoder_lm import DecoderLM

# What a comparison reads where nothing is given: prose, speech, numbers, code,
# other alphabets, and characters that tokenizers cut into bytes.
TEXTS = (
  "The river rose in the night, and by morning 1234 houses were under water.",
  "Bread needs flour, water, salt and time, and of the four it is time that"
  " most bakers try to save.",
  "Once upon a time, there was a   little girl's dog.\n\nShe said:"
  ' "Hello, world!"',
  "In 1969, 3.14159 * 2 = 6.28318; the meeting is on 2024-11-25 at 09:30.",
  "def area(radius):\n    return 3.14159 * radius**2\n",
  "La fiancée du garçon mange une crêpe à l'hôtel; der Fluß ist größer.",
  "中文的句子，与 emoji 😀 一起。",
)

# Rows are padded to a power of two from here on, so that few are compiled.
_SHORTEST_ROW = 16


@runtime_checkable
class Reference(Protocol):
  """Another implementation of the model."""

  @property
  def vocab_size(self) -> int: ...

  @property
  def num_layers(self) -> int: ...

  def logits(self, tokens: Sequence[int]) -> Float[np.ndarray, "T V"]:
    """Of the next token, for every token of a text."""
    ...

  def continuation(self, tokens: Sequence[int], *, count: int) -> list[int]:
    """`count` greedy tokens behind a text."""
    ...

  def trace(self, tokens: Sequence[int]) -> Trace:
    """The outputs of every part."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class OurModel:
  """Our side, in float32."""

  config: ModelConfig
  params: Params
  # Continues a text by so many greedy tokens; given from outside, because
  # generation is a package beside this one.
  continuation: Callable[[OurModel, Sequence[int], int], Sequence[int]]

  def logits(self, tokens: Sequence[int]) -> Float[np.ndarray, "T V"]:
    """Of the next token, for every token of a text."""
    length = max(_SHORTEST_ROW, 1 << (len(tokens) - 1).bit_length())
    row = np.zeros((1, length), np.int32)
    row[0, : len(tokens)] = tokens
    valid = np.arange(length)[None] < len(tokens)
    logits = _logits(self.config, self.params, jnp.asarray(row), valid)
    return np.asarray(logits)[0, : len(tokens)]


def in_float32(stored: StoredModel) -> tuple[ModelConfig, Params]:
  """A stored model as it is compared: float32, dropless, nothing recomputed.

  Raises:
    errors.UserError: on a growth mask, which no stock class has.
  """
  config = stored.config
  families.check_no_mask(config)
  moe = config.moe
  if moe is not None:
    moe = dataclasses.replace(moe, capacity_factor=None)
  config = dataclasses.replace(
    config,
    moe=moe,
    remat="none",
    attention_implementation=None,
    param_dtype="float32",
    compute_dtype="float32",
  )
  params = jax.tree.map(
    lambda leaf: jnp.asarray(leaf, jnp.float32), stored.params
  )
  return config, params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continuation:
  """Two greedy continuations of one text."""

  asked: int  # tokens
  same: int  # tokens before they part; `asked` where they do not
  # Of the reference's two best logits, where they part; None where they do not.
  gap: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextComparison:
  """Two implementations on one text and the reference's continuation of it."""

  num_tokens: int  # of the text
  largest_difference: float  # of two logits
  num_logits: int  # places with logits: the text's and the continuation's
  decided: int  # of these places
  same_best: int  # of the decided places
  continuation: Continuation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
  """Two implementations on several texts."""

  tolerance: float
  texts: list[TextComparison]

  @property
  def largest_difference(self) -> float:
    """NaN where one of them is."""
    return float(np.max([text.largest_difference for text in self.texts]))

  @property
  def failures(self) -> list[str]:
    """What is not as it should be, text by text; none is agreement."""
    return [
      f"text {number}: {failure}"
      for number, text in enumerate(self.texts, 1)
      for failure in _failures(text, self.tolerance)
    ]

  def to_json(self) -> dict[str, Any]:
    return {
      "tolerance": self.tolerance,
      "agree": not self.failures,
      "failures": self.failures,
      "largest_difference": self.largest_difference,
      "texts": [dataclasses.asdict(text) for text in self.texts],
    }


def _failures(text: TextComparison, tolerance: float) -> list[str]:
  found = []
  if not text.largest_difference <= tolerance:
    found.append(
      f"logits differ by {text.largest_difference:.1e}; expected at most"
      f" {tolerance:.1e}"
    )
  if text.same_best < text.decided:
    found.append(
      f"{text.decided - text.same_best} of {text.decided} decided tokens have"
      " another best token"
    )
  continuation = text.continuation
  if continuation.gap is not None and not continuation.gap <= 2 * tolerance:
    found.append(
      f"the continuations part after {continuation.same} tokens, where the two"
      f" best logits are {continuation.gap:.1e} apart"
    )
  return found


def check_same_shape(config: ModelConfig, reference: Reference) -> None:
  """Refuses to compare what cannot be the same model.

  Raises:
    errors.UserError: where sizes differ.
  """
  for name, ours, theirs in (
    ("vocab_size", config.vocab_size, reference.vocab_size),
    ("num_layers", config.num_layers, reference.num_layers),
  ):
    if ours != theirs:
      raise errors.UserError(
        f"the reference has {name}={theirs}, the MODEL {ours}; they are not"
        " the same model"
      )


def compare(
  ours: OurModel,
  texts: Sequence[Sequence[int]],
  *,
  reference: Reference,
  tolerance: float,
  continue_tokens: int,
) -> Comparison:
  """Compares logits, best tokens and greedy continuations.

  Args:
    ours: our model.
    texts: tokens, at least one a text.
    reference: the other implementation.
    tolerance: the largest difference of two logits.
    continue_tokens: how far both continue every text; 0 is not at all.

  Returns:
    The comparison.
  """
  return Comparison(
    tolerance=tolerance,
    texts=[
      _compare_text(
        ours,
        list(tokens),
        reference=reference,
        tolerance=tolerance,
        count=continue_tokens,
      )
      for tokens in texts
    ],
  )


def _compare_text(
  ours: OurModel,
  tokens: list[int],
  *,
  reference: Reference,
  tolerance: float,
  count: int,
) -> TextComparison:
  continued = reference.continuation(tokens, count=count) if count else []
  expected = reference.logits(tokens + continued)
  found = ours.logits(tokens + continued)
  gaps = best_gaps(expected)
  decided = gaps > 2 * tolerance
  same = _same_start(
    continued, ours.continuation(ours, tokens, count) if count else []
  )
  # The logits that chose a token stand at the token before it.
  parted = None if same == count else float(gaps[len(tokens) - 1 + same])
  return TextComparison(
    num_tokens=len(tokens),
    largest_difference=float(np.max(np.abs(found - expected))),
    num_logits=len(expected),
    decided=int(decided.sum()),
    same_best=int(
      (found.argmax(axis=-1) == expected.argmax(axis=-1))[decided].sum()
    ),
    continuation=Continuation(asked=count, same=same, gap=parted),
  )


def best_gaps(logits: Float[np.ndarray, "T V"]) -> Float[np.ndarray, " T"]:
  """How far the two best logits of every token are apart."""
  best = np.partition(logits, -2, axis=-1)[:, -2:]
  return best[:, 1] - best[:, 0]


def _same_start(one: Sequence[int], other: Sequence[int]) -> int:
  """How many tokens are the same before the first that is not."""
  pairs = zip(one, other, strict=True)
  return next((i for i, (a, b) in enumerate(pairs) if a != b), len(one))


@functools.partial(jax.jit, static_argnames="config")
def _logits(
  config: ModelConfig,
  params: Params,
  row: Int[Array, "B T"],
  valid: Bool[np.ndarray, "B T"] | Bool[Array, "B T"],
) -> Float[Array, "B T V"]:
  # As torch computes: not in TF32 or bfloat16 where an accelerator would.
  with jax.default_matmul_precision("highest"):
    out: Any = DecoderLM(config).apply(
      {"params": params},
      row,
      positions=jnp.arange(row.shape[1])[None],
      segments=valid.astype(jnp.int32),
    )
  return out.logits
