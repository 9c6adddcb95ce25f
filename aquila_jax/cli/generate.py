"""Continues texts with a MODEL; one text is shown as it grows.

python -m aquila_jax.cli.generate --model=MODEL --prompt="The river"

Several --prompt, or the lines of --prompts_file, are continued together and
printed in order, an empty line between two texts; --json prints an object a
line instead. What a prompt gives does not depend on the others, but for the
random numbers, which its place in the list decides.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags, logging
from etils import epath

from aquila_jax.cli import app, model_flags
from aquila_jax.core import errors
from aquila_jax.generation.generate import (
  Generation,
  TextModel,
  encode_prompts,
  generate,
  stream,
  text_model,
)
from aquila_jax.generation.sampling import Sampling
from aquila_jax.generation.tokens import Timing
from aquila_jax.training.compilation import enable_compilation_cache

_MODEL = flags.DEFINE_string("model", None, "A MODEL.", required=True)
_PROMPT: Any = flags.DEFINE_multi_string(
  "prompt", None, "Begins the text; may be given several times."
)
_PROMPTS_FILE = flags.DEFINE_string(
  "prompts_file",
  "",
  'One prompt a line, or in a .jsonl file {"prompt": ...} a line.',
)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "At most.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 is greedy.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "0 keeps the whole vocabulary.")
_TOP_P = flags.DEFINE_float("top_p", 0.95, "1 keeps the whole vocabulary.")
_STOP_TOKEN: Any = flags.DEFINE_multi_string(
  "stop_token",
  None,
  "Ends a text: an id, or a token of the tokenizer; -1 is none; may be given"
  " several times. By default the model's own.",
)
_BATCH_SIZE: Any = flags.DEFINE_integer(
  "batch_size", 8, "Of several prompts, so many at a time.", lower_bound=1
)
_JSON = flags.DEFINE_bool(
  "json", False, "Prints prompt, text, tokens and what ended them as JSON."
)
_SEED = model_flags.define_seed("Of the sampling.")
_MESH = model_flags.define_mesh()


def main() -> None:
  prompts = _prompts()
  sampling = Sampling(
    max_new_tokens=_MAX_NEW_TOKENS.value,
    temperature=_TEMPERATURE.value,
    top_k=_TOP_K.value,
    top_p=_TOP_P.value,
    seed=_SEED.value,
  )
  model = text_model(
    model_flags.load(
      _MODEL.value,
      flag="model",
      with_optimizer=False,
      mesh=model_flags.mesh_of(_MESH.value),
    )
  )
  sampling = dataclasses.replace(sampling, stop_tokens=_stop_tokens(model))
  enable_compilation_cache()
  timing = Timing()
  if len(prompts) == 1 and not _JSON.value:
    _show_growing(model, prompts[0], sampling=sampling, timing=timing)
  else:
    _print_all(model, prompts, sampling=sampling, timing=timing)
  logging.info("%s", timing.in_words())


def _show_growing(
  model: TextModel, prompt: str, *, sampling: Sampling, timing: Timing
) -> None:
  pieces = stream(model, prompt, sampling=sampling, timing=timing)
  first = next(pieces, "")  # a prompt that is refused is not shown
  sys.stdout.write(prompt + first)
  sys.stdout.flush()
  for piece in pieces:
    sys.stdout.write(piece)
    sys.stdout.flush()
  sys.stdout.write("\n")
  sys.stdout.flush()


def _print_all(
  model: TextModel,
  prompts: Sequence[str],
  *,
  sampling: Sampling,
  timing: Timing,
) -> None:
  # Refused before the first text, not after many.
  encode_prompts(
    prompts,
    tokenizer=model.tokenizer,
    context_length=model.config.context_length,
  )
  for start in range(0, len(prompts), _BATCH_SIZE.value):
    batch = prompts[start : start + _BATCH_SIZE.value]
    found = generate(
      model,
      batch,
      sampling=sampling,
      row_ids=range(start, start + len(batch)),
      timing=timing,
    )
    for row, (prompt, one) in enumerate(zip(batch, found, strict=True)):
      if _JSON.value:
        print(_as_json(prompt, one))
      else:
        print(("\n" if start + row else "") + prompt + one.text)
    sys.stdout.flush()


def _as_json(prompt: str, one: Generation) -> str:
  return json.dumps(
    dict(
      prompt=prompt, text=one.text, tokens=one.tokens, ended_by=one.ended_by
    ),
    ensure_ascii=False,
  )


def _prompts() -> list[str]:
  """Of --prompt or --prompts_file; without either the empty text."""
  path = _PROMPTS_FILE.value
  if not path:
    return [""] if _PROMPT.value is None else _PROMPT.value
  if _PROMPT.value is not None:
    raise errors.UserError(
      "--prompt and --prompts_file are both given; expected one of them"
    )
  try:
    text = epath.Path(path).expanduser().read_text()
  except UnicodeDecodeError as error:
    raise errors.UserError(
      f"--prompts_file={path!r}: is not valid UTF-8"
    ) from error
  except OSError as error:
    raise errors.UserError(
      f"--prompts_file={path!r}: cannot be read: {error.strerror}"
    ) from error
  lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line]
  if not lines:
    raise errors.UserError(f"--prompts_file={path!r}: has no prompts")
  if not path.endswith(".jsonl"):
    return [line for _, line in lines]
  return [_from_json(line, where=f"{path!r}: line {i}") for i, line in lines]


def _from_json(line: str, *, where: str) -> str:
  try:
    return _text(json.loads(line)["prompt"])
  except (ValueError, KeyError, TypeError) as error:
    raise errors.UserError(
      f'--prompts_file={where}: expected {{"prompt": a text}}'
    ) from error


def _text(value: Any) -> str:
  if not isinstance(value, str):
    raise TypeError
  return value


def _stop_tokens(model: TextModel) -> tuple[int, ...] | None:
  """Ids of --stop_token; None where it is not given."""
  if _STOP_TOKEN.value is None:
    return None
  found = []
  for name in _STOP_TOKEN.value:
    token = int(name) if name.isdecimal() else None
    if token is None and name != "-1":
      token = model.tokenizer.token_to_id(name)
    if name != "-1" and (token is None or token >= model.config.vocab_size):
      raise errors.UserError(
        f"--stop_token={name!r}: is no token of the model; expected an id below"
        f" {model.config.vocab_size}, or the text of a token"
      )
    if token is not None:
      found.append(token)
  return tuple(found)


if __name__ == "__main__":
  app.run(main)
