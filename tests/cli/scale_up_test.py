from __future__ import annotations

import dataclasses

from aquila_jax.core.experiment_config import ScaleUp
from aquila_jax.core.model_config import MoeConfig
from aquila_jax.growth.scale_up import plan_growth, scale_up
from tests.cli import tiny
from tests.cli.commands import SMOKE, names, succeeded


def test_it_writes_what_the_library_grows(commands, dense, tmp_path):
  of_config, of_flags = (tmp_path / name for name in ("config", "flags"))
  command = ("scale_up", SMOKE, f"--source={dense}")
  found = commands.run_all(
    [
      # The only stage of the config that scales up, by its own method.
      (*command, f"--output={of_config}"),
      # A stage that does not, and only what the flags say.
      (
        *command,
        f"--output={of_flags}",
        "--stage=dense",
        "--config.stages.dense.model.num_layers=4",
        "--config.stages.dense.model.mlp_dim=96",
        "--method=fpi",
        "--optimizer=reset",
      ),
    ]
  )
  source, stages = tiny.load(dense), tiny.experiment().stages
  deep = dataclasses.replace(stages["dense"].model, num_layers=4, mlp_dim=96)
  options = ScaleUp(source=str(dense), method="aki_pro", compare=())
  plain = dataclasses.replace(options, method="fpi", optimizer="reset")
  trained = "parameters, trained 7 steps on 3.6K tokens"
  for output, one, name, target, chosen, line in (
    (
      of_config,
      found[0],
      "scale_up",
      stages["scale_up"].model,
      options,
      f"129.8K {trained}, with optimizer state",
    ),
    (
      of_flags,
      found[1],
      "dense",
      deep,
      plain,
      # 12,320 + 4 * (3,136 + 3 * 32 * 96 + 64); see count_test.
      f"62.0K {trained}, without optimizer state",
    ),
  ):
    succeeded(one)
    assert one.out.splitlines() == [
      *plan_growth(source.config, target, chosen).lines(),
      f"{output}: {line}",
    ]
    expected = scale_up(source, target, chosen, name=name)
    loaded = tiny.load(output)
    assert loaded.config == target
    assert loaded.lineage == expected.lineage
    assert loaded.tokenizer == source.tokenizer
    tiny.assert_same(loaded.params, expected.params)
    tiny.assert_same(loaded.moments, expected.moments)
  assert names(tmp_path) == ["config", "flags"]


def test_a_target_of_flags_is_checked_and_said_before_it_is_written(
  commands, dense, tmp_path
):
  output = tmp_path / "wide"
  command = (
    "scale_up",
    f"--source={dense}",
    "--target=embed_dim=40,mlp_dim=96,num_layers=3",
    "--method=lemon",
    "--check",
    "--check_tokens=40",
    "--seed=2",
  )
  dry, written = commands.run_all(
    [(*command, "--dry_run"), (*command, f"--output={output}")]
  )
  succeeded(dry)
  succeeded(written)
  source, found = tiny.load(dense), tiny.load(output)
  target = dataclasses.replace(
    source.config,
    embed_dim=40,
    mlp_dim=96,
    num_layers=3,
    # At which a residual of 32 is exact when it is padded to 40.
    norm_epsilon=source.config.norm_epsilon * 0.8,
  )
  assert found.config == target
  options = ScaleUp(
    source=str(dense), method="lemon", vocabulary="mean", context="extend"
  )
  expected = scale_up(source, target, options, seed=2)
  tiny.assert_same(found.params, expected.params)
  tiny.assert_same(found.moments, expected.moments)
  plan = list(plan_growth(source.config, target, options, seed=2).lines())
  assert dry.out.splitlines()[:-1] == plan
  assert written.out.splitlines()[:-1] == dry.out.splitlines()
  growth = found.lineage.events[-1].growth
  assert growth is not None
  check = growth["check"]
  assert check["tokens"] == 40
  # float32: sums of a hundred terms, of logits of this size.
  assert check["largest_difference"] < 1e-5 * check["largest_logit"]
  assert abs(check["loss_after"] - check["loss_before"]) < 1e-5
  assert dry.out.splitlines()[-1].startswith("measured on 40 tokens: logits")
  assert names(tmp_path) == ["wide"]


def test_mistakes_are_refused(commands, dense, data, tmp_path):
  mixture = tmp_path / "mixture"
  dense_model = tiny.load(dense)
  tiny.save(
    mixture,
    tiny.untrained(
      dataclasses.replace(dense_model.config, moe=MoeConfig(num_experts=2)),
      dense_model.tokenizer,
    ),
  )
  command = ("scale_up", SMOKE, f"--output={tmp_path / 'new'}")
  wrong = dense.parent / "dens"
  grow = (*command, f"--source={dense}")
  section = "config.stages.scale_up.model"
  commands.assert_refused(
    {
      "a wrong path": (
        (*command, f"--source={wrong}"),
        f"--source={str(wrong)!r}: there is no such directory; did you mean"
        f" {str(dense)!r}?",
      ),
      "no MODEL": (
        (*command, f"--source={data}"),
        f"--source={str(data)!r} is not a MODEL directory: it has no"
        " config.json",
      ),
      "no output": (
        ("scale_up", SMOKE, f"--source={dense}"),
        "--output is missing; --dry_run needs none",
      ),
      "two targets": (
        (*grow, "--target=embed_dim=64"),
        "give one of --config and --target",
      ),
      "a field of no model": (
        ("scale_up", f"--source={dense}", "--dry_run")
        + ("--target=embed_dims=64",),
        "--target.embed_dims=64 is not a field of --target; did you mean"
        " 'embed_dim'?",
      ),
      "two rules of depth": (
        (*grow, "--method=aki", "--depth=stack", "--layers=0,1,1"),
        "config.stages.scale_up.init.depth='stack' and layers=(0, 1, 1): give"
        " one of them",
      ),
      "an unknown method": (
        (*grow, "--method=akipro"),
        "--method='akipro' is unknown; did you mean 'aki_pro'?",
      ),
      "a method that keeps no moments": (
        (*grow, "--method=random"),
        "config.stages.scale_up.init.optimizer='grow': expected 'reset';"
        " method='random' keeps no parameter that moments could belong to",
      ),
      "a depth rule that is not the method's": (
        (*grow, "--config.stages.scale_up.init.method=aki", "--method=aki_pro")
        + ("--config.stages.scale_up.init.depth=stack",),
        "config.stages.scale_up.init.depth='stack': method='aki_pro' is AKI"
        " with depth='interpolate'; use method='aki' for another depth rule",
      ),
      "wider heads": (
        (*grow, f"--{section}.head_dim=32"),
        f"{section}.head_dim=32: expected the source's 16; RoPE turns each pair"
        " of a head at a rate of its own, so heads grow in number, not in"
        " width",
      ),
      "fewer layers": (
        (*grow, f"--{section}.num_layers=1"),
        f"{section}.num_layers=1: expected at least 2; Scale-Up does not"
        " shrink",
      ),
    }
  )
  of_mixture = commands.run(*command, f"--source={mixture}")
  assert (of_mixture.code, of_mixture.out) == (2, "")
  assert of_mixture.last_line == (
    f"aquila_jax: {section}.moe=None: expected the source's (2 experts);"
    " Scale-Out makes experts"
  )
  assert names(tmp_path) == ["mixture"]
