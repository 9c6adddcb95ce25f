"""Settings of every test: strict types, strict promotion, 8 devices.

On an accelerator (JAX_PLATFORMS=cuda) there are as many devices as there are;
what needs 8 of them fails there, and float32 is computed in full.
"""

from __future__ import annotations

import collections
import gc
import os

from tests import brief

# Before jax is imported. Sharding is tested on 8 simulated devices.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
  [
    brief.XLA_FLAGS if os.environ["JAX_PLATFORMS"] == "cpu" else "",
    os.environ.get("XLA_FLAGS", ""),
    brief.devices(8),
  ]
)
# Several processes share an accelerator.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# One process a core runs the tests; threads of the libraries stay out.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_threefry_partitionable", True)
if os.environ["JAX_PLATFORMS"] != "cpu":
  # By default products of float32 are of TF32 on GPUs, of bfloat16 on TPUs.
  jax.config.update("jax_default_matmul_precision", "highest")

# No frames of Python beside every operation that is lowered; nobody reads them.
jax.config.update("jax_include_full_tracebacks_in_locations", False)
jax.config.update("jax_traceback_in_locations_limit", 0)

# Shapes in annotations are checked at every call while tests run.
install_import_hook("aquila_jax", "beartype.beartype")


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(items: list[pytest.Item]):
  """Of a table that is mostly long, every so many rows are not.

  `@pytest.mark.mostly_long(one_in=3)` leaves rows 0, 3, 6... to `make test`; it
  has no factor in common with the sizes of a product, so that what is left has
  each value of each.
  """
  seen: collections.Counter[str] = collections.Counter()
  for item in items:
    table = item.get_closest_marker("mostly_long")
    if table is not None:
      function = item.nodeid.partition("[")[0]
      if seen[function] % table.kwargs["one_in"]:
        item.add_marker(pytest.mark.long)
      seen[function] += 1


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
  """Programs that several tests share are compiled once a process."""
  # Not once for all processes: jax writes entries in place, so one process
  # could read half of what another is writing.
  directory = tmp_path_factory.mktemp("xla")
  jax.config.update("jax_compilation_cache_dir", str(directory))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  yield
  jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="session", autouse=True)
def rare_collections():
  """Garbage in cycles is looked for seldom, and not in what is imported."""
  # A fifteenth of the time went there: traces make millions of objects that
  # stay, and few that are in cycles.
  before = gc.get_threshold()
  gc.freeze()
  gc.set_threshold(1_000_000, 5, 3)
  yield
  gc.set_threshold(*before)


@pytest.fixture(scope="module", autouse=True)
def collections_between_modules():
  """What a module leaves is looked through once."""
  yield
  gc.collect()
  gc.freeze()


@pytest.fixture(scope="module")
def steps_built_once():
  """A step is traced and compiled for the first of equal jobs only.

  For tests that start a job again and again; what it does is not compiling.
  """
  from aquila_jax.training import loop, replay

  build, built = loop.build_step, {}

  def build_once(job):
    fields = (
      job.model,
      job.train,
      job.mesh,
      job.total_steps,
      len(job.input.languages),
      job.seed,
      job.trained_steps,
      job.config_path,
    )
    if job.copies is not None or job.new_indices is not None:
      return build(job)
    if fields not in built:
      built[fields] = build(job)
    return built[fields]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "build_step", build_once)
    patch.setattr(replay, "build_step", build_once)
    yield
