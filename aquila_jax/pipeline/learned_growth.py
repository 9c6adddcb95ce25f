"""LiGO: learns the operator of growth/ligo.py on the target's own data.

  operator  one step: params = operator(source), loss of the target on a batch,
            gradient in the operator's entries, an update of those
  target    the learned operator, applied to the source once more

The source's parameters stand still (Wang et al., arXiv 2303.00980, section 3).
The operator is trained as a stage is, with the stage's own loss terms, by AdamW
that decays nothing: warm-up for a tenth of the steps, cosine, clipping at 1.

The data are those of the target's training, from where that would begin. It
begins after them instead, so no batch is seen twice: `Learned.recorded` puts
the position into the lineage, where the training of a stage looks for its own.
Steps, tokens and FLOPs go there as well, as training, which they are.

The defaults of LigoConfig were chosen on the quickstart's dense model (64 to
128 wide, 4 to 6 layers; validation loss 5.221, grown by FPI 5.446), one run
each:

  100 steps, learning rate 0.03, 0.1, 0.3   5.193, 5.190, 5.211
  200 and 300 steps at 0.1                  5.170, 5.161
  100 steps at 0.1 without noise            5.191
  FPI, and training of as many FLOPs        5.254

What counts comes later: after 300 more steps of training it is at 5.063
(without noise 5.069), FPI and training of as many FLOPs at 5.055. There it
saved nothing.

Nothing is written before the end. A signal ends the process as it would any,
and the next start learns anew: from the same seed, on the same batches, to the
same numbers.

Adam's moments of the source belong to no parameter of the target, whose
training starts them afresh (`optimizer='reset'`).
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aquila_jax.core import dtypes, errors, processes
from aquila_jax.core.axes import LeafAxes
from aquila_jax.core.experiment_config import (
  LigoConfig,
  OptimizerConfig,
  TrainConfig,
)
from aquila_jax.core.lineage import Event
from aquila_jax.core.model_config import ModelConfig
from aquila_jax.core.model_dir import StoredModel
from aquila_jax.core.types import Batch, Params, TrainState
from aquila_jax.data.loader import DataState
from aquila_jax.growth import axis_map, ligo
from aquila_jax.growth.axis_map import AxisMap, AxisMaps
from aquila_jax.growth.ligo import Operator
from aquila_jax.growth.scale_up import model_sizes
from aquila_jax.models import decoder_lm
from aquila_jax.planning import counting
from aquila_jax.sharding.mesh import on_mesh
from aquila_jax.sharding.rules import param_shardings
from aquila_jax.training import inputs, losses
from aquila_jax.training import state as state_lib
from aquila_jax.training.compilation import compile_step
from aquila_jax.training.optimizers import learning_rate, make_optimizer
from aquila_jax.training.progress import Reporter
from aquila_jax.training.step import abstract_batch

# The share of the steps in which the learning rate rises.
_WARMUP = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrowthJob:
  """All that the learning of a growth needs."""

  name: str  # of the stage
  source: StoredModel
  target: ModelConfig
  # The index maps that the operator starts from, as FPI's; `make_growth`'s.
  width: AxisMaps
  layers: AxisMap
  config: LigoConfig
  train: TrainConfig  # of the stage
  mesh: Mesh
  # Of `operator_training`, to batches of its size, each with the position in
  # the data after it.
  batches: Callable[[TrainConfig], Iterator[tuple[Batch, DataState]]]
  seed: int = 0  # of the noise
  path: str = "config.init.ligo"  # dotted name of `config`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learned:
  """A target, and what it took to learn how to grow it."""

  params: Params  # in the target's dtypes
  ema: Params | None  # the source's average, by the same operator
  operator: Operator
  # Cross-entropy of every step's batch before its update, nats a token. Empty
  # where nothing grew.
  losses: tuple[float, ...]
  tokens: int
  flops: float
  # After the last batch; None where none was read.
  data_state: DataState | None

  @property
  def steps(self) -> int:
    return len(self.losses)

  def recorded(
    self, event: Event, *, data_identity: Mapping[str, Any]
  ) -> Event:
    """The growth's event with what the learning took.

    Args:
      event: of the growth, without training.
      data_identity: digest and seed of the data, which `Event.data_state` has
        beside the position.

    Returns:
      The event. Its `data_state` is where the target's training goes on.
    """
    if self.data_state is None:
      return event
    ends = {"first_loss": self.losses[0], "last_loss": self.losses[-1]}
    return dataclasses.replace(
      event,
      options=event.options | {"learned": ends},
      steps=self.steps,
      tokens=self.tokens,
      flops=self.flops,
      data_state=self.data_state.to_json() | dict(data_identity),
    )


def operator_training(config: LigoConfig, train: TrainConfig) -> TrainConfig:
  """The learning as a training: sizes, loss and optimizer.

  Args:
    config: of the learning.
    train: of the stage; the loss is its own, and so are sizes that `config`
      leaves open.

  Returns:
    The config; what it says of checkpoints, freezing and validation is unused.
  """
  held_at_once = train.batch_size // train.num_microbatches
  return dataclasses.replace(
    train,
    steps=config.steps,
    match_flops="",
    batch_size=config.batch_size or held_at_once,
    sequence_length=config.sequence_length or train.sequence_length,
    num_microbatches=1,
    optimizer=OptimizerConfig(
      learning_rate=config.learning_rate,
      schedule="cosine",
      warmup_steps=round(_WARMUP * config.steps),
    ),
  )


def planned_flops(
  source: ModelConfig, target: ModelConfig, train: TrainConfig
) -> float:
  """What `learn_growth` will take, for a budget.

  A step is one of the target's training, and the operator's products, forward
  and backward: they are 2 * (elements of a leaf) * (the grown size) each, so
  much beside few tokens. At the end the operator is applied once more.

  Args:
    source: the architecture to grow from.
    target: the architecture to grow into.
    train: of `operator_training`.

  Returns:
    FLOPs of the whole learning; 0 where nothing grows.
  """
  old, new = model_sizes(source), model_sizes(target)
  # An axis that one of them lacks is refused before anything is learned.
  both = [name for name in old if name in new]
  maps = {name: axis_map.circular(old[name], new[name]) for name in both}
  maps.pop("layer")
  layers = _any_layers(source, target)
  axes = decoder_lm.parameter_axes(source)
  operator = jax.eval_shape(lambda: ligo.init_operator(maps, layers, axes))
  if operator.is_empty:
    return 0.0
  shapes = decoder_lm.abstract_params(source)
  products = ligo.operator_flops(operator, shapes, axes)
  a_token = counting.train_flops_per_token(target, train.sequence_length)
  a_step = (
    train.tokens_per_step * a_token + products.forward + products.backward
  )
  return train.steps * a_step + products.forward


def _any_layers(source: ModelConfig, target: ModelConfig) -> AxisMap:
  """A map of depth between layers of the same kind: all cost the same."""
  copied = []
  for layer in range(target.num_layers):
    kind = layer in target.moe_layers
    alike = [
      i for i in range(source.num_layers) if (i in source.moe_layers) == kind
    ]
    copied.append(alike[layer % len(alike)] if alike else 0)
  return AxisMap(source=np.asarray(copied), source_size=source.num_layers)


def learn_growth(job: GrowthJob) -> Learned:
  """Learns an operator from a source to a target, and grows the source by it.

  Args:
    job: see its fields.

  Returns:
    The grown parameters and what it took. The same job gives the same result.

  Raises:
    errors.UserError: on a batch that does not fit the devices.
    errors.TrainingStopped: on a loss, gradient or operator that is not finite.
  """
  operator = ligo.init_operator(
    job.width,
    job.layers,
    decoder_lm.parameter_axes(job.source.config),
    dtype=dtypes.at_least_float32(jnp.dtype(job.target.param_dtype)),
  )
  source, ema = _place(job, job.source.params), _place(job, job.source.ema)
  train = operator_training(job.config, job.train)
  step_losses, data_state = (), None
  if not operator.is_empty:
    operator = ligo.split_copies(
      operator, job.width, scale=job.config.noise, key=jax.random.key(job.seed)
    )
    operator, step_losses, data_state = _learn(
      job, operator, source=source, train=train
    )
  grow = jax.jit(_make_grow(job))
  return Learned(
    params=decoder_lm.as_declared(grow(operator, source), job.target),
    ema=None if ema is None else grow(operator, ema),
    operator=operator,
    losses=step_losses,
    tokens=len(step_losses) * train.tokens_per_step,
    flops=planned_flops(job.source.config, job.target, train),
    data_state=data_state,
  )


def _place(job: GrowthJob, params: Params | None) -> Params | None:
  """The source's parameters, or its average, laid out on the mesh."""
  if params is None:
    return None
  axes = decoder_lm.parameter_axes(job.source.config)
  return processes.place(params, param_shardings(axes, params, job.mesh))


