"""A MODEL as a model of lm-evaluation-harness, `aquila`.

The harness has no way to find models of other packages by itself, so a process
registers this one first. `python -m aquila_jax.cli.evaluate --tasks=...` does,
and `python -m aquila_jax.cli.harness` is the harness's own command with it:

  python -m aquila_jax.cli.harness --model aquila \
    --model_args model=MODEL --tasks hellaswag_100

In Python `model_class()` gives the class; `model_class()(model="MODEL")` is
what `lm_eval.simple_evaluate(model=...)` takes.

Contexts, continuations and windows are those of the harness's own class for
transformers, HFLM, so that the same weights and tokenizer give the same
results. It differs where HFLM stops the evaluation: a continuation that is
longer than the model reads is scored in windows, and one that is empty with 0;
where as many new tokens are asked for as the model reads at all, half of these
are for the prompt.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from aquila_jax.core import errors
from aquila_jax.core.model_dir import StoredModel, load_model
from aquila_jax.evaluation import formats
from aquila_jax.evaluation.text_codec import TextCodec
from aquila_jax.evaluation.token_scoring import Progress, Scorer
from aquila_jax.evaluation.until import Continuer, Prompt, fit
from aquila_jax.generation.generate import text_model
from aquila_jax.generation.sampling import Sampling
from aquila_jax.models import decoder_lm

NAME = "aquila"
MISSING = "tasks need the package lm_eval; install it: pip install -e .[eval]"

_BATCH_SIZE = 32
_MAX_GEN_TOKS = 256  # as in HFLM
_SAYS_EVERY_S = 10.0
# Of generations: what is understood, and what changes nothing here.
_UNDERSTOOD = frozenset(
  ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")
)
_WITHOUT_EFFECT = {
  "num_beams": 1,
  "num_return_sequences": 1,
  "repetition_penalty": 1.0,
  "use_cache": True,
}

Say = Callable[[str], None]

_log = logging.getLogger("lm_eval.aquila")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """The arguments of the model; `--model_args` of the harness."""

  batch_size: int = _BATCH_SIZE
  max_length: int = 0  # tokens; 0 is the model's context
  max_gen_toks: int = _MAX_GEN_TOKS  # where a task names none
  add_bos_token: bool | None = None
  prefix_token_id: int | None = None
  # Of the computation; "" is what the MODEL says.
  dtype: str = ""
  seed: int = 0  # of generations that are sampled


class Answers:
  """What a harness asks of a model, in plain ids and texts.

  Args:
    stored: the MODEL.
    options: the arguments.
    say: takes lines of progress.
  """

  def __init__(
    self, stored: StoredModel, options: Options, *, say: Say = _log.info
  ):
    model = text_model(stored)
    config = dataclasses.replace(
      model.config, compute_dtype=options.dtype or model.config.compute_dtype
    )
    params = jax.tree.map(jnp.asarray, model.params)
    self.max_length = options.max_length or config.context_length
    self.options = options
    self.codec = TextCodec(
      model,
      add_bos_token=options.add_bos_token,
      prefix_token_id=options.prefix_token_id,
    )
    self._scorer = Scorer(
      config,
      params,
      max_length=options.max_length,
      batch_size=options.batch_size,
    )
    self._continuer = Continuer(
      config,
      params,
      tokenizer=model.tokenizer,
      batch_size=options.batch_size,
    )
    self._say = say

  def scores(
    self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]
  ) -> list[tuple[float, bool]]:
    """Log-probability of every continuation, and whether it is greedy.

    A context of no tokens is the prefix token.
    """
    prefix = [self.codec.prefix_token_id]
    found = self._scorer(
      [(context or prefix, continuation) for context, continuation in requests],
      progress=self._progress("scored", len(requests)),
    )
    return [(score.log_prob, score.is_greedy) for score in found]

  def rolling(self, texts: Sequence[str]) -> list[float]:
    """Log-probability of all tokens of every text, after the prefix token."""
    found = self.scores([([], self.codec.encode(text)) for text in texts])
    return [log_prob for log_prob, _ in found]

  def continuations(
    self, requests: Sequence[tuple[str, dict[str, Any]]]
  ) -> list[str]:
    """What the model writes after every context, by normalised options."""
    alike: dict[str, list[int]] = {}
    for number, (_, options) in enumerate(requests):
      alike.setdefault(repr(sorted(options.items())), []).append(number)
    texts = [""] * len(requests)
    done = 0
    for numbers in alike.values():
      contexts = [requests[number][0] for number in numbers]
      found = self._continue(contexts, numbers, requests[numbers[0]][1], done)
      for number, text in zip(numbers, found, strict=True):
        texts[number] = text
      done += len(numbers)
    return texts

  def _continue(
    self,
    contexts: Sequence[str],
    numbers: Sequence[int],
    options: dict[str, Any],
    done: int,
  ) -> list[str]:
    wanted = options["max_gen_toks"]
    prompts, room = [], wanted
    for number, context in zip(numbers, contexts, strict=True):
      tokens = self.codec.encode(context) or [self.codec.prefix_token_id]
      tokens, room = fit(
        tokens, max_new_tokens=wanted, max_length=self.max_length
      )
      prompts.append(Prompt(tokens=tokens, number=number))
    end = self.codec.eot_token_id
    until = list(options["until"])
    if end is not None:
      until.append(self.codec.decode([end], skip_special_tokens=False))
    progress = self._progress("continued", done + len(contexts))
    return self._continuer(
      prompts,
      until=until,
      sampling=_sampling(
        options,
        max_new_tokens=room,
        seed=self.options.seed,
        stop_tokens=self.codec.stop_tokens,
      ),
      progress=lambda count: progress(done + count),
    )

  def _progress(self, what: str, total: int) -> Progress:
    """Says how far it is, now and then, and how long the rest may take."""
    start = said = time.monotonic()

    def tell(done: int) -> None:
      nonlocal said
      now = time.monotonic()
      if now - said < _SAYS_EVERY_S or not 0 < done < total:
        return
      said = now
      left = (now - start) * (total - done) / done
      self._say(
        f"{what} {done:,} of {total:,} requests; about"
        f" {formats.duration(left)} left"
      )

    return tell


def _sampling(
  options: dict[str, Any],
  *,
  max_new_tokens: int,
  seed: int,
  stop_tokens: tuple[int, ...],
) -> Sampling:
  """The options of a generation, as the harness has normalised them.

  Raises:
    errors.UserError: on one that would change the text and is not understood.
  """
  for name, value in options.items():
    if name in _UNDERSTOOD or value is None:
      continue
    if _WITHOUT_EFFECT.get(name) != value:
      raise errors.UserError(
        f"generation_kwargs.{name}={value!r}: is not supported; supported:"
        f" {', '.join(sorted(_UNDERSTOOD))}"
      )
  sampled = options.get("do_sample", False)
  return Sampling(
    max_new_tokens=max_new_tokens,
    temperature=float(options.get("temperature", 0.0)) if sampled else 0.0,
    top_k=int(options.get("top_k") or 0),
    top_p=float(options.get("top_p") or 1.0),
    seed=seed,
    stop_tokens=stop_tokens,
  )


def import_lm_eval() -> Any:
  """The package, with the parts that are used here.

  Raises:
    errors.UserError: where it is not installed.
  """
  try:
    import lm_eval  # pyright: ignore[reportMissingImports]
    import lm_eval.api.model  # pyright: ignore[reportMissingImports]
    import lm_eval.api.registry  # pyright: ignore[reportMissingImports]
    import lm_eval.models.utils  # pyright: ignore[reportMissingImports]
    import lm_eval.utils  # pyright: ignore[reportMissingImports]
  except ImportError as error:
    raise errors.UserError(MISSING) from error
  return lm_eval


@functools.cache
def model_class() -> Any:
  """The subclass of lm_eval.api.model.LM, registered as `aquila`.

  Raises:
    errors.UserError: where lm_eval is not installed.
  """
  lm_eval = import_lm_eval()
  normalize_gen_kwargs = lm_eval.models.utils.normalize_gen_kwargs

  class AquilaLM(lm_eval.api.model.TemplateLM):
    """A MODEL that the harness asks; see `Options` for the arguments."""

    def __init__(
      self,
      model: str | StoredModel = "",
      *,
      batch_size: int | str | None = None,
      say: Say = _log.info,
      device: str | None = None,
      max_batch_size: int | None = None,
      pretrained: str = "",
      **options: Any,
    ):
      del device, max_batch_size  # the harness gives them to every model
      super().__init__()
      if not isinstance(batch_size, int):  # "auto" among them
        given = str(batch_size or "")
        batch_size = int(given) if given.isdigit() else _BATCH_SIZE
      model = model or pretrained  # as users of other models write it
      stored = _stored(model)
      self._stored = stored
      self._name = model if isinstance(model, str) else "MODEL"
      chosen = _options(batch_size=batch_size, **options)
      self.answers = Answers(stored, chosen, say=say)

    @property
    def eot_token_id(self) -> int | None:
      return self.answers.codec.eot_token_id

    @property
    def prefix_token_id(self) -> int:
      return self.answers.codec.prefix_token_id

    @property
    def max_length(self) -> int:
      return self.answers.max_length

    @property
    def max_gen_toks(self) -> int:
      return self.answers.options.max_gen_toks

    @property
    def batch_size(self) -> int:
      return self.answers.options.batch_size

    @property
    def tokenizer_name(self) -> str:
      text = (self._stored.tokenizer or "") + (self._stored.chat_template or "")
      return "aquila-" + hashlib.sha256(text.encode()).hexdigest()[:16]

    def get_model_info(self) -> dict[str, Any]:
      leaves = jax.tree.leaves(self._stored.params)
      return {
        "model_num_parameters": sum(leaf.size for leaf in leaves),
        "model_dtype": self.answers.options.dtype
        or self._stored.config.compute_dtype,
        "model_source": self._name,
      }

    def tok_encode(
      self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
      del kwargs
      return self.answers.codec.encode(
        string, add_special_tokens=add_special_tokens
      )

    def tok_decode(
      self, tokens: Sequence[int], skip_special_tokens: bool = True
    ) -> str:
      return self.answers.codec.decode(
        tokens, skip_special_tokens=skip_special_tokens
      )

    def loglikelihood(self, requests, disable_tqdm: bool = False):
      # What the base class would index in vain.
      empty = [request for request in requests if request.args == ("", "")]
      if empty:
        rest = [request for request in requests if request.args != ("", "")]
        found = iter(super().loglikelihood(rest, disable_tqdm))
        return [
          (0.0, True) if request.args == ("", "") else next(found)
          for request in requests
        ]
      return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(self, requests, **kwargs: Any):
      del kwargs
      found = self.answers.scores([request[1:] for request in requests])
      for (texts, _, _), answer in zip(requests, found, strict=True):
        self.cache_hook.add_partial("loglikelihood", texts, answer)
      return found

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False):
      del disable_tqdm
      found = self.answers.rolling([request.args[0] for request in requests])
      for request, answer in zip(requests, found, strict=True):
        self.cache_hook.add_partial(
          "loglikelihood_rolling", request.args, answer
        )
      return found

    def generate_until(self, requests, disable_tqdm: bool = False):
      del disable_tqdm
      found = self.answers.continuations(
        [
          (context, normalize_gen_kwargs(options, self.max_gen_toks))
          for context, options in (request.args[:2] for request in requests)
        ]
      )
      for request, answer in zip(requests, found, strict=True):
        self.cache_hook.add_partial("generate_until", request.args, answer)
      return found

    def chat_template(self, chat_template: bool | str = False) -> str:
      del chat_template
      return self._stored.chat_template or ""

    def apply_chat_template(
      self,
      chat_history: list[dict[str, str]],
      add_generation_prompt: bool = True,
    ) -> str:
      return _render(
        self._stored,
        chat_history,
        codec=self.answers.codec,
        add_generation_prompt=add_generation_prompt,
      )

  lm_eval.api.registry.register_model(NAME)(AquilaLM)
  return AquilaLM


def command() -> None:
  """The harness's own command line, of the arguments of this process."""
  from lm_eval.__main__ import (  # pyright: ignore[reportMissingImports]
    cli_evaluate,
  )

  cli_evaluate()


