from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from aquila_jax.core.axes import path_name
from aquila_jax.core.experiment_config import ScaleOut
from aquila_jax.core.model_config import MoeConfig
from aquila_jax.core.model_dir import StoredModel
from aquila_jax.growth.scale_out import plan_scale_out, scale_out
from tests.cli import tiny
from tests.cli.commands import SMOKE, names, succeeded


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
    assert one.out.splitlines() == [
      *plan_scale_out(source.config, target, chosen).lines(),
      f"{output}: {size}, {state} optimizer state",
    ]
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


def test_there_and_back_again(commands, dense, tmp_path):
  """Cut into shards, checked, made larger, and merged."""
  text = tmp_path / "text"
  text.write_text("The river rose in the night. 春天来了。" * 20, "utf-8")
  cut, larger, merged = (tmp_path / name for name in ("cut", "larger", "ffn"))
  command = (
    "scale_out",
    f"--source={dense}",
    "--method=granular",
    "--num_experts=6",
    "--top_k=4",
    "--target=mlp_dim=16,moe.shared_expert_dim=32",
    "--router=clusters",
    f"--sample={text}",
    "--check",
    "--check_tokens=40",
    "--seed=3",
  )
  dry, written = commands.run_all(
    [(*command, "--dry_run"), (*command, f"--output={cut}")]
  )
  succeeded(dry)
  succeeded(written)
  assert written.out.splitlines()[:-1] == dry.out.splitlines()
  assert dry.out.splitlines()[1:3] == [
    "predicted exact: the function of the source is kept, but for rounding",
    "  6 experts: 3 copies of an FFN, each in 2 shards, 16 hidden units an"
    " expert; a token meets 4, and a shared one of 32",
  ]
  found = tiny.load(cut)
  growth = found.lineage.events[-1].growth
  assert growth is not None
  check = growth["check"]
  assert check["largest_difference"] < 1e-5 * check["largest_logit"]
  grow = ("scale_out", f"--source={cut}")
  grown, mean = commands.run_all(
    [
      # Twice the experts, of which a token meets twice as many.
      (*grow, "--check", f"--output={larger}"),
      (
        *grow,
        f"--output={merged}",
        "--method=merge_by_usage",
      ),
    ]
  )
  succeeded(grown)
  twice = tiny.load(larger)
  assert found.config.moe is not None
  assert twice.config.moe == dataclasses.replace(
    found.config.moe, num_experts=12, top_k=8
  )
  growth = twice.lineage.events[-1].growth
  assert growth is not None
  check = growth["check"]
  assert growth["exact"]
  assert check["largest_difference"] < 1e-5 * check["largest_logit"]
  # The shared expert has a gate.
  assert mean.code == 2
  assert mean.err.splitlines()[-1] == (
    "aquila_jax: --method='merge_by_usage': the source's shared expert has a"
    " gate (moe.shared_expert_gate), and no dense FFN can hold one"
  )
  assert names(tmp_path) == ["cut", "larger", "text"]


