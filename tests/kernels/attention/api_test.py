"""The choice of a backend."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.kernels.attention import api, chunked, cudnn, splash
from aquila_jax.kernels.attention.mesh_axes import UNDIVIDED
from tests.kernels.attention import contract


def _refuse(*args, **kwargs):
  raise NotImplementedError("it is refused here")


@pytest.mark.parametrize(
  ("platform", "length", "able", "name"),
  [
    ("cpu", 512, True, "xla"),
    ("cpu", 513, True, "chunked"),
    ("tpu", 512, True, "splash"),
    ("tpu", 512, False, "xla"),
    ("tpu", 1024, False, "chunked"),
    # Not cudnn, which has not run yet; nobody asks it.
    ("gpu", 1024, True, "chunked"),
    ("gpu", 100, True, "xla"),
  ],
)
def test_each_platform_has_its_own(monkeypatch, platform, length, able, name):
  said = []
  monkeypatch.setattr(jax, "default_backend", lambda: platform)
  monkeypatch.setattr(api, "_say", lambda *args: said.append(args))
  for backend in (splash, cudnn):
    monkeypatch.setattr(
      backend, "check", (lambda *a, **k: None) if able else _refuse
    )
  query = jnp.zeros((1, length, 1, 1, 8))
  assert api._choose(query, mesh_axes=UNDIVIDED) == name
  reason = "" if able else "it is refused here"
  assert said == [(name, platform, reason)]


def test_the_choice_is_logged_once_with_its_reason(monkeypatch):
  lines = []
  monkeypatch.setattr(
    api.logging, "info", lambda line, *args: lines.append(line % args)
  )
  api._say.cache_clear()
  for _ in range(2):
    api._say("splash", "tpu", "")
    api._say("xla", "tpu", "splash needs T to be 128")
  assert lines == [
    "attention: splash on tpu",
    "attention: xla on tpu, as splash needs T to be 128",
  ]


def _call(length, **options):
  case = contract.Case(length=length)
  *arguments, _ = contract.inputs(case)
  return jax.jit(
    lambda *x: api.causal_attention(
      *x, segments=jnp.asarray(contract.segments(case)), **options
    )
  )(*arguments)


@pytest.mark.parametrize(("length", "name"), [(512, "xla"), (640, "chunked")])
def test_none_is_that_of_this_platform_bit_for_bit(length, name):
  chosen, named = _call(length), _call(length, implementation=name)
  np.testing.assert_array_equal(chosen, named)


def test_chunked_is_another_program(monkeypatch):
  """Else the test above compares nothing: a chunk's backend is called."""
  monkeypatch.setattr(chunked, "causal_attention", _refuse)
  _call(512)
  with pytest.raises(NotImplementedError, match="^it is refused here"):
    _call(640)


@pytest.mark.parametrize(
  ("name", "reason"),
  [
    (
      "triton",
      "implementation='triton'; there are xla, chunked, splash, cudnn",
    ),
    ("splash", "implementation='splash' needs a TPU; this is cpu"),
    ("cudnn", "implementation='cudnn' needs a GPU; this is cpu"),
  ],
)
def test_by_name_what_cannot_be_done_is_refused(name, reason):
  implementation: Any = name
  query = jnp.zeros((1, 128, 1, 1, 8))
  with pytest.raises(NotImplementedError) as error:
    api._check(implementation, query, mesh_axes=UNDIVIDED)
  assert str(error.value) == reason


def test_a_failure_of_a_kernel_is_not_hidden(monkeypatch):
  """Only what `check` says makes way for another backend."""
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  monkeypatch.setattr(splash, "check", lambda *a, **k: None)
  monkeypatch.setattr(splash, "causal_attention", _refuse)
  with pytest.raises(NotImplementedError, match="^it is refused here"):
    _call(128)
