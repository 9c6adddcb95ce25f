"""Text that is evaluated without being prepared: tokenized in memory."""

from __future__ import annotations

import hashlib

from aquila_jax.core.experiment_config import SourceConfig
from aquila_jax.core.packages import Progress
from aquila_jax.data import cleaning, prepared, sources, token_store
from aquila_jax.data.formats import ProblemLog
from aquila_jax.data.prepared import PreparedData, PreparedSource, Split
from aquila_jax.data.tokenizer import Tokenizer


def tokenize(
  source: SourceConfig,
  *,
  tokenizer: Tokenizer,
  field: str,
  progress: Progress,
  split: Split = "test",
) -> PreparedData:
  """Reads all documents of a source into one split, in memory.

  Text is cleaned as prepare_data cleans it; no document is dropped but empty
  ones. Bad input is left out, with a warning.

  Args:
    source: a file, folder, glob, corpus or Hugging Face dataset.
    tokenizer: of the model to evaluate.
    field: what named the source, for messages, without its `.path`.
    progress: told of warnings.
    split: the split that holds the text; the others are empty.

  Returns:
    Data of one source, "text".

  Raises:
    errors.UserError: where the path leads nowhere.
  """
  problems = ProblemLog()
  opened = sources.open_source(
    source, field=field, problems=problems, progress=progress
  )
  texts = [cleaning.clean(document.text) for document in opened.documents]
  texts = [text for text in texts if text]
  if problems.count:
    progress(
      f"warning: {problems.count:,} pieces of bad input left out, the first"
      f" {problems.first[0]}"
    )
  end = tokenizer.end_of_text_id
  documents = [[end, *ids, end] for ids in tokenizer.encode_batch(texts)]
  text_bytes = sum(len(text.encode()) for text in texts)
  store = token_store.in_memory(documents, text_bytes)
  empty = token_store.in_memory([], 0)
  digest = hashlib.sha256("\0".join([tokenizer.digest, *texts]).encode())
  return PreparedData(
    sources={
      "text": PreparedSource(
        name="text",
        language=source.language,
        weight=1.0,
        splits={s: store if s == split else empty for s in prepared.SPLITS},
      )
    },
    tokenizer_text=tokenizer.to_text(),
    digest=digest.hexdigest(),
    card={},
  )