def test_layers_without_experts_keep_their_width(commands, dense, tmp_path):
  """Shards of every second layer; twice as many; smaller ones; one FFN."""
  cut, larger, finer = (tmp_path / name for name in ("cut", "larger", "finer"))
  one = commands.run(
    "scale_out",
    f"--source={dense}",
    f"--output={cut}",
    "--method=granular",
    "--moe_layers=every_second",
    "--num_experts=6",
    "--top_k=4",
    "--target=mlp_dim=16,moe.shared_expert_dim=32",
    "--check",
    "--check_tokens=40",
  )
  succeeded(one)
  assert one.out.splitlines()[1] == (
    "predicted exact: the function of the source is kept, but for rounding"
  )
  source, found = tiny.load(dense), tiny.load(cut)
  assert source.config.mlp_dim == 64
  moe = MoeConfig(
    num_experts=6,
    top_k=4,
    layers="every_second",
    dense_mlp_dim=64,
    shared_expert_dim=32,
  )
  assert found.config == dataclasses.replace(source.config, moe=moe, mlp_dim=16)
  ffns, kept = (
    model.params["layers"][part]
    for model, part in ((source, "mlp"), (found, "dense_mlp"))
  )
  for name, leaf in kept.items():
    np.testing.assert_array_equal(leaf, ffns[name][:1], name)
  check = _growth(found)["check"]
  assert check["largest_difference"] < 1e-5 * check["largest_logit"]
  again = ("scale_out", f"--source={cut}", "--check", "--check_tokens=40")
  grown, smaller, mean, other = commands.run_all(
    [
      (*again, f"--output={larger}"),
      (
        *again,
        f"--output={finer}",
        "--num_experts=12",
        "--top_k=8",
        "--method=granular",
        "--target=mlp_dim=8",
      ),
      (
        *again,
        "--dry_run",
        "--method=average",
        "--target=moe=None",
      ),
      (*again, "--dry_run", "--target=moe.dense_mlp_dim=16"),
    ]
  )
  for one, output, width in ((grown, larger, 16), (smaller, finer, 8)):
    succeeded(one)
    model = tiny.load(output)
    more = dataclasses.replace(moe, num_experts=12, top_k=8)
    assert model.config == dataclasses.replace(
      source.config, moe=more, mlp_dim=width
    )
    check = _growth(model)["check"]
    assert check["largest_difference"] < 1e-5 * check["largest_logit"]
  assert (mean.code, other.code) == (2, 2)
  assert mean.last_line == (
    "aquila_jax: --method='average': the source's shared expert has a gate"
    " (moe.shared_expert_gate), and no dense FFN can hold one"
  )
  assert other.last_line == (
    "aquila_jax: --target.moe.dense_mlp_dim=16: expected 64, the hidden units"
    " of the FFNs that layers without experts keep (moe.layers='every_second')"
  )


def _growth(model: StoredModel) -> dict[str, Any]:
  growth = model.lineage.events[-1].growth
  assert growth is not None
  return growth


def test_the_target_and_the_options_of_a_config(commands, dense, tmp_path):
  output = tmp_path / "grown"
  one = commands.run(
    "scale_out",
    SMOKE,
    f"--source={dense}",
    f"--output={output}",
    "--config.stages.scale_out.init.method=drop_upcycling",
    "--config.stages.scale_out.init.redraw=0.25",
    "--noise=0.3",
    *(
      f"--config.stages.scale_out.model.{field}="
      f"{getattr(tiny.dense_config(), field)}"
      for field in ("num_layers", "embed_dim", "mlp_dim", "num_heads")
    ),
  )
  succeeded(one)
  source, found = tiny.load(dense), tiny.load(output)
  options = ScaleOut(
    source=str(dense), method="drop_upcycling", redraw=0.25, noise=0.3
  )
  expected = scale_out(source, found.config, options, name="scale_out")
  assert found.lineage == expected.lineage
  tiny.assert_same(found.moments, expected.moments)


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
        "--method='upcycling' is unknown; did you mean 'drop_upcycling'?"
        " (expected one of sparse_upcycling, granular, drop_upcycling, noise,"
        " branch_train_mix, average, merge_by_usage)",
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
      "a field without a value": (
        ("scale_out", source, output, "--target=mlp_dim"),
        "--target: 'mlp_dim' is not a field=value",
      ),
      "moments of what is put together": (
        (
          "scale_out",
          source,
          output,
          "--method=average",
          "--optimizer=grow",
        ),
        "--optimizer='grow': expected 'reset'; method='average' puts models"
        " together that moments do not belong to",
      ),
      "no output": (
        ("scale_out", source),
        "--output is missing; --dry_run needs none",
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
  unread = commands.run("scale_out", source, output, "--sample=README.md")
  assert (unread.code, unread.out) == (2, "")
  assert unread.last_line == (
    "aquila_jax: --sample: nothing is measured; expected none"
  )
  broken = commands.run("scale_out", f"--source={damaged}", output)
  assert (broken.code, len(broken.out.splitlines())) == (2, 3)
  (message,) = broken.err.splitlines()
  assert message.startswith(
    f"aquila_jax: {damaged}/params: leaf 'embedding.table' is damaged: "
  )
  assert names(tmp_path) == ["bare", "damaged", "taken"]
  assert names(taken) == []
