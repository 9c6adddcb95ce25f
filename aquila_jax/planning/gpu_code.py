"""What a GPU's compiler makes of a function's Triton kernels; no GPU needed.

JAX hands a kernel to XLA as Triton's intermediate code, and the XLA of a GPU
machine compiles it. The package `triton` does the same anywhere, by the same
passes in another version: that the code is taken, and what it needs of a
multiprocessor, is known before there is a GPU. How fast it runs is not.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any

import jax
from jax._src.interpreters import mlir
from jax._src.lib import triton as jaxlib_triton
from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]

_CALL = "__gpu$xla.gpu.triton"
_WARP = 32  # threads


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelCode:
  """A kernel's machine code."""

  name: str
  programs: int
  warps: int  # a program
  registers: int  # a thread
  spilled_bytes: int  # a thread; what does not fit into registers
  shared_bytes: int  # a program
  instructions: int  # a warp's, a loop's body once


def compile_kernels(
  function: Callable[..., Any],
  *arguments: Any,
  capability: int,
) -> list[KernelCode]:
  """The kernels of `function` in the order of their calls.

  Args:
    function: to be jitted.
    arguments: arrays, or their `jax.ShapeDtypeStruct`.
    capability: of the GPU: 80 (A100), 90 (H100), 100 (B200).

  Returns:
    A KernelCode for each.

  Raises:
    RuntimeError: where the package `triton` is not installed.
  """
  if importlib.util.find_spec("triton") is None:
    raise RuntimeError(
      "no module triton; `make gpu` installs it into an environment of its own"
    )
  exported = jax.export.export(
    jax.jit(function),
    platforms=["cuda"],
    disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(_CALL)],
  )(*arguments)
  context = mlir.make_ir_context()
  dialect: Any = jaxlib_triton.dialect  # pyright: ignore[reportPrivateImportUsage]
  dialect.register_dialect(context)
  with context:
    module = ir.Module.parse(exported.mlir_module())
    return [
      _compile(config, capability=capability)
      for config in _configs(module.operation)
    ]


def _configs(operation: ir.Operation) -> list[ir.DictAttr]:
  found = []

  def visit(op: ir.Operation) -> ir.WalkResult:
    if op.name == "stablehlo.custom_call":
      target = ir.StringAttr(op.attributes["call_target_name"]).value
      if target == _CALL:
        found.append(ir.DictAttr(op.attributes["mhlo.backend_config"]))
    return ir.WalkResult.ADVANCE

  operation.walk(visit, ir.WalkOrder.PRE_ORDER)
  return found


def _compile(config: ir.DictAttr, *, capability: int) -> KernelCode:
  import triton  # pyright: ignore[reportMissingImports]
  from triton.backends.compiler import (  # pyright: ignore[reportMissingImports]
    GPUTarget,
  )
  from triton.backends.nvidia.compiler import (  # pyright: ignore[reportMissingImports]
    get_ptxas,
  )

  def number(name: str) -> int:
    return ir.IntegerAttr(config[name]).value

  code = ir.Module.parse(ir.StringAttr(config["ir"]).value_bytes)
  name = ir.StringAttr(config["name"]).value
  warps = number("num_warps")
  with tempfile.TemporaryDirectory() as folder:
    source = pathlib.Path(folder, f"{name}.ttir")
    text = str(code.operation.get_asm(enable_debug_info=False))
    source.write_text(text, encoding="utf-8")
    compiled = triton.compile(
      str(source),
      target=GPUTarget("cuda", capability, _WARP),
      options=dict(
        num_warps=warps,
        num_stages=number("num_stages"),
        enable_fp_fusion=True,
      ),
    )
    binary = pathlib.Path(folder, f"{name}.cubin")
    binary.write_bytes(compiled.asm["cubin"])
    listing = _tool("nvdisasm", "-c", binary)
    usage = _tool("cuobjdump", "-res-usage", binary)
    assembly = pathlib.Path(folder, f"{name}.ptx")
    assembly.write_text(compiled.asm["ptx"], encoding="utf-8")
    # The frame that cuobjdump states is also that of a subroutine's call.
    spilled = _output(
      get_ptxas(capability).path,
      "--verbose",
      "--regAllocOptLevel=2",  # as triton does
      f"--gpu-name={_architecture(compiled.asm['ptx'])}",
      f"--output-file={binary}",
      assembly,
    )
  registers = re.search(r"REG:(\d+)", usage)
  stores = re.search(r"(\d+) bytes spill stores", spilled)
  assert registers is not None, usage
  assert stores is not None, spilled
  return KernelCode(
    name=name,
    programs=number("grid_x") * number("grid_y") * number("grid_z"),
    warps=warps,
    registers=int(registers[1]),
    spilled_bytes=int(stores[1]),
    shared_bytes=compiled.metadata.shared,
    instructions=len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", listing, re.M)),
  )


def _tool(name: str, *arguments: Any) -> str:
  """What one of NVIDIA's that come with triton says."""
  import triton.backends.nvidia  # pyright: ignore[reportMissingImports]

  path = pathlib.Path(triton.backends.nvidia.__path__[0], "bin", name)
  return _output(path, *arguments)


def _output(*command: Any) -> str:
  done = subprocess.run(
    list(map(str, command)), capture_output=True, text=True, check=True
  )
  return done.stdout + done.stderr


def _architecture(assembly: str) -> str:
  found = re.search(r"^\.target (\w+)", assembly, re.M)
  assert found is not None, assembly[:200]
  return found[1]
