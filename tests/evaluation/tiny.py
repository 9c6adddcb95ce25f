"""Tiny prepared data, and an experiment with invented numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from aquila_jax.data import token_store
from aquila_jax.data.prepared import PreparedData, PreparedSource
from aquila_jax.data.tokenizer import Tokenizer
from aquila_jax.evaluation.results import ReportInput, Sample, StageResult
from aquila_jax.evaluation.scores import LanguageScore, Scores

TEXTS = {
  "en": ["a stone is a stone", "rivers run", "why?", "x" * 30],
  "zh": ["河水流", "石头是石头。"],
}


def prepared(texts: Mapping[str, Sequence[str]]) -> PreparedData:
  """The texts of each language as its test split, one source a language."""
  tokenizer = Tokenizer.train(
    [text for documents in TEXTS.values() for text in documents],
    vocab_size=260,
    end_of_text="<|endoftext|>",
    field="vocab_size",
  )
  end = tokenizer.end_of_text_id
  empty = token_store.in_memory([], 0)

  def source(language: str, documents: Sequence[str]) -> PreparedSource:
    tokens = [[end, *ids, end] for ids in tokenizer.encode_batch(documents)]
    size = sum(len(text.encode()) for text in documents)
    test = token_store.in_memory(tokens, size)
    return PreparedSource(
      name=language,
      language=language,
      weight=1.0,
      splits={"train": empty, "validation": empty, "test": test},
    )

  return PreparedData(
    sources={name: source(name, found) for name, found in texts.items()},
    tokenizer_text=tokenizer.to_text(),
    digest="0" * 64,
    card={},
  )


def rows(losses: Sequence[float], *, step_flops: float, experts: bool = False):
  """Rows of metrics every 10 steps; a step is 100 tokens and 2 seconds."""
  made: list[dict[str, Any]] = []
  for i, loss in enumerate(losses, start=1):
    step = 10 * i
    row: dict[str, Any] = dict(
      step=step,
      loss=loss,
      loss_en=loss - 0.5,
      loss_zh=loss + 0.5,
      tokens=100 * step,
      flops=step_flops * step,
      wall_s=2.0 * step,
      tokens_per_s=50.0,
      mfu=0.25,
      learning_rate=1e-3 / i,
    )
    if experts:
      load = np.full((2, 4), 0.25) + np.array([[0.1, -0.1, 0, 0]] * 2) / i
      row |= dict(
        expert_load=load.tolist(),
        load_max_over_mean=(4 * load.max(-1)).tolist(),
        dropped_share=[0.0, 0.0],
      )
    made.append(row)
  return made


def stage(name: str, **fields) -> StageResult:
  """A stage with validations at steps 10, 20, ..., of the training loss."""
  made = fields.pop("rows", None) or rows([5.0, 4.0, 3.0], step_flops=1e9)
  defaults: dict[str, Any] = dict(
    name=name,
    kind="scratch",
    parameters=327_000,
    active_parameters=120_000,
    flops_per_token=1e7,
    rows=made,
    spent_s=dict(steps=54.0, compile=12.0, other=6.0),
    validation=[dict(step=r["step"], loss=r["loss"]) for r in made],
  )
  return StageResult(**(defaults | fields))


def scores(loss: float) -> Scores:
  """1,000 tokens of each language, 3 and 2 bytes a token."""

  def score(nats: float, size: int) -> LanguageScore:
    return LanguageScore(nats=1000 * nats, tokens=1000, bytes=1000 * size)

  return Scores(
    split="test", languages={"en": score(loss, 3), "zh": score(loss + 1, 2)}
  )


NASTY = "<script>alert('&')</script>"


def experiment(**fields) -> ReportInput:
  """Dense, grown, mixture and control; 30, 30 and 30 GFLOPs, then 90."""
  config = {"train": {"steps": 30}, "note": NASTY}
  dense = stage(
    "dense",
    evaluation=scores(3.1),
    samples=[Sample(prompt="实例的", text=f"名称 {NASTY}")],
    config=config,
  )
  grown = stage(
    "scale_up",
    kind="scale_up",
    method="aki_pro",
    parent="dense",
    rows=rows([4.0, 3.0, 2.8], step_flops=1e9),
    flops_before=3e10,
    wall_before_s=60.0,
    transform_losses={"source": 3.0, "fpi": 3.0, "aki_pro": 6.5},
  )
  mixture = stage(
    "mixture",
    kind="scale_out",
    method="sparse_upcycling",
    parent="scale_up",
    rows=rows([2.8, 2.6, 2.5], step_flops=1e9, experts=True),
    flops_before=6e10,
    wall_before_s=120.0,
    transform_losses={"source": 2.8, "sparse_upcycling": 2.8},
    evaluation=scores(2.5),
  )
  control = stage(
    "control",
    is_control=True,
    rows=rows([6.0, 4.0, 3.0], step_flops=3e9, experts=True),
    evaluation=scores(3.0),
  )
  defaults: dict[str, Any] = dict(
    name=f"tiny {NASTY}",
    stages=[dense, grown, mixture, control],
    created="2026-11-24 16:40",
    config={"seed": 0},
    versions={"python": "3.11.9", "aquila_jax": "0.1.0"},
    machine={"platform": "cpu", "device": "a processor", "cores": 2},
    dataset_card=card(),
  )
  return ReportInput(**(defaults | fields))


def card() -> dict[str, Any]:
  """The parts of dataset.json that a report shows."""
  counts = dict(documents=1000, bytes=20_000, tokens=7_000)
  source = dict(
    language="en",
    weight=0.5,
    licence="Apache-2.0",
    description="manuals",
    read=1500,
    dropped={"too short": 200, "exact duplicate": 300},
    problems=3,
    splits=dict.fromkeys(("train", "validation", "test"), counts),
  )
  return {
    "digest": "ab" * 32,
    "tokenizer": {"path": "", "vocab_size": 260, "end_of_text": "<|eot|>"},
    "sources": {"first": source, "second": source},
  }


def with_control(report: ReportInput, control: StageResult) -> ReportInput:
  """`report` with another control."""
  return dataclasses.replace(report, stages=[*report.stages[:-1], control])
