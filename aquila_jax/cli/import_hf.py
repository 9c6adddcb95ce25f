"""A pretrained model as a MODEL: of Hugging Face, or a GGUF file.

  python -m aquila_jax.cli.import_hf --source=PATH --output=MODEL

PATH is a directory with config.json and *.safetensors (Llama, Mistral, Mixtral,
Qwen2, Qwen2-MoE, Qwen3, Qwen3-MoE), or a .gguf file of these. Pickles are not
read.
"""

from __future__ import annotations

import pathlib

from absl import flags

from aquila_jax.cli import app, model_flags
from aquila_jax.interop import import_model

_SOURCE = flags.DEFINE_string(
  "source", None, "A Hugging Face directory or a .gguf file.", required=True
)
_OUTPUT = flags.DEFINE_string("output", None, "The MODEL.", required=True)
_PARAM_DTYPE = model_flags.define_param_dtype()
_TOKENIZER = flags.DEFINE_string(
  "tokenizer", "", "A tokenizer.json in place of the source's."
)


def main() -> None:
  model_flags.check_output(_OUTPUT.value)
  tokenizer = model_flags.read_tokenizer_flag(_TOKENIZER.value)
  checkpoint = import_model.open_checkpoint(
    _SOURCE.value,
    dtype=_PARAM_DTYPE.value,
    with_tokenizer=tokenizer is None,
    what="--source",
  )
  model_flags.import_checkpoint(
    checkpoint,
    _OUTPUT.value,
    parent=str(pathlib.Path(_SOURCE.value)),
    tokenizer=tokenizer,
  )


if __name__ == "__main__":
  app.run(main)
