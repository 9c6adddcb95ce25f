"""What AquilaMoE's run would cost today, and the page that says so.

  PYTHONPATH=. python -m benchmarks.cost_of_aquila [--add=NAME.json ...]

writes docs/cost_of_aquila.md from benchmarks/results/cost_of_aquila.json. A
file of --add is of `plan compile --output`, one of --growth of `plan growth`;
it joins the results, in place of one of the same stage, topology and mesh. All
stages are estimated by `plan search` on all pods, and so are the steps that
were compiled, beside.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from typing import Any

from absl import app, flags

from aquila_jax.cli import config_door
from aquila_jax.pipeline import budget
from aquila_jax.pipeline.planned_growth import plan_export
from aquila_jax.planning import plan_search
from aquila_jax.planning.pods import Pod
from aquila_jax.planning.quick_plan import QuickPlan
from aquila_jax.planning.step_memory import Step
from aquila_jax.planning.transform_plan import export_seconds
from aquila_jax.sharding.mesh import abstract_mesh

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cost_of_aquila.json"
PAGE = ROOT / "docs" / "cost_of_aquila.md"
_ADD = flags.DEFINE_multi_string("add", [], "A JSON of `plan compile`.")
_GROWTH = flags.DEFINE_multi_string("growth", [], "A JSON of `plan growth`.")

STAGES = (
  "aquila_1_8b",
  "aquila_8x1_8b",
  "aquila_7b",
  "aquila_16b",
  "aquila_8x16b",
)
# What a stage of AquilaMoE's final model comes from, and itself.
CHAIN = ("aquila_7b", "aquila_16b", "aquila_8x16b")
PODS = ("v5p:4x4x8", "v5p:4x8x8", "v5p:8x8x8", "v6e:16x16")
_GIB = 2**30
_DAY = 86400.0
Row = dict[str, Any]


@functools.cache
def _experiment(stage: str):
  overrides = []
  if "8x" in stage:
    # By the whole batch, a microbatch would be read forward twice.
    overrides.append((f"stages.{stage}.train.loss.balance_over", "running"))
  path = ROOT / "experiments" / "configs" / f"{stage}.py"
  return config_door.load_file(str(path), overrides)


def _tokens(stage: str) -> int:
  experiment = _experiment(stage)
  train = experiment.stages[stage].train
  return budget.total_steps(experiment, stage) * train.tokens_per_step


def estimated(stage: str, topology: str) -> Row:
  """The best of `plan search`."""
  one = _experiment(stage).stages[stage]
  best = plan_search.search(stage, one.model, one.train, Pod.of(topology))[0]
  return best.to_json() | dict(tokens=_tokens(stage))


def _estimate_of(row: Row) -> QuickPlan:
  """By arithmetic, of what was compiled."""
  one, pod = (
    _experiment(row["stage"]).stages[row["stage"]],
    Pod.of(row["topology"]),
  )
  config = dataclasses.replace(_experiment(row["stage"]).mesh, **row["mesh"])
  options = dict(row.get("options", {}))
  of_experts, moe = options.pop("moe", {}), one.model.moe
  if moe is not None:
    moe = dataclasses.replace(moe, **of_experts)
  step = Step(
    model=dataclasses.replace(one.model, **options, moe=moe),
    train=dataclasses.replace(
      one.train, num_microbatches=row["num_microbatches"]
    ),
    mesh=abstract_mesh(config, num_devices=pod.num_devices),
  )
  return QuickPlan.of(row["stage"], step, pod)


def _key(row: Row) -> tuple[Any, ...]:
  divided = tuple((axis, n) for axis, n in row["mesh"].items() if n > 1)
  return row["stage"], row["topology"], divided


def _known(kind: str, files: list[str]) -> dict[tuple[Any, ...], Row]:
  """The rows of the results, and those of files in place of theirs."""
  rows = []
  if RESULTS.exists():
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))[kind]
  for name in files:
    rows.append(json.loads(pathlib.Path(name).read_text(encoding="utf-8")))
  return {_key(row): row for row in rows}


def _exported(stage: str) -> Row:
  sizes, read = plan_export(_experiment(stage).stages[stage].model)
  rows = {
    dtype: dataclasses.asdict(size)
    | dict(seconds=export_seconds(read, size.num_bytes))
    for dtype, size in sizes.items()
  }
  return dict(read=read, dtypes=rows)


def results() -> Row:
  """The results, with files of --add, and estimates made again."""
  compiled, growth = (
    _known("compiled", _ADD.value),
    _known("growth", _GROWTH.value),
  )
  for row in compiled.values():
    plan = _estimate_of(row)
    row["estimate"] = dict(
      memory=plan.memory.total,
      without_overlap=plan.time.without_overlap,
      links=plan.time.links,
    )

  def place(row: Row) -> tuple[int, int]:
    return STAGES.index(row["stage"]), PODS.index(row["topology"])

  return dict(
    benchmark="cost_of_aquila",
    compiled=sorted(compiled.values(), key=place),
    growth=sorted(growth.values(), key=place),
    export=_exported("aquila_8x16b"),
    estimated=[
      estimated(stage, topology) for stage in STAGES for topology in PODS
    ],
  )


def _mesh(row: Row) -> str:
  sizes = [f"{axis} {n}" for axis, n in row["mesh"].items() if n > 1]
  return " x ".join(sizes)


def _compiled_line(row: Row) -> str:
  seconds, memory = row["seconds"], row["memory"]
  times = [
    seconds[name]
    for name in ("without_overlap", "as_scheduled", "with_full_overlap")
  ]
  rate, days = seconds["flops_at_published_rate"], row["days"]
  cells = [
    row["topology"],
    str(row["num_devices"]),
    _mesh(row),
    str(row["num_microbatches"]),
    f"{memory['total'] / _GIB:.1f} of {memory['hbm'] / _GIB:.1f}",
    " / ".join(f"{time:.1f}" for time in times),
    " / ".join(f"{rate / time:.1%}" for time in times),
    f"{row['tokens_per_day'] / 1e9:.1f}",
    f"{days:.1f}",
    f"{days * row['num_devices']:,.0f}",
    f"{days * row['num_devices'] * 24:,.0f}",
  ]
  return f"| {' | '.join(cells)} |"


def _parts_line(row: Row) -> str:
  seconds = row["seconds"]
  cells = [
    f"{row['topology']}, {_mesh(row)}",
    f"{seconds['flops_at_published_rate']:.1f}",
    f"{seconds['kernels']:.1f}",
    f"{seconds['compiler']:.1f}",
    f"{seconds['memory']:.1f}",
    f"{seconds['links']:.1f}",
  ]
  return f"| {' | '.join(cells)} |"


def _check_line(row: Row) -> str:
  memory, seconds = row["memory"]["total"], row["seconds"]["without_overlap"]
  guess = row["estimate"]
  cells = [
    f"{row['topology']}, {_mesh(row)}",
    f"{guess['memory'] / _GIB:.1f}",
    f"{memory / _GIB:.1f}",
    f"{guess['memory'] / memory - 1:+.1%}",
    f"{guess['without_overlap']:.1f}",
    f"{seconds:.1f}",
    f"{guess['without_overlap'] / seconds - 1:+.1%}",
  ]
  return f"| {' | '.join(cells)} |"


def _estimated_line(row: Row) -> str:
  days = row["tokens"] / row["tokens_per_day"]
  cells = [
    row["stage"],
    f"{row['tokens'] / 1e9:,.0f}",
    row["topology"],
    _mesh(row),
    f"{row['remat']}, {row['num_microbatches']}",
    f"{row['memory']['total'] / _GIB:.0f}",
    f"{row['mfu']:.0%}",
    f"{days:.1f}",
    f"{days * row['num_devices']:,.0f}",
  ]
  return f"| {' | '.join(cells)} |"


def _chain_line(found: Row, topology: str) -> str:
  days = {
    row["stage"]: row["tokens"] / row["tokens_per_day"]
    for row in found["estimated"]
    if row["topology"] == topology
  }
  devices = Pod.of(topology).num_devices
  parts = [days[stage] for stage in CHAIN]
  cells = [topology, *(f"{one:.1f}" for one in parts), f"{sum(parts):.1f}"]
  cells.append(f"{sum(parts) * devices:,.0f}")
  cells.append(f"{sum(parts) * devices * 24:,.0f}")
  return f"| {' | '.join(cells)} |"


def _growth_line(row: Row) -> str:
  sizes = [row[name] / _GIB for name in ("held", "filling", "placing", "hbm")]
  cells = [row["topology"], _mesh(row), *(f"{size:.1f}" for size in sizes)]
  return f"| {' | '.join(cells)} |"


def _export_line(dtype: str, row: Row) -> str:
  cells = [
    dtype,
    f"{row['num_tensors']:,} in {row['num_shards']}",
    f"{row['num_bytes'] / _GIB:.1f}",
    f"{row['largest_shard'] / _GIB:.2f}",
    f"{row['seconds'] / 60:.0f}",
  ]
  return f"| {' | '.join(cells)} |"


def _table(head: str, lines: list[str]) -> str:
  columns = head.count("|") - 1
  return "\n".join([head, "|" + "---|" * columns, *lines])


def page(found: Row) -> str:
  """The page of the results."""
  text = (ROOT / "benchmarks" / "cost_of_aquila.txt").read_text("utf-8")
  compiled = found["compiled"]
  large = [row for row in compiled if row["stage"] == "aquila_8x16b"]
  tables = dict(
    compiled=_table(
      "| topology | chips | mesh | parts | GiB a chip | s a step"
      " | MFU | billion tokens a day | days | chip-days | chip-hours |",
      [_compiled_line(row) for row in large],
    ),
    parts=_table(
      "| | FLOPs at the published rate | Pallas kernels | XLA"
      " | the rest, by bytes | links |",
      [_parts_line(row) for row in large],
    ),
    check=_table(
      "| | GiB, `plan memory` | compiled | | s a step, `plan search`"
      " | compiled | |",
      [_check_line(row) for row in compiled],
    ),
    estimated=_table(
      "| stage | billion tokens | topology | mesh | remat, parts | GiB | MFU"
      " | days | chip-days |",
      [_estimated_line(row) for row in found["estimated"]],
    ),
    growth=_table(
      "| topology | mesh | the grown model | filling it | making the state"
      " | of HBM |",
      [_growth_line(row) for row in found["growth"]],
    ),
    export=_table(
      "| dtype | tensors in files | GiB written | GiB in memory | minutes |",
      [_export_line(*one) for one in found["export"]["dtypes"].items()],
    ),
    chain=_table(
      "| topology | 7B | 16B | 8x16B | days | chip-days | chip-hours |",
      [_chain_line(found, topology) for topology in PODS],
    ),
  )
  growth = found["growth"][0]
  facts = dict(
    source=f"{growth['source_bytes'] / _GIB:.0f}",
    target=f"{growth['target_bytes'] / _GIB:,.0f}",
    streamed=f"{growth['streamed_seconds'] / 60:.0f}",
    read=f"{found['export']['read'] / _GIB:.0f}",
  )
  for name, table in (tables | facts).items():
    text = text.replace(f"{{{name}}}", table)
  return text


def main(argv: list[str]) -> None:
  """Writes results and page."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  found = results()
  RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
  PAGE.write_text(page(found), encoding="utf-8")
  print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
  app.run(main)
