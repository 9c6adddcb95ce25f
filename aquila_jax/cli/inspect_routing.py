"""Where a mixture of experts sends its tokens: one page that needs no network.

  python -m aquila_jax.cli.inspect_routing --model=MODEL --data=DATA \
    [--output=routing.html] [--json]
  python -m aquila_jax.cli.inspect_routing --model=MODEL \
    --text=zh:FILE,en:FILE [--parent=MODEL]

DATA is a directory of prepare_data. The page has the load of every expert, by
language and by class of token, the typical tokens of each expert, the pairs
that are met together, and how far experts have moved from each other and from
what they were made of.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from absl import flags
from etils import epath

from aquila_jax.cli import app, growth_flags, model_flags, routing_parent
from aquila_jax.core import errors, files
from aquila_jax.core.model_dir import ModelReader, open_model
from aquila_jax.core.types import Batch
from aquila_jax.data import prepared, token_store
from aquila_jax.data.prepared import PreparedData, PreparedSource
from aquila_jax.evaluation.routing import reading, routing_page
from aquila_jax.evaluation.routing.cosines import cosines
from aquila_jax.evaluation.routing.counts import RoutingCounts
from aquila_jax.evaluation.routing.inspection import (
  Inspection,
  Options,
  inspection,
)
from aquila_jax.evaluation.routing.token_text import TokenText
from aquila_jax.models import decoder_lm
from aquila_jax.models.causality import warn_unless_causal
from aquila_jax.pipeline.context import say_on_stderr
from aquila_jax.training.compilation import enable_compilation_cache

_MODEL: Any = flags.DEFINE_string(
  "model", None, "A MODEL with experts.", required=True
)
_DATA: Any = flags.DEFINE_string("data", None, "Prepared data.")
_TEXT: Any = flags.DEFINE_list(
  "text", None, "In place of data: files, or domain:file of several."
)
_OUTPUT: Any = flags.DEFINE_string("output", "routing.html", "The page.")
_JSON = flags.DEFINE_bool(
  "json", False, "All numbers as well, beside the page, with the ending .json."
)
_PARENT: Any = flags.DEFINE_string(
  "parent",
  None,
  "The MODEL whose FFNs became experts; by default that of the lineage, if it"
  " is there. Empty for none.",
)
_SPLIT: Any = flags.DEFINE_enum(
  "split", "test", ["train", "validation", "test"], "Of prepared data."
)
_LANGUAGE: Any = flags.DEFINE_list(
  "language", None, "Of prepared data, some of its languages; all by default."
)
_MAX_TOKENS: Any = flags.DEFINE_integer(
  "max_tokens", 65536, "Of a language or domain; 0 is all.", lower_bound=0
)
_BATCH_SIZE: Any = flags.DEFINE_integer(
  "batch_size", 16, "Rows at a time.", lower_bound=1
)
_SEQUENCE_LENGTH: Any = flags.DEFINE_integer(
  "sequence_length", 0, "Of a row; 0 is the model's context.", lower_bound=0
)
_DEAD: Any = flags.DEFINE_float(
  "dead",
  0.01,
  "An expert is dead whose load is below this fraction of an even share.",
  lower_bound=0,
  upper_bound=1,
)
_MIN_COUNT: Any = flags.DEFINE_integer(
  "min_count",
  20,
  "How often a token must occur to be typical of an expert, and a class of"
  " tokens to be shown.",
  lower_bound=1,
)
_TYPICAL: Any = flags.DEFINE_integer(
  "typical", 12, "Typical tokens of an expert, at most.", lower_bound=1
)


def main() -> None:
  if (_DATA.value is None) == (_TEXT.value is None):
    raise errors.UserError("give --data or --text, and not both")
  page, numbers = _outputs()
  model = open_model(
    _MODEL.value, like=decoder_lm.abstract_params, what="--model"
  )
  if model.model.config.moe is None:
    raise errors.UserError(
      f"--model={_MODEL.value!r}: it is dense, and has no experts to inspect"
    )
  family, in_words = routing_parent.find_family(
    model, path=_MODEL.value, given=_PARENT.value
  )
  data = _of_text(model) if _DATA.value is None else _of_data(model)
  languages = data.languages if _LANGUAGE.value is None else _LANGUAGE.value
  counts = _read(model, data, languages=languages)
  found = inspection(
    counts,
    model=_MODEL.value,
    text=_text_in_words(),
    config=model.model.config,
    options=Options(
      dead=_DEAD.value, min_count=_MIN_COUNT.value, typical=_TYPICAL.value
    ),
    domain_noun="domain" if _DATA.value is None else "language",
    domains=data.languages,
    token_text=TokenText(model.model.tokenizer),
    cosines=cosines(
      model.model.config,
      model.params,
      family=family,
      say=model_flags.now_and_then(),
    ),
    parent=in_words,
  )
  _write(found, page, numbers)


def _outputs() -> tuple[epath.Path, epath.Path | None]:
  """The page, and the file of --json where it is wanted."""
  page = epath.Path(_OUTPUT.value).expanduser()
  model_flags.check_output(_OUTPUT.value)
  if not _JSON.value:
    return page, None
  numbers = page.with_suffix(".json")
  if numbers == page:
    raise errors.UserError(
      f"--output={_OUTPUT.value!r}: --json writes that file; expected .html"
    )
  if numbers.exists():
    raise errors.UserError(
      f"--output={_OUTPUT.value!r}: --json writes {str(numbers)!r} beside it,"
      " and that exists; choose another"
    )
  return page, numbers


def _of_data(model: ModelReader) -> PreparedData:
  path = _DATA.value
  data = PreparedData.open(path, what="--data")
  tokenizer = model.model.tokenizer
  if tokenizer is None:
    raise errors.UserError(
      f"--data={path!r}: the MODEL has no tokenizer.json to compare with its"
      " own; give --text"
    )
  if not data.tokenizes_as(tokenizer):
    raise errors.UserError(
      f"--data={path!r}: it was prepared with another tokenizer than the"
      " model's; give --text, or data prepared with"
      f" config.data.tokenizer.path='{_MODEL.value}/tokenizer.json'"
    )
  for name in _LANGUAGE.value or ():
    if name not in data.languages:
      raise errors.unknown_name("--language", name, data.languages)
  return data


def _of_text(model: ModelReader) -> PreparedData:
  """The files of --text as data: a source a file, a document each."""
  model_flags.refuse_given(
    _SPLIT, _LANGUAGE, why="is of --data; this reads --text"
  )
  empty = token_store.in_memory([], 0)
  sources = {}
  for number, part in enumerate(_TEXT.value):
    domain, path = _named(part)
    text = growth_flags.read_text(path, flag="text")
    ids = growth_flags.encode(text, model)
    if not ids:
      raise errors.UserError(f"--text={path!r}: there is no text in it")
    # The last token of a document is only a target: one more, so that all of
    # the text is read.
    store = token_store.in_memory([[*ids, ids[-1]]], len(text.encode()))
    name = f"{number}:{path}"
    sources[name] = PreparedSource(
      name=name,
      language=domain,
      weight=1.0,
      splits={s: store if s == "test" else empty for s in prepared.SPLITS},
    )
  return PreparedData(sources=sources, tokenizer_text="", digest="", card={})


def _named(part: str) -> tuple[str, str]:
  """A domain's name and its file: of domain:file, or of a file alone."""
  name, colon, path = part.partition(":")
  if not colon or path.startswith("//"):  # as in gs://
    name, path = epath.Path(part).name, part
  if not name or not path:
    raise errors.UserError(f"--text={part!r}: expected a file, or domain:file")
  return name, path


