"""What an evaluation says of a model: plain numbers, to and from JSON."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

_LARGEST_EXPONENT = 709.0  # of a float64


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageScore:
  """How well a model predicts a body of text.

  `tokens` counts targets: the next tokens inside documents, end of text among
  them. `bytes` is the UTF-8 length of their text, of which end of text has
  none.
  """

  nats: float  # -log probability of all targets together
  tokens: int
  bytes: int

  @property
  def loss(self) -> float:
    """Nats a token."""
    return self.nats / self.tokens

  @property
  def perplexity(self) -> float:
    """exp(loss); depends on the tokenizer."""
    return math.exp(self.loss) if self.loss < _LARGEST_EXPONENT else math.inf

  @property
  def bits_per_byte(self) -> float:
    """Nats / (ln 2 * bytes); comparable between tokenizers."""
    return self.nats / (math.log(2) * self.bytes) if self.bytes else math.inf

  def __add__(self, other: LanguageScore) -> LanguageScore:
    return LanguageScore(
      nats=self.nats + other.nats,
      tokens=self.tokens + other.tokens,
      bytes=self.bytes + other.bytes,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
  """The scores of a model on one split."""

  split: str
  languages: dict[str, LanguageScore]

  @property
  def overall(self) -> LanguageScore:
    """All targets of all languages, each token counting the same."""
    nothing = LanguageScore(nats=0.0, tokens=0, bytes=0)
    return sum(self.languages.values(), nothing)

  def to_json(self) -> dict[str, Any]:
    languages = {
      name: dataclasses.asdict(score)
      | {
        "loss": score.loss,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
      }
      for name, score in (*self.languages.items(), ("overall", self.overall))
    }
    overall = languages.pop("overall")
    return {"split": self.split, "languages": languages, "overall": overall}

  @classmethod
  def from_json(cls, tree: dict[str, Any]) -> Scores:
    """What `to_json` wrote; derived numbers are derived again."""
    fields = [field.name for field in dataclasses.fields(LanguageScore)]
    return cls(
      split=tree["split"],
      languages={
        name: LanguageScore(**{field: score[field] for field in fields})
        for name, score in tree["languages"].items()
      },
    )
