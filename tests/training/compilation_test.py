from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import pytest

from aquila_jax.kernels.target import Target, compiling_for
from aquila_jax.training import compilation


@pytest.fixture
def settings():
  names = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
  )
  before = {name: getattr(jax.config, name) for name in names}
  yield
  for name, value in before.items():
    jax.config.update(name, value)


@pytest.mark.parametrize(
  "directory, environment, expected",
  [
    ("/x/given", "/x/environment", "/x/given"),
    ("", "/x/environment", "/x/environment"),
    ("", None, str(pathlib.Path.home() / ".cache/aquila_jax/xla")),
  ],
)
def test_where_the_cache_is(
  settings, monkeypatch, directory, environment, expected
):
  del settings
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  if environment:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", environment)
  assert str(compilation.enable_compilation_cache(directory)) == expected
  assert jax.config.jax_compilation_cache_dir == expected  # pyright: ignore[reportAttributeAccessIssue]


def test_the_executable_refuses_another_shape():
  executable = compilation.compile_step(
    jax.jit(lambda x: x + 1), jax.ShapeDtypeStruct((3,), jnp.float32)
  )
  assert executable(jnp.zeros(3)).tolist() == [1.0, 1.0, 1.0]
  with pytest.raises(TypeError):
    executable(jnp.zeros(4))


def test_only_tpus_are_asked_to_overlap():
  assert compilation.overlap_options() is None
  with compiling_for(Target(platform="tpu", device_kind="TPU v5")):
    options = compilation.overlap_options()
  assert options is not None
  # Three quarters of 64 MiB, which tiles are planned with, and 2.
  assert options.pop("xla_tpu_scoped_vmem_limit_kib") == str(50 * 1024)
  assert set(options.values()) == {"true"}
  with compiling_for(Target(platform="gpu", device_kind="NVIDIA H100")):
    assert compilation.overlap_options() is None
