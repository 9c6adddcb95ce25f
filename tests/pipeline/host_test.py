"""Where a source is read: never whole on one of several accelerators."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import pytest

from aquila_jax.core import errors
from aquila_jax.pipeline.host import on_host


def test_on_cpus_and_on_one_device_nothing_changes():
  for platform, count in (("cpu", 8), ("tpu", 1)):
    found = on_host(platform, num_devices=count)
    assert isinstance(found, contextlib.nullcontext)


def test_beside_several_accelerators_it_is_the_cpu():
  with on_host("tpu", num_devices=8):
    placed = jax.device_put(jnp.ones(3))
  assert {device.platform for device in placed.devices()} == {"cpu"}


def test_without_cpus_the_user_is_told(monkeypatch):
  def none(*, backend):
    raise RuntimeError(f"Unknown backend {backend}")

  monkeypatch.setattr(jax, "local_devices", none)
  with pytest.raises(errors.UserError, match="expected cpu among them"):
    on_host("tpu", num_devices=8)
