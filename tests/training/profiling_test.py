from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from aquila_jax.core import errors
from aquila_jax.training.profiling import Profiler


@pytest.fixture
def calls(monkeypatch):
  """What reaches the JAX profiler."""
  found = []
  monkeypatch.setattr(jax.profiler, "start_trace", found.append)
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: found.append("stop"))
  return found


def _run(profiler, steps, calls):
  for step in range(steps):
    profiler.before(step)
    calls.append(step)
    profiler.after(step + 1, result=jnp.zeros(()))


def test_it_traces_the_half_open_range(calls):
  with Profiler(epath.Path("/x"), steps=(1, 3), total_steps=4) as profiler:
    _run(profiler, 4, calls)
  assert calls == [0, "/x", 1, 2, "stop", 3]


def test_without_steps_it_does_nothing(calls):
  with Profiler(epath.Path("/x"), steps=None, total_steps=2) as profiler:
    _run(profiler, 2, calls)
  assert calls == [0, 1]


def test_a_trace_is_ended_when_training_breaks_off(calls):
  with Profiler(epath.Path("/x"), steps=(0, 3), total_steps=4) as profiler:
    _run(profiler, 1, calls)
  assert calls == ["/x", 0, "stop"]


@pytest.mark.parametrize("steps", [(-1, 2), (2, 2), (3, 2), (0, 5)])
def test_a_range_outside_the_stage_is_refused(steps):
  with pytest.raises(errors.UserError) as error:
    Profiler(epath.Path("/x"), steps=steps, total_steps=4)
  assert str(error.value) == (
    f"profile_steps={steps}: expected 0 <= start < stop <= 4, the steps of the"
    " stage"
  )


def test_a_real_trace_is_written(tmp_path):
  with Profiler(epath.Path(tmp_path), steps=(0, 1), total_steps=1) as profiler:
    profiler.before(0)
    profiler.after(1, result=jnp.ones(2) + 1)
  assert list(tmp_path.rglob("*.xplane.pb"))
