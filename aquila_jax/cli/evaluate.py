"""How well a MODEL predicts text, or what it scores on tasks.

  python -m aquila_jax.cli.evaluate --model=MODEL --data=DATA [--output=FILE]
  python -m aquila_jax.cli.evaluate --model=MODEL --tasks=NAME[,NAME...] \
    [--output=FILE] [--samples=FILE]

DATA is a directory of prepare_data, or text: a .txt, .jsonl[.gz|.zst] or
.parquet file, a folder or glob of such, corpus:NAME or hf:NAME. It gives loss,
perplexity and bits per byte, by language.

Tasks are those of lm-evaluation-harness (the extra `eval`), of the folders of
--include_path, and hellaswag_100, truthfulqa_mc1_100 and gsm8k_100, which need
no hub. --tasks=list shows all names.
"""

from __future__ import annotations

import pathlib
from typing import Any

from absl import flags

from aquila_jax.cli import app, model_flags, task_flags
from aquila_jax.core import errors
from aquila_jax.core.experiment_config import SourceConfig
from aquila_jax.core.model_dir import StoredModel
from aquila_jax.data import prepared, raw_text
from aquila_jax.data.prepared import PreparedData
from aquila_jax.data.tokenizer import Tokenizer
from aquila_jax.evaluation.perplexity import evaluate
from aquila_jax.evaluation.tables import scores_table
from aquila_jax.generation.generate import end_of_text, text_model
from aquila_jax.pipeline.context import say_on_stderr
from aquila_jax.training.compilation import enable_compilation_cache

_MODEL: Any = flags.DEFINE_string("model", None, "A MODEL.")
_DATA: Any = flags.DEFINE_string("data", None, "Prepared data or text.")
_OUTPUT = flags.DEFINE_string("output", "", "A JSON file for the scores.")
_SPLIT: Any = flags.DEFINE_enum(
  "split", "test", ["validation", "test"], "Of prepared data."
)
_LANGUAGE: Any = flags.DEFINE_string("language", "text", "Of text: its name.")
_TEXT_FIELD: Any = flags.DEFINE_string(
  "text_field", "text", "Of .jsonl and .parquet rows."
)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size",
  None,
  "Rows at a time; by default 16 of data, 32 of tasks.",
  lower_bound=1,
)
_SEQUENCE_LENGTH = flags.DEFINE_integer(
  "sequence_length", 0, "Of a row; 0 is the model's context.", lower_bound=0
)
_MAX_TOKENS = flags.DEFINE_integer(
  "max_tokens", 0, "Of a language; 0 is all.", lower_bound=0
)

_OF_DATA = (_SPLIT, _LANGUAGE, _TEXT_FIELD, _SEQUENCE_LENGTH, _MAX_TOKENS)


def main() -> None:
  if task_flags.wants_list():
    task_flags.print_list()
    return
  if _MODEL.value is None:
    raise errors.UserError("--model must be given; --help lists the flags")
  if (_DATA.value is None) == (not task_flags.TASKS.value):
    raise errors.UserError("give --data or --tasks, and not both")
  if _OUTPUT.value:
    model_flags.check_output(_OUTPUT.value)
  if _DATA.value is None:
    model_flags.refuse_given(
      *_OF_DATA, why="is of --data; this evaluates --tasks"
    )
    _on_tasks()
  else:
    model_flags.refuse_given(
      *task_flags.OTHERS, why="is of --tasks; this evaluates --data"
    )
    _on_data()


def _on_tasks() -> None:
  task_flags.check()
  model = model_flags.load(_MODEL.value, flag="model", with_optimizer=False)
  enable_compilation_cache()
  record = task_flags.run(
    model, title=_MODEL.value, batch_size=_BATCH_SIZE.value
  )
  if _OUTPUT.value:
    model_flags.write_json(_OUTPUT.value, {"model": _MODEL.value} | record)


def _on_data() -> None:
  model = model_flags.load(_MODEL.value, flag="model", with_optimizer=False)
  length = model_flags.row_length(_SEQUENCE_LENGTH.value, model.config)
  data = _data(model)
  enable_compilation_cache()
  scores = evaluate(
    model.config,
    model.params,
    data=data,
    split=_SPLIT.value,
    sequence_length=length,
    batch_size=_BATCH_SIZE.value or 16,
    max_tokens=_MAX_TOKENS.value,
  )
  print(scores_table(scores).plain(f"{_MODEL.value} on {_DATA.value}"))
  if _OUTPUT.value:
    record = {"model": _MODEL.value, "data": _DATA.value} | scores.to_json()
    model_flags.write_json(_OUTPUT.value, record)


def _data(model: StoredModel) -> PreparedData:
  path = _DATA.value
  if (pathlib.Path(path).expanduser() / prepared.HEADER).exists():
    model_flags.refuse_given(
      _LANGUAGE, _TEXT_FIELD, why="is of text; --data is prepared data"
    )
    data = PreparedData.open(path, what="--data")
    if not data.tokenizes_as(model.tokenizer):
      raise errors.UserError(
        f"--data={path!r}: it was prepared with another tokenizer than the"
        " model's; give the text itself, or data prepared with"
        f" config.data.tokenizer.path='{_MODEL.value}/tokenizer.json'"
      )
    return data
  model_flags.refuse_given(_SPLIT, why="is of prepared data; --data is text")
  source = SourceConfig(
    path=path, language=_LANGUAGE.value, text_field=_TEXT_FIELD.value
  )
  tokenizer = _tokenizer(model)
  try:
    data = raw_text.tokenize(
      source,
      tokenizer=tokenizer,
      field="--data",
      progress=say_on_stderr,
      split=_SPLIT.value,
    )
  except errors.UserError as error:
    message = str(error).replace("--data.path", "--data")
    raise errors.UserError(message) from error
  if not data.tokens(_SPLIT.value):
    raise errors.UserError(f"--data={path!r}: there is no text in it")
  return data


def _tokenizer(model: StoredModel) -> Tokenizer:
  """The model's, framed as in training: end of text around every document."""
  backend = text_model(model).tokenizer
  token_id = end_of_text(backend)
  what = f"{_MODEL.value}/tokenizer.json"
  if token_id is None:
    raise errors.UserError(f"{what}: names no token that ends a document")
  end = backend.id_to_token(token_id)
  assert end is not None, token_id
  return Tokenizer(backend, end_of_text=end, what=what)


if __name__ == "__main__":
  app.run(main)
