"""Parents found by the lineage, and the units that growth gave each expert."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil

import numpy as np
import pytest

from aquila_jax.cli import routing_parent
from aquila_jax.core import errors
from aquila_jax.core.experiment_config import ScaleOut
from aquila_jax.core.lineage import Event, Lineage
from aquila_jax.core.model_config import ModelConfig, MoeConfig
from aquila_jax.core.model_dir import StoredModel, open_model
from aquila_jax.evaluation.routing.cosines import Origin, cosines
from aquila_jax.growth.scale_out import scale_out
from aquila_jax.models import decoder_lm
from tests.cli import tiny as models
from tests.growth import tiny

MOE = MoeConfig(num_experts=4, top_k=2, block_size=4)
SOURCE = dataclasses.replace(
  tiny.SOURCE, param_dtype="float32", compute_dtype="float32"
)


def _source(path: pathlib.Path) -> StoredModel:
  path.parent.mkdir(parents=True, exist_ok=True)
  model = tiny.stored(SOURCE, moments=None)
  models.save(path, model)
  return model


def _grown(
  source: StoredModel,
  path: pathlib.Path,
  *,
  parent: str,
  moe: MoeConfig,
  **sizes,
) -> StoredModel:
  method = "granular" if sizes else "sparse_upcycling"
  target = dataclasses.replace(source.config, moe=moe, **sizes)
  options = ScaleOut(source=parent, method=method, optimizer="reset")
  model = scale_out(source, target, options)
  models.save(path, model)
  return model


def _found(path: pathlib.Path, given: str | None = None):
  reader = open_model(path, like=decoder_lm.abstract_params)
  return reader, *routing_parent.find_family(
    reader, path=str(path), given=given
  )


def _assert_copies(path: pathlib.Path, *, copies: list[list[int]]) -> str:
  """All experts are what they were made of, and those are copies."""
  reader, family, words = _found(path)
  assert family is not None, words
  for one in cosines(reader.model.config, reader.params, family=family):
    assert one.to_parent is not None and one.copies is not None
    np.testing.assert_allclose(one.to_parent, 1, atol=1e-6)
    np.testing.assert_allclose(one.pairs(of_copies=True), 1, atol=1e-6)
    groups = {tuple(np.flatnonzero(row).tolist()) for row in one.copies}
    assert groups == set(map(tuple, copies))
  return words


def test_shards_beside_a_shared_expert_and_a_mixture_made_of_them(tmp_path):
  """10 units: 2 shared, and 2 copies of 2 shards of 4; each then twice."""
  source = _source(tmp_path / "dense")
  moe = dataclasses.replace(MOE, shared_expert_dim=2, shared_expert_gate=False)
  mixture = _grown(
    source, tmp_path / "m", parent=str(tmp_path / "dense"), moe=moe, mlp_dim=4
  )
  _assert_copies(tmp_path / "m", copies=[[0, 2], [1, 3]])
  twice = dataclasses.replace(moe, num_experts=8, top_k=4)
  _grown(mixture, tmp_path / "n", parent=str(tmp_path / "m"), moe=twice)
  _assert_copies(tmp_path / "n", copies=[[0, 1], [2, 3], [4, 5], [6, 7]])
  given = str(tmp_path / "dense")
  with pytest.raises(errors.UserError) as caught:
    _found(tmp_path / "n", given)
  assert str(caught.value) == (
    f"--parent={given!r}: the model is made of a mixture whose experts are"
    " shards of this one; expected that mixture"
  )


def test_some_of_the_layers(tmp_path):
  source = _source(tmp_path / "dense")
  moe = dataclasses.replace(MOE, layers=(0, 2))
  _grown(source, tmp_path / "m", parent=str(tmp_path / "dense"), moe=moe)
  _assert_copies(tmp_path / "m", copies=[[0, 1, 2, 3]])


def _mixture(path: pathlib.Path, *events: Event, **sizes) -> None:
  config: ModelConfig = dataclasses.replace(SOURCE, moe=MOE, **sizes)
  models.save(
    path,
    tiny.stored(config, moments=None, lineage=Lineage(events=tuple(events))),
  )


def test_a_path_or_a_stage_of_the_same_workdir(tmp_path):
  stages = tmp_path / "stages"
  _source(stages / "dense" / "model")
  path = stages / "moe" / "model"
  (stages / "moe").mkdir()
  dense = f"{stages}/dense/model"
  for parent in ("dense", dense):
    if path.exists():
      shutil.rmtree(path)
    _mixture(path, Event(kind="scale_out", parent=parent))
    _, family, words = _found(path)
    assert family is not None and family.config == SOURCE
    assert words == (
      f"The parent is {dense}, and this is made of it: 4 experts: 4 copies of"
      " an FFN, 10 hidden units an expert; a token meets 2."
    )


def test_without_a_parent_it_says_why(tmp_path):
  _source(tmp_path / "dense")
  dense = str(tmp_path / "dense")
  made_of = Event(kind="scale_out", parent=dense, options={"source": dense})
  cases = {
    "gone": (
      dataclasses.replace(made_of, parent="elsewhere"),
      "No parent: the model was made of 'elsewhere', which is not there;"
      " --parent names it.",
    ),
    "grown": (
      Event(kind="scale_up", parent=dense),
      "No parent: the model's last growth made no experts.",
    ),
    "scratch": (
      Event(kind="scratch"),
      "No parent: the model's last growth made no experts.",
    ),
  }
  for name, (event, words) in cases.items():
    _mixture(tmp_path / name, event)
    assert _found(tmp_path / name)[1:] == (None, words)
  _mixture(tmp_path / "wider", made_of, embed_dim=16)
  assert _found(tmp_path / "wider")[1:] == (
    None,
    f"No parent: {dense!r} does not fit any more.",
  )
  assert _found(tmp_path / "wider", "")[1:] == (
    None,
    "No parent was asked for.",
  )
  with pytest.raises(errors.UserError) as caught:
    _found(tmp_path / "wider", dense)
  assert str(caught.value) == (
    f"--parent={dense!r}: this model is not made of it: --model.embed_dim=16:"
    " expected the source's 8; Scale-Out makes experts of FFNs, Scale-Up"
    " changes sizes"
  )


def test_a_parent_is_taken_where_the_lineage_names_none(tmp_path):
  _source(tmp_path / "dense")
  _mixture(tmp_path / "m", Event(kind="import"))
  _, family, _ = _found(tmp_path / "m", str(tmp_path / "dense"))
  assert family is not None
  assert list(family.origins) == [Origin(expert=None, units=slice(0, 10))] * 4


def test_experts_of_other_models_have_no_parent(tmp_path):
  _source(tmp_path / "dense")
  dense = str(tmp_path / "dense")
  options = {"source": dense, "method": "branch_train_mix", "sources": ["x"]}
  options |= {"optimizer": "reset"}
  _mixture(
    tmp_path / "m", Event(kind="scale_out", parent=dense, options=options)
  )
  _, family, _ = _found(tmp_path / "m")
  assert family is not None
  known = [origin is not None for origin in family.origins]
  assert known == [True, False, True, False]
