"""A pipeline of seconds: four stages of a few steps over a little text."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import fcntl
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from etils import epath

from aquila_jax.core import config as config_lib
from aquila_jax.core.experiment_config import ExperimentConfig
from aquila_jax.data.prepare import prepare
from aquila_jax.pipeline.context import Context, make_context
from aquila_jax.pipeline.run import Finished, run_pipeline

_WORDS = ("river", "stone", "runs", "over", "a", "the", "cold", "bridge", "we")
_HAN = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏"


def _texts(seed: int) -> tuple[str, str]:
  """Paragraphs of English and of Chinese."""
  generator = np.random.default_rng(seed)
  english, chinese = (
    [
      joiner.join(generator.choice(list(parts), int(generator.integers(9, 30))))
      for _ in range(60)
    ]
    for joiner, parts in ((" ", _WORDS), ("", _HAN))
  )
  return "\n\n".join(english), "\n\n".join(chinese)


def tree(prepared: str) -> dict[str, Any]:
  """The config as nested dicts, to be changed before it is built."""
  model: dict[str, Any] = dict(
    vocab_size=320,
    num_layers=2,
    embed_dim=16,
    mlp_dim=24,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    context_length=32,
    tied_embeddings=True,
    compute_dtype="float32",
  )
  grown = model | dict(num_layers=3, embed_dim=32, num_heads=4)
  mixture = grown | dict(moe=dict(num_experts=4, top_k=2, block_size=16))
  train: dict[str, Any] = dict(
    steps=4,
    batch_size=8,
    sequence_length=32,
    optimizer=dict(learning_rate=3e-3, warmup_steps=1),
    checkpoint=dict(every_steps=2, every_seconds=0.0),
    log_every=1,
    evaluate_every=2,
    evaluate_tokens=256,
  )

  def stage(init: dict[str, Any], model: dict[str, Any], **fields: Any):
    # Copied, so that no two stages share a section.
    return copy.deepcopy(dict(init=init, model=model, train=train | fields))

  sources = {
    language: dict(path="unused", language=language, txt_documents="paragraph")
    for language in ("en", "zh")
  }
  return dict(
    name="tiny",
    data=dict(prepared=prepared, sources=sources),
    pipeline=("dense", "scale_up", "scale_out", "control"),
    stages=dict(
      dense=stage(dict(kind="scratch"), model),
      scale_up=stage(
        dict(kind="scale_up", source="dense", compare=("fpi",)), grown
      ),
      scale_out=stage(dict(kind="scale_out", source="scale_up"), mixture),
      control=stage(
        dict(kind="scratch"), mixture, steps=0, match_flops="scale_out"
      ),
    ),
    evaluation=dict(
      max_tokens=256, batch_size=4, prompts=("the river",), max_new_tokens=4
    ),
  )


@dataclasses.dataclass(frozen=True)
class Kit:
  """Experiments over prepared data, and the contexts to run them in."""

  prepared: str
  other_prepared: str

  def experiment(self, **changes: Any) -> ExperimentConfig:
    """The tiny experiment with fields set by dotted names."""
    config = copy.deepcopy(tree(self.prepared))
    for name, value in changes.items():
      *sections, field = name.split("__")
      node = config
      for section in sections:
        node = node.setdefault(section, {})
      node[field] = value
    return config_lib.build(ExperimentConfig, config)

  def context(
    self, workdir: pathlib.Path, messages: list[str] | None = None, **changes
  ) -> Context:
    return make_context(
      self.experiment(**changes),
      epath.Path(workdir),
      say=([] if messages is None else messages).append,
    )

  def run(
    self, workdir: pathlib.Path, messages: list[str] | None = None, **changes
  ) -> Finished:
    finished = run_pipeline(
      self.experiment(**changes),
      epath.Path(workdir),
      say=([] if messages is None else messages).append,
    )
    assert finished is not None
    return finished


def _shared(factory: pytest.TempPathFactory, name: str) -> pathlib.Path:
  """A folder that all workers of pytest-xdist share."""
  base = factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    base = base.parent
  folder = base / name
  folder.mkdir(exist_ok=True)
  return folder


@contextlib.contextmanager
def _one_at_a_time(folder: pathlib.Path) -> Iterator[None]:
  with (folder / "lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield


@pytest.fixture(scope="session")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
  folder = _shared(tmp_path_factory, "pipeline_text")
  with _one_at_a_time(folder):
    _prepare(folder)
  return Kit(str(folder / "data"), str(folder / "other"))


def _prepare(folder: pathlib.Path) -> None:
  """Writes two texts and prepares them, or finds them prepared."""
  for seed, name in enumerate(("data", "other")):
    for language, text in zip(("en", "zh"), _texts(seed), strict=True):
      (folder / f"{name}_{language}.txt").write_text(text, encoding="utf-8")
    config = tree("")["data"]
    for language, source in config["sources"].items():
      source["path"] = str(folder / f"{name}_{language}.txt")
    config |= dict(
      tokenizer=dict(vocab_size=300),
      validation_share=0.1,
      test_share=0.1,
      cleaning=dict(min_characters=8),
    )
    experiment = config_lib.build(
      ExperimentConfig, tree("") | dict(data=config)
    )
    prepare(experiment.data, folder / name, progress=lambda _: None)


@dataclasses.dataclass(frozen=True)
class Run:
  """A pipeline that was run without a stop, and its report."""

  workdir: pathlib.Path
  finished: Finished


@pytest.fixture(scope="session")
def whole(kit: Kit, tmp_path_factory: pytest.TempPathFactory) -> Run:
  """Run once, for all tests that only look at it."""
  folder = _shared(tmp_path_factory, "pipeline_whole")
  with _one_at_a_time(folder):
    return Run(folder / "run", kit.run(folder / "run"))
