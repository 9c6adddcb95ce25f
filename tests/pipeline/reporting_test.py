"""What a report says of the run, the machine and the versions."""

from __future__ import annotations

import os
import shutil

import jax
import numpy as np
import pytest

from aquila_jax import version
from aquila_jax.core import errors
from aquila_jax.pipeline import reporting
from aquila_jax.planning import counting


def test_machine_and_versions_are_this_ones(whole):
  report = whole.finished.report
  assert report.versions["aquila_jax"] == version.VERSION
  assert report.versions["jax"] == jax.__version__
  assert report.versions["numpy"] == np.__version__
  assert report.machine["platform"] == "cpu"
  assert report.machine["devices"] == 8
  assert report.machine["CPU cores"] == os.cpu_count()
  assert report.machine["device"]


def test_peak_memory_is_at_least_what_is_held_now():
  held = np.ones(2**25)  # 256 MiB, touched
  assert reporting.peak_memory_bytes() >= held.nbytes


def test_sizes_are_the_counted_ones(whole):
  for result, stage in zip(
    whole.finished.report.stages,
    ("dense", "scale_up", "scale_out", "control"),
    strict=True,
  ):
    config = result.config["model"]
    assert result.name == stage
    assert (result.parameters == result.active_parameters) == (
      config["moe"] is None
    )
  report = whole.finished.report
  control, mixture = report.stages[3], report.stages[2]
  assert control.parameters == mixture.parameters
  assert counting.in_words(mixture.parameters).endswith("K")


def test_the_card_and_the_rest_of_the_config_are_there(whole, kit):
  report = whole.finished.report
  assert set(report.dataset_card["sources"]) == {"en", "zh"}
  assert report.config["data"]["prepared"] == kit.prepared
  assert "stages" not in report.config
  assert report.stages[1].transform_losses.keys() == {
    "source",
    "fpi",
    "aki_pro",
  }


def test_a_stage_that_lost_its_metrics_gets_no_report(whole, kit, tmp_path):
  workdir = tmp_path / "copy"
  shutil.copytree(whole.workdir, workdir)
  lost = workdir / "stages/control/metrics.jsonl"
  lost.unlink()
  report = (workdir / "report.html").read_bytes()
  with pytest.raises(errors.UserError) as caught:
    kit.run(workdir)
  assert str(caught.value) == (
    f"{lost} is missing, so there is no report; delete {lost.parent} to have"
    " the stage run again"
  )
  assert (workdir / "report.html").read_bytes() == report