def _text_in_words() -> str:
  if _DATA.value is None:
    return ", ".join(_TEXT.value)
  return f"the {_SPLIT.value} split of {_DATA.value}"


def _read(
  model: ModelReader, data: PreparedData, *, languages: Iterable[str]
) -> RoutingCounts:
  config = model.model.config
  warn_unless_causal(config, what="routing")
  batches: Iterable[Batch] = reading.batches(
    data,
    split=_SPLIT.value,
    languages=list(languages),
    batch_size=_BATCH_SIZE.value,
    sequence_length=model_flags.row_length(_SEQUENCE_LENGTH.value, config),
    max_tokens=_MAX_TOKENS.value,
  )
  stored = model_flags.load(_MODEL.value, flag="model", with_optimizer=False)
  enable_compilation_cache()
  say_on_stderr(f"reading {_text_in_words()}")
  return reading.read(
    config,
    stored.params,
    batches,
    num_domains=len(data.languages),
    say=model_flags.now_and_then(),
  )


def _write(
  found: Inspection, page: epath.Path, numbers: epath.Path | None
) -> None:
  if numbers is not None:
    model_flags.write_json(numbers, found.to_json())
  try:
    files.replace_text(page, routing_page.render(found))
  except OSError as error:
    raise errors.UserError(
      f"--output={_OUTPUT.value!r}: cannot be written: {error.strerror}"
    ) from error
  worst = found.worst
  print(
    f"{_OUTPUT.value}: {found.num_tokens:,} tokens; the busiest expert of layer"
    f" {worst.layer} has {worst.max_over_mean:.2f} times an even share; dead"
    f" experts: {found.dead_in_words()}"
  )


if __name__ == "__main__":
  app.run(main)
