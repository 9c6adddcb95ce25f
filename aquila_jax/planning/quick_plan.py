"""A training step on a pod by arithmetic alone: memory and a roofline."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from aquila_jax.planning.pods import Pod
from aquila_jax.planning.step_memory import State, Step, Temporaries
from aquila_jax.planning.step_plan import SECONDS_PER_DAY, Memory
from aquila_jax.planning.step_time import StepTime, step_time

_GIB = 2.0**30
# Of a table's rows, in turn: the field of Temporaries and what it says.
_TEMPORARIES = {
  "copies": "parameters in the compute dtype",
  "saved": "of all layers, for the backward",
  "sums": "sums over microbatches",
  "loss": "LM head and logits",
  "gradients": "gradients",
  "layer": "one layer, backward",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuickPlan:
  """Estimates of a step."""

  stage: str
  pod: Pod
  step: Step
  state: State
  temporaries: Temporaries
  time: StepTime

  @classmethod
  def of(cls, stage: str, step: Step, pod: Pod) -> QuickPlan:
    """The plan of a step.

    Raises:
      errors.UserError: where a mesh axis does not divide a size of the model.
    """
    return cls(
      stage=stage,
      pod=pod,
      step=step,
      state=step.state(),
      temporaries=step.temporaries(),
      time=step_time(step, pod),
    )

  @property
  def memory(self) -> Memory:
    """As `plan compile` has it."""
    return Memory(
      parameters=self.state.parameters,
      optimizer=self.state.optimizer,
      batch=self.state.batch,
      temporaries=self.temporaries.total,
      hbm=self.pod.hbm,
    )

  @property
  def share_of_hbm(self) -> float:
    """Of a device; the estimate is good to a tenth."""
    assert self.memory.total is not None
    return self.memory.total / self.pod.hbm

  @property
  def tokens_per_day(self) -> float:
    """On all devices, without overlap."""
    tokens = self.step.train.tokens_per_step
    return tokens / self.time.without_overlap * SECONDS_PER_DAY

  @property
  def rows(self) -> int:
    """Of a device at once, at least one."""
    return max(1, self.step.tokens // self.step.train.sequence_length)

  def to_json(self) -> dict[str, Any]:
    """Plain JSON: bytes, seconds, tokens."""
    memory, time = self.memory, self.time
    return dict(
      stage=self.stage,
      topology=self.pod.topology,
      device_kind=self.pod.device_kind,
      num_devices=self.pod.num_devices,
      mesh=dict(self.step.mesh.shape),
      remat=self.step.model.remat,
      num_microbatches=self.step.train.num_microbatches,
      tokens_per_step=self.step.train.tokens_per_step,
      fits=memory.fits,
      memory=dataclasses.asdict(memory) | dict(total=memory.total),
      temporaries=dataclasses.asdict(self.temporaries),
      seconds=dict(
        without_overlap=time.without_overlap,
        with_full_overlap=time.with_full_overlap,
        compute=time.compute,
        memory=time.memory,
        links=time.links,
        flops_at_published_rate=time.flops,
      ),
      mfu=time.mfu,
      tokens_per_day=self.tokens_per_day,
    )


def memory_table(plan: QuickPlan) -> str:
  """For a terminal."""
  memory, step = plan.memory, plan.step
  shape = ", ".join(f"{axis} {size}" for axis, size in step.mesh.shape.items())
  kinds = dataclasses.asdict(plan.temporaries)
  is_loss = kinds["loss"] >= kinds["gradients"] + kinds["layer"]
  idle = ("gradients", "layer") if is_loss else ("loss",)
  lines = [
    f"{plan.stage} on {plan.pod.topology}: {plan.pod.num_devices} of"
    f" {plan.pod.device_kind}, mesh {shape}",
    f"remat {step.model.remat}, {step.train.num_microbatches} microbatches,"
    f" {step.tokens:,} tokens a device at once",
    "",
    "bytes a device, estimated",
    _line("parameters", memory.parameters),
    _line("optimizer", memory.optimizer),
    _line("batch", memory.batch),
    _line("temporaries", memory.temporaries),
    *(
      _line(f"  {name}", kinds[kind])
      + ("  at another time" if kind in idle else "")
      for kind, name in _TEMPORARIES.items()
    ),
    _line("together", memory.total),
    _line("of HBM", memory.hbm),
    f"  {'fits':<34}{'yes' if memory.fits else 'NO':>14}",
  ]
  return "\n".join(lines)


def _line(name: str, size: int | float | None) -> str:
  assert size is not None
  return f"  {name:<34}{size / _GIB:>10.2f} GiB"


def search_table(plans: Sequence[QuickPlan], commands: Sequence[str]) -> str:
  """The plans in their order, and a command of each."""
  axes = list(plans[0].step.mesh.shape) if plans else []
  head = "".join(f"{axis:>9}" for axis in axes)
  lines = [
    f"{'':>3}{head}{'remat':>7}{'parts':>6}{'rows':>5}{'GiB':>7}{'of HBM':>8}"
    f"{'s/step':>8}{'compute':>8}{'memory':>7}{'links':>7}{'overlap':>8}"
    f"{'MFU':>7}{'B/day':>7}"
  ]
  for number, plan in enumerate(plans, 1):
    time, memory = plan.time, plan.memory
    assert memory.total is not None
    sizes = "".join(f"{plan.step.mesh.shape[axis]:>9}" for axis in axes)
    lines.append(
      f"{number:>3}{sizes}{plan.step.model.remat:>7}"
      f"{plan.step.train.num_microbatches:>6}{plan.rows:>5}"
      f"{memory.total / _GIB:>7.1f}{plan.share_of_hbm:>8.0%}"
      f"{time.without_overlap:>8.2f}{time.compute:>8.2f}{time.memory:>7.2f}"
      f"{time.links:>7.2f}{time.with_full_overlap:>8.2f}{time.mfu:>7.1%}"
      f"{plan.tokens_per_day / 1e9:>7.1f}"
    )
  lines.append("")
  lines += [f"{number:>3} {one}" for number, one in enumerate(commands, 1)]
  return "\n".join(lines)


def dumps(value: Any) -> str:
  """As a JSON file has it."""
  return json.dumps(value, indent=2) + "\n"
