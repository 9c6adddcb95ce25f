"""Texts as ids, with the beginnings that evaluation harnesses agree on."""

from __future__ import annotations

from collections.abc import Iterable

from aquila_jax.core import errors
from aquila_jax.generation.generate import TextModel, end_of_text, stop_tokens


class TextCodec:
  """Encodes and decodes as lm-evaluation-harness does for causal models.

  Special tokens are those that the tokenizer itself puts around a text. A text
  that already begins with the prefix token gets none.

  Args:
    model: the model, for its tokenizer and its stop tokens.
    add_bos_token: whether special tokens are put around texts; None is True.
    prefix_token_id: stands in front of what has no context; None is the token
      that the tokenizer begins every text with, or else the one that the
      model's makers call its beginning, or else the one that ends a text.

  Raises:
    errors.UserError: where there is no such token, or the model has no row for
      it.
  """

  def __init__(
    self,
    model: TextModel,
    *,
    add_bos_token: bool | None = None,
    prefix_token_id: int | None = None,
  ):
    self._tokenizer = model.tokenizer
    self._vocab_size = model.config.vocab_size
    self._add_special = add_bos_token is not False
    self._begin_token = model.begin_token
    self.stop_tokens = stop_tokens(model)
    self.eot_token_id = self.stop_tokens[0] if self.stop_tokens else None
    if prefix_token_id is None:
      prefix_token_id = self._begins_with()
    if prefix_token_id is None:
      raise errors.UserError(
        "the MODEL's tokenizer.json names no token that begins or ends a text;"
        " give prefix_token_id"
      )
    if not 0 <= prefix_token_id < self._vocab_size:
      raise errors.UserError(
        f"prefix_token_id={prefix_token_id}: need 0 <= id <"
        f" vocab_size={self._vocab_size}"
      )
    self.prefix_token_id = prefix_token_id
    self._prefix = self.decode([prefix_token_id], skip_special_tokens=False)

  def _begins_with(self) -> int | None:
    begins = self._tokenizer.encode("").ids
    if begins:
      return begins[0]
    if self._begin_token is not None:
      return self._begin_token
    if self.eot_token_id is not None:
      return self.eot_token_id
    return end_of_text(self._tokenizer)

  def encode(
    self, text: str, *, add_special_tokens: bool | None = None
  ) -> list[int]:
    """The ids of a text.

    Args:
      text: any.
      add_special_tokens: None is as the class says.

    Returns:
      Ids, all of which the model has a row for.

    Raises:
      errors.UserError: where the tokenizer has an id that the model has not.
    """
    if add_special_tokens is None:
      begun = bool(self._prefix) and text.startswith(self._prefix)
      add_special_tokens = self._add_special and not begun
    encoding = self._tokenizer.encode(
      text, add_special_tokens=add_special_tokens
    )
    ids = encoding.ids
    if ids and max(ids) >= self._vocab_size:
      raise errors.UserError(
        f"the MODEL's tokenizer.json has the id {max(ids)}; the model's"
        f" vocab_size is {self._vocab_size}"
      )
    return ids

  def decode(
    self, ids: Iterable[int], *, skip_special_tokens: bool = True
  ) -> str:
    return self._tokenizer.decode(
      list(ids), skip_special_tokens=skip_special_tokens
    )
