"""Settings of every test: strict types, strict promotion, 8 devices."""

from __future__ import annotations

import os

# Before jax is imported: sharding is tested on 8 simulated devices.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# One process a core runs the tests; threads of the libraries stay out.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_threefry_partitionable", True)

# Shapes in annotations are checked at every call while tests run.
install_import_hook("aquila_jax", "beartype.beartype")
