"""Claim: attention over rows of 8,192 tokens holds no [T, T] of anything.

  JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python -m benchmarks.attention_memory

Compiles one attention layer, forward and backward, with a backend named, and
prints the temporaries that the compiler plans for: for CPUs, and where libtpu
is installed for one chip of v5p and v6e, which need not be there. The layer is
of 32 query and 8 key heads of 128 at width 4096, in bfloat16, a row a device.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import time
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from aquila_jax.core import axes
from aquila_jax.core.model_config import AttentionImplementation, ModelConfig
from aquila_jax.layers import rotary
from aquila_jax.layers.attention import Attention
from benchmarks import gpu_clock

_OUTPUT = flags.DEFINE_string("output", None, "A JSON file to write.")
_SMALL = flags.DEFINE_bool("small", False, "Tiny shapes: does it run?")

_LENGTHS, _SMALL_LENGTHS = (2048, 8192), (256,)
_TOPOLOGIES = {"TPU v5p": "v5p:2x2x1", "TPU v6e": "v6e:2x2"}
_BACKENDS: tuple[AttentionImplementation, ...] = ("xla", "chunked", "splash")
Row = dict[str, Any]


def _config(backend: AttentionImplementation) -> ModelConfig:
  return ModelConfig(
    vocab_size=1,
    num_layers=1,
    embed_dim=4096,
    mlp_dim=1,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    param_dtype="bfloat16",
    attention_implementation=backend,
  )


def _platforms() -> dict[str, tuple[str, Mesh]]:
  """The platform and a mesh of one device of each target."""

  def mesh(device) -> Mesh:
    return Mesh(np.array([device]), ("data",), axis_types=(AxisType.Auto,))

  found = {"CPU": ("cpu", mesh(jax.devices("cpu")[0]))}
  if importlib.util.find_spec("libtpu") is not None:
    for target, name in _TOPOLOGIES.items():
      topology = topologies.get_topology_desc(
        platform="tpu", topology_name=name
      )
      found[target] = ("tpu", mesh(topology.devices[0]))
  return found


def _compiled(
  config: ModelConfig, *, length: int, platform: str, mesh: Mesh
) -> Any:
  """The layer's loss, with the gradients of its input and parameters."""
  layer = Attention(config)

  def loss(params, x, positions, segments):
    tables = rotary.tables_of(config, positions)
    out, _ = layer.apply(
      {"params": params}, x, tables=tables, segments=segments
    )
    return jnp.sum(jnp.square(out.astype(jnp.float32)))

  def step(*arguments):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return jax.value_and_grad(loss, (0, 1))(*arguments)

  place = NamedSharding(mesh, PartitionSpec())
  shaped = functools.partial(jax.ShapeDtypeStruct, sharding=place)
  x = shaped((1, length, config.embed_dim), jnp.bfloat16)
  numbers = shaped((1, length), jnp.int32)
  boxed = jax.eval_shape(
    lambda key, x, numbers: layer.init(
      key, x, tables=rotary.tables_of(config, numbers), segments=numbers
    ),
    jax.random.key(0),
    x,
    numbers,
  )
  params = jax.tree.map(
    lambda leaf: shaped(leaf.shape, leaf.dtype),
    axes.split_declared(boxed)[0]["params"],
  )
  # The choice of a backend asks which platform this is, here an absent one.
  with mock.patch.object(jax, "default_backend", lambda: platform):
    lowered = jax.jit(step).lower(params, x, numbers, numbers)
  return lowered.compile()


def _line(row: Row) -> str:
  head = f"{row['target']:<9}{row['tokens']:>7}  {row['implementation']:<9}"
  if "error" in row:
    return f"{head}{row['error'].splitlines()[0][:100]}"
  return (
    f"{head}{row['temporaries_mib']:>10,.0f} MiB"
    f"{row['compile_seconds']:>8.1f} s"
  )


def main(argv: list[str]) -> None:
  """Compiles, prints the table and writes the JSON."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  results = []
  print("target    tokens  backend    temporaries  compiling", flush=True)
  for target, (platform, mesh) in _platforms().items():
    for length in _SMALL_LENGTHS if _SMALL.value else _LENGTHS:
      for backend in _BACKENDS:
        row: Row = dict(target=target, tokens=length, implementation=backend)
        start = time.perf_counter()
        try:
          compiled = _compiled(
            _config(backend), length=length, platform=platform, mesh=mesh
          )
          row |= dict(
            temporaries_mib=1024 * gpu_clock.temporaries(compiled),
            compile_seconds=time.perf_counter() - start,
          )
        except NotImplementedError as error:
          row["error"] = str(error)
        except jax.errors.JaxRuntimeError as error:  # more than there is
          row["error"] = str(error)[:300]
        results.append(row)
        print(_line(row), flush=True)
  installed = importlib.util.find_spec("libtpu") is not None
  gpu_clock.write_report(
    _OUTPUT.value,
    benchmark="attention_memory",
    libtpu=importlib.metadata.version("libtpu") if installed else None,
    layer="B=1, D=4096, N=32, K=8, H=128, bfloat16, forward and backward",
    results=results,
  )


if __name__ == "__main__":
  app.run(main)
