"""A model in stock transformers on CPU, in float32: what ours is compared with.

torch and transformers are of the extra `parity` and imported when asked for.
"""

from __future__ import annotations

import contextlib
import io
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from aquila_jax.core import errors
from aquila_jax.interop.tracing import Place


class StockModel:
  """A causal language model of transformers.

  Args:
    path: a Hugging Face directory, or a .gguf file.
    what: the flag that named it, for messages.

  Raises:
    errors.UserError: where torch or transformers is missing, or transformers
      cannot load it.
  """

  def __init__(self, path: str, *, what: str = "reference"):
    location = pathlib.Path(path).expanduser()
    if not location.exists():
      raise errors.UserError(f"{what}={path!r}: there is no such file")
    torch, transformers = _import()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    arguments: dict[str, Any] = dict(dtype=torch.float32, local_files_only=True)
    if location.is_file():
      arguments["gguf_file"] = location.name
      location = location.parent
    try:
      # Its progress bars are for the screen of whoever runs transformers.
      with contextlib.redirect_stderr(io.StringIO()):
        model = transformers.AutoModelForCausalLM.from_pretrained(
          str(location), **arguments
        )
    # What a damaged or unknown model raises is nowhere stated.
    except Exception as error:
      reason = (str(error).strip() or type(error).__name__).splitlines()[0]
      raise errors.UserError(
        f"{what}={path!r}: transformers cannot load it: {reason}"
      ) from error
    # Greedy, and no token stops it, whatever the directory says.
    model.generation_config = transformers.GenerationConfig(do_sample=False)
    self._torch, self.model = torch, model.eval()
    self.architecture = type(model).__name__
    self.versions = {
      "torch": torch.__version__,
      "transformers": transformers.__version__,
    }

  @property
  def vocab_size(self) -> int:
    return self.model.config.vocab_size

  @property
  def num_layers(self) -> int:
    return self.model.config.num_hidden_layers

  def logits(self, tokens: Sequence[int]) -> Float[np.ndarray, "T V"]:
    """Of the next token, for every token of a text."""
    with self._torch.no_grad():
      return self._numpy(self.model(self._row(tokens)).logits)

  def continuation(self, tokens: Sequence[int], *, count: int) -> list[int]:
    """`count` greedy tokens behind a text, as transformers generates them."""
    row = self._row(tokens)
    found = self.model.generate(
      row,
      attention_mask=self._torch.ones_like(row),
      max_new_tokens=count,
      pad_token_id=0,
    )
    return found[0, len(tokens) :].tolist()

  def trace(self, tokens: Sequence[int]) -> dict[Place, np.ndarray]:
    """The outputs of every part, for one text."""
    base = self.model.model
    modules = {Place("embedding"): base.embed_tokens}
    for i, layer in enumerate(base.layers):
      modules |= {
        Place("attention", i): layer.self_attn,
        Place("feed-forward", i): layer.mlp,
        Place("residual", i): layer,
      }
    modules[Place("final norm")] = base.norm
    found: dict[Place, np.ndarray] = {}

    def keep(place: Place):
      def hook(module: Any, inputs: Any, output: Any) -> None:
        del module, inputs
        first = output[0] if isinstance(output, tuple) else output
        found[place] = self._numpy(first.reshape(1, len(tokens), -1))

      return hook

    handles = [
      module.register_forward_hook(keep(place))
      for place, module in modules.items()
    ]
    try:
      found[Place("logits")] = self.logits(tokens)
    finally:
      for handle in handles:
        handle.remove()
    return found

  def _row(self, tokens: Sequence[int]) -> Any:
    return self._torch.tensor([list(tokens)])

  def _numpy(self, batch: Any) -> np.ndarray:
    """The one row of a batch, on its own memory."""
    return np.array(batch[0].detach().numpy())


def _import() -> tuple[Any, Any]:
  try:
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]
  except ImportError as error:
    raise errors.UserError(
      "a comparison needs the packages torch and transformers; install them"
      " with: pip install -e .[parity]"
    ) from error
  return torch, transformers
