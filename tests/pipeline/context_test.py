"""Data found, made or refused; seeds that nobody shares."""

from __future__ import annotations

import pytest
from etils import epath

from aquila_jax.core import errors
from aquila_jax.pipeline.context import make_context


def test_seeds_depend_on_the_experiments_seed_and_the_stage(kit, tmp_path):
  seeds = {
    kit.context(tmp_path, seed=seed).stage_seed(name)
    for seed in (0, 1)
    for name in ("dense", "scale_up")
  }
  assert len(seeds) == 4
  assert kit.context(tmp_path).stage_seed("dense") in seeds
  assert all(0 <= seed < 2**31 for seed in seeds)


def test_data_are_prepared_once_into_the_workdir(kit, tmp_path):
  text = tmp_path / "text.txt"
  lines = [f"paragraph {i}: " + "some words here " * (i % 7) for i in range(60)]
  text.write_text("\n\n".join(lines))
  source = dict(path=str(text), language="en", txt_documents="paragraph")
  changes = dict(
    data__prepared="",
    data__sources=dict(en=source),
    data__tokenizer=dict(vocab_size=270),
    data__cleaning=dict(min_characters=4, near_duplicate_threshold=1.0),
    data__validation_share=0.1,
    data__test_share=0.1,
  )
  messages: list[str] = []
  first = kit.context(tmp_path / "run", messages, **changes)
  assert first.data.path == tmp_path / "run" / "data"
  assert f"prepared {tmp_path / 'run' / 'data'}" in messages
  messages.clear()
  again = kit.context(tmp_path / "run", messages, **changes)
  assert messages == [f"{tmp_path / 'run' / 'data'} is prepared"]
  assert again.data.digest == first.data.digest


def test_a_workdir_that_cannot_be_made_is_refused(kit, tmp_path):
  file = tmp_path / "file"
  file.write_text("")
  workdir = epath.Path(file / "run")
  with pytest.raises(errors.UserError) as caught:
    make_context(kit.experiment(), workdir, say=print)
  assert str(caught.value) == (
    f"--workdir='{workdir}': cannot be made: Not a directory"
  )


def test_prepared_data_that_are_not_there_are_named(kit, tmp_path):
  with pytest.raises(errors.UserError) as caught:
    kit.context(tmp_path, data__prepared=str(tmp_path / "none"))
  assert str(caught.value) == (
    f"config.data.prepared='{tmp_path / 'none'}': there is no such directory;"
    " make it with prepare_data"
  )


def test_a_batch_is_rounded_up_to_the_devices(kit, tmp_path):
  # 4 rows over 8 devices: 8 rows; each language alone, every target once.
  context = kit.context(tmp_path)
  evaluator = context.evaluator(
    context.experiment.stages["dense"].model,
    split="test",
    sequence_length=32,
    max_tokens=64,
  )
  batches = [b for found in evaluator._batches.values() for b in found]
  assert {batch.tokens.shape for batch in batches} == {(8, 32)}