Grow = Callable[[Operator, Params], Params]


def _make_grow(job: GrowthJob) -> Grow:
  """The operator's product, laid out on the mesh as the target will be."""
  axes = decoder_lm.parameter_axes(job.source.config)
  shardings = param_shardings(
    decoder_lm.parameter_axes(job.target),
    decoder_lm.abstract_params(job.target),
    job.mesh,
  )

  def grow(operator, params):
    grown = ligo.apply_operator(operator, params, axes)
    return jax.lax.with_sharding_constraint(grown, shardings)

  return grow


def _learn(
  job: GrowthJob, operator: Operator, *, source: Params, train: TrainConfig
) -> tuple[Operator, tuple[float, ...], DataState]:
  """The learned operator, the losses on its way, and where the data ended."""
  like = abstract_batch(train, mesh=job.mesh)
  inputs.check_batch_divides(train, like=like, path=job.path)
  # Nothing decays, as no leaf is declared a matrix: an operator that is drawn
  # to zero grows nothing.
  undeclared = jax.tree.map(lambda _: LeafAxes(()), operator)
  optimizer = make_optimizer(train.optimizer, undeclared)
  everywhere = NamedSharding(job.mesh, PartitionSpec())
  state = state_lib.create_state(operator, optimizer=optimizer)
  state = processes.place(state, jax.tree.map(lambda _: everywhere, state))
  jitted = jax.jit(
    on_mesh(_make_step(job, train=train, optimizer=optimizer), job.mesh),
    donate_argnums=0,
    # Else the compiler spreads matrices as it spreads what they multiply, and
    # the next step refuses them.
    out_shardings=everywhere,
  )
  step = compile_step(jitted, state, source, like)

  step_losses: list[float] = []
  waiting = []  # what the steps since the last look said of themselves
  batches = job.batches(train)
  data_state = None
  looked = time.perf_counter()
  with Reporter(
    f"{job.name}: LiGO",
    total_steps=train.steps,
    is_silent=not processes.is_first(),
  ) as reporter:
    for number in range(1, train.steps + 1):
      batch, data_state = next(batches)
      batch = inputs.place(batch, like=like)
      with jax.transfer_guard("disallow"):
        state, said = step(state, source, batch)
      waiting.append(said)
      reporter.advance(number)
      if number % train.log_every and number < train.steps:
        continue
      fetched = jax.device_get(waiting)
      _stop_unless_finite(job, fetched, first=len(step_losses) + 1)
      step_losses += [float(loss) for loss, _ in fetched]
      tokens = len(waiting) * train.tokens_per_step
      seconds, waiting = time.perf_counter() - looked, []
      looked += seconds
      reporter.show(
        {
          "step": number,
          "loss": step_losses[-1],
          "tokens_per_s": tokens / seconds,
        }
      )
  assert data_state is not None
  return state.params, tuple(step_losses), data_state


