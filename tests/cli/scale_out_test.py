from __future__ import annotations

import dataclasses

import jax
import numpy as np

from aquila_jax.core.axes import path_name
from aquila_jax.core.experiment_config import ScaleOut
from aquila_jax.core.model_config import MoeConfig
from aquila_jax.growth.scale_out import scale_out
from tests.cli import tiny
from tests.cli.commands import names, succeeded


def test_it_writes_what_the_library_grows(commands, dense, tmp_path):
  grown, reset, some = (tmp_path / name for name in ("grown", "reset", "some"))
  command = ("scale_out", f"--source={dense}", "--num_experts=4", "--top_k=2")
  written = commands.run_all(
    [
      (*command, f"--output={grown}", "--seed=3"),
      (*command, f"--output={reset}", "--optimizer=reset"),
      (*command, f"--output={some}", "--moe_layers=every_second"),
    ]
  )
  source = tiny.load(dense)
  target = dataclasses.replace(
    source.config, moe=MoeConfig(num_experts=4, top_k=2)
  )
  size = "68.1K parameters (43.6K active), trained 7 steps on 3.6K tokens"
  options = ScaleOut(source=str(dense))
  without = dataclasses.replace(options, optimizer="reset")
  for output, one, seed, chosen, state in (
    (grown, written[0], 3, options, "with"),
    (reset, written[1], 0, without, "without"),
  ):
    succeeded(one)
    assert one.out == f"{output}: {size}, {state} optimizer state\n"
    expected = scale_out(source, target, chosen, seed=seed)
    loaded = tiny.load(output)
    assert loaded.config == target
    assert loaded.lineage == expected.lineage
    assert loaded.tokenizer == source.tokenizer
    found, wanted = (
      {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
      for tree in (loaded.params, expected.params)
    )
    # Its erfinv is compiled with other options in pytest's process (conftest):
    # some float32 roundings. Copies are exact.
    (router,) = [name for name in wanted if "router" in name]
    np.testing.assert_allclose(
      found.pop(router), wanted.pop(router), rtol=2**-21
    )
    tiny.assert_same(found, wanted)
    tiny.assert_same(loaded.moments, expected.moments)
  succeeded(written[2])
  assert tiny.load(some).config.moe_layers == (1,)
  assert names(tmp_path) == ["grown", "reset", "some"]


def test_mistakes_are_refused(commands, dense, data, tmp_path):
  damaged, taken = tmp_path / "damaged", tmp_path / "taken"
  tiny.damaged_copy(dense, damaged)
  taken.mkdir()
  bare = tmp_path / "bare"
  tiny.save(bare, dataclasses.replace(tiny.load(dense), moments=None))
  output = f"--output={tmp_path / 'new'}"
  source = f"--source={dense}"
  wrong = dense.parent / "dens"
  commands.assert_refused(
    {
      "a wrong path": (
        ("scale_out", f"--source={wrong}", output),
        f"--source={str(wrong)!r}: there is no such directory; did you mean"
        f" {str(dense)!r}?",
      ),
      "an output that exists": (
        ("scale_out", source, f"--output={taken}"),
        f"--output={str(taken)!r}: it exists; choose another",
      ),
      "an unknown method": (
        ("scale_out", source, output, "--method=upcycling"),
        "--method='upcycling' is unknown; did you mean 'sparse_upcycling'?"
        " (expected one of sparse_upcycling)",
      ),
      "an unknown rule": (
        ("scale_out", source, output, "--optimizer=growth"),
        "--optimizer='growth' is unknown; did you mean 'grow'? (expected one of"
        " grow, reset)",
      ),
      "an optimizer state that is not there": (
        ("scale_out", f"--source={bare}", output, "--optimizer=grow"),
        "--optimizer=grow: the source has no optimizer state; expected reset,"
        " or no --optimizer",
      ),
      "more than there are": (
        ("scale_out", source, output, "--num_experts=2", "--top_k=3"),
        "--top_k=3: need 1 <= top_k <= num_experts=2",
      ),
      "a pattern that is none": (
        ("scale_out", source, output, "--moe_layers=half"),
        "--moe_layers='half': expected one of all, every_second, last_half, or"
        " numbers",
      ),
      "layers in no order": (
        ("scale_out", source, output, "--moe_layers=1,0"),
        "--moe_layers=(1, 0): need layers from 0 in rising order, each once, at"
        " least one",
      ),
      "a layer that is not there": (
        ("scale_out", source, output, "--moe_layers=1,9"),
        "--moe_layers=(1, 9): need layers below num_layers=2",
      ),
    }
  )
  broken = commands.run("scale_out", f"--source={damaged}", output)
  assert (broken.code, broken.out) == (2, "")
  *log, message = broken.err.splitlines()
  assert message.startswith(
    f"aquila_jax: {damaged}/params: leaf 'embedding.table' is damaged: "
  )
  # Said when the mixture's shapes were computed.
  assert log == ["expert_ffn: cpu_loop on cpu"]
  assert names(tmp_path) == ["bare", "damaged", "taken"]
  assert names(taken) == []