def _stored(model: str | StoredModel) -> StoredModel:
  if isinstance(model, StoredModel):
    return model
  if not model:
    raise errors.UserError("model_args: need model=MODEL")
  return load_model(
    model, like=decoder_lm.abstract_params, with_optimizer=False, what="model"
  )


def _options(**given: Any) -> Options:
  names = [field.name for field in dataclasses.fields(Options)]
  for name in given:
    if name not in names:
      raise errors.unknown_name("model_args", name, ["model", *names])
  return Options(**given)


def _render(
  stored: StoredModel,
  messages: list[dict[str, str]],
  *,
  codec: TextCodec,
  add_generation_prompt: bool,
) -> str:
  """A conversation as the MODEL's chat template writes it."""
  if stored.chat_template is None:
    raise errors.UserError(
      "the MODEL has no chat template; evaluate it without apply_chat_template"
    )
  try:
    from transformers.utils import (  # pyright: ignore[reportMissingImports]
      chat_template_utils,
    )
  except ImportError as error:
    raise errors.UserError(MISSING) from error
  end = codec.eot_token_id
  rendered, _ = chat_template_utils.render_jinja_template(
    conversations=[messages],
    chat_template=stored.chat_template,
    add_generation_prompt=add_generation_prompt,
    continue_final_message=not add_generation_prompt,
    bos_token=codec.decode([codec.prefix_token_id], skip_special_tokens=False),
    eos_token=""
    if end is None
    else codec.decode([end], skip_special_tokens=False),
  )
  return rendered[0]