def _make_step(
  job: GrowthJob, *, train: TrainConfig, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[TrainState, tuple[jax.Array, jax.Array]]]:
  """The pure step, of a state whose parameters are the operator's entries."""
  decoder = decoder_lm.DecoderLM(job.target)
  grow = _make_grow(job)
  schedule = learning_rate(train.optimizer, train.steps)

  def step(state, source, batch):
    def loss_fn(operator):
      out: Any = decoder.apply(
        {"params": decoder_lm.as_declared(grow(operator, source), job.target)},
        batch.tokens,
        positions=batch.positions,
        segments=batch.segments,
        targets=batch.targets,
      )
      terms = losses.loss_terms(
        out.scores,
        out.routing,
        batch=batch,
        totals=losses.batch_totals(batch),
        config=train.loss,
        num_languages=1,  # the sums by language are not used
      )
      return terms.total, (terms.total, terms.cross_entropy)

    grads, (total, loss) = jax.grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    rate = schedule(state.step)
    # Over the number of source indices that a row mixes (the fan-in): Adam
    # moves every entry as far, and what a row makes of inputs that agree moves
    # by their sum.
    operator = jax.tree.map(
      lambda m, u: m - (rate / m.shape[1]).astype(m.dtype) * u,
      state.params,
      updates,
    )
    finite = [
      jnp.isfinite(x)
      for x in (total, optax.tree.norm(grads), optax.tree.norm(operator))
    ]
    state = TrainState(
      step=state.step + 1, params=operator, opt_state=opt_state
    )
    return state, (loss, functools.reduce(jnp.logical_and, finite))

  return step


def _stop_unless_finite(
  job: GrowthJob, fetched: list[tuple[np.ndarray, np.ndarray]], *, first: int
) -> None:
  bad = [first + i for i, (_, finite) in enumerate(fetched) if not finite]
  if bad:
    raise errors.TrainingStopped(
      f"{job.name}: LiGO: loss, gradients or operator are not finite at step"
      f" {bad[0]}; nothing was written; a smaller"
      f" {job.path}.learning_rate={job.config.learning_rate} may help"
    )
