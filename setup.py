"""The package aquila_jax; tool settings are in pyproject.toml."""

from __future__ import annotations

import pathlib
import re

import setuptools

_HERE = pathlib.Path(__file__).resolve().parent


def _version() -> str:
  """Read, not imported: importing the package would need its dependencies."""
  text = (_HERE / "aquila_jax" / "version.py").read_text(encoding="utf-8")
  found = re.search(r'^VERSION = "([^"]+)"$', text, re.MULTILINE)
  assert found is not None, "aquila_jax/version.py has no VERSION"
  return found.group(1)


# Lower bounds are what the tests ran with. jax 0.10.2 is the newest for
# Python 3.11; newer Pythons get a newer one.
_DEPENDENCIES = [
  "absl-py>=2.3",
  "etils[epath]>=1.13",
  "flax>=0.12",
  "gguf>=0.19",
  "grain>=0.2.15",
  "jax>=0.10.2",
  "jaxtyping>=0.3.6",
  "matplotlib>=3.10",
  "ml-collections>=1.1",
  "numpy>=2.2",
  "optax>=0.2.6",
  "orbax-checkpoint>=0.11.30",
  "pyarrow>=21",
  "rich>=14",
  "safetensors>=0.8",
  "scipy>=1.15",
  "tensorboardX>=2.6.4",
  "tensorstore>=0.1.80",
  "tokenizers>=0.22",
  "zstandard>=0.25",
]

_EXTRAS = {
  "cuda": ["jax[cuda12]>=0.10.2"],
  "tpu": ["jax[tpu]>=0.10.2"],
  # `make gpu`: what Triton makes of kernels where there is no GPU.
  "triton": ["triton>=3.9"],
  # Sources of the form hf:NAME.
  "hf": ["datasets>=4"],
  "eval": ["lm-eval[hf]>=0.4.13"],
  # compare_hf and `make parity`. Exact, because the table in docs/parity.md is
  # of these. On Linux torch brings CUDA where pip's index has no CPU build;
  # PIP_EXTRA_INDEX_URL can name one that has.
  "parity": [
    "accelerate>=1.10",  # with which transformers reads a GGUF file
    "torch==2.13.0",
    "transformers==5.24.0",
  ],
  "test": [
    "beartype>=0.22",
    "hypothesis>=6.130",
    "pytest>=9",
    "pytest-xdist>=3.8",
  ],
  # Exact, because another version formats or judges differently.
  "dev": [
    "pre-commit>=4",
    "pyright[nodejs]==1.1.414",
    "ruff==0.17.6",
  ],
}

setuptools.setup(
  name="aquila_jax",
  version=_version(),
  description="EfficientScale (AquilaMoE) in JAX: grow a small dense language"
  " model in width and depth, then into a mixture of experts.",
  long_description=(_HERE / "README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  license_files=["LICENSE"],
  python_requires=">=3.11",
  packages=setuptools.find_namespace_packages(
    include=["aquila_jax", "aquila_jax.*"]
  ),
  package_data={
    "aquila_jax.evaluation.tasks": ["*.yaml"],
    "aquila_jax.kernels.topk_routing": ["*.json"],
  },
  install_requires=_DEPENDENCIES,
  extras_require=_EXTRAS,
  classifiers=[
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Programming Language :: Python :: 3.13",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
  ],
)
