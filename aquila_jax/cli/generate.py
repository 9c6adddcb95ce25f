"""Continues a text with a MODEL, shown as it grows.

python -m aquila_jax.cli.generate --model=MODEL --prompt="The river"
"""

from __future__ import annotations

import sys

from absl import flags

from aquila_jax.cli import app, model_flags
from aquila_jax.generation.generate import stream, text_model
from aquila_jax.generation.sampling import Sampling
from aquila_jax.training.compilation import enable_compilation_cache

_MODEL = flags.DEFINE_string("model", None, "A MODEL.", required=True)
_PROMPT = flags.DEFINE_string("prompt", "", "Begins the text.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "At most.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 is greedy.")
_TOP_P = flags.DEFINE_float("top_p", 0.95, "1 keeps the whole vocabulary.")
_SEED = model_flags.define_seed("Of the sampling.")


def main() -> None:
  sampling = Sampling(
    max_new_tokens=_MAX_NEW_TOKENS.value,
    temperature=_TEMPERATURE.value,
    top_p=_TOP_P.value,
    seed=_SEED.value,
  )
  model = model_flags.load(_MODEL.value, flag="model", with_optimizer=False)
  enable_compilation_cache()
  pieces = stream(text_model(model), _PROMPT.value, sampling=sampling)
  first = next(pieces, "")  # a prompt that is refused is not shown
  sys.stdout.write(_PROMPT.value + first)
  sys.stdout.flush()
  for piece in pieces:
    sys.stdout.write(piece)
    sys.stdout.flush()
  sys.stdout.write("\n")


if __name__ == "__main__":
  app.run(main)
