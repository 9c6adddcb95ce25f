"""The training state: made, described without memory, and placed on a mesh."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float

from aquila_jax.core import dtypes, processes
from aquila_jax.core.moments import AdamMoments, get_moments, set_moments
from aquila_jax.core.types import Params, TrainState
from aquila_jax.sharding.rules import laid_out, param_shardings


def widen(tree: Params) -> Params:
  """Every leaf in at least float32: what optimizer and EMA compute in."""
  return jax.tree.map(
    lambda leaf: leaf.astype(dtypes.at_least_float32(leaf.dtype)), tree
  )


def create_state(
  params: Params,
  *,
  optimizer: optax.GradientTransformation,
  keep_ema: bool = False,
  moments: AdamMoments | None = None,
  ema: Params | None = None,
  balance_weights: Float[np.ndarray, "L"] | None = None,
  recent: Float[np.ndarray, "2 W"] | None = None,
) -> TrainState:
  """The state at step 0 of a stage.

  Args:
    params: initialised, loaded or grown.
    optimizer: of `make_optimizer`.
    keep_ema: whether the stage averages its parameters; starts at `ema`, or at
      the parameters where there is none.
    moments: Adam's moments to go on from; None starts them at zero.
    ema: the average to go on from.
    balance_weights: of `balance.initial_weights`.
    recent: of `spikes.no_steps`.

  Returns:
    A TrainState. Its moments are at least float32 whatever the parameters are.
  """
  opt_state = optimizer.init(widen(params))
  if moments is not None:
    opt_state = set_moments(opt_state, moments)
  if not keep_ema:
    ema = None
  elif ema is None:
    # Copied, because a donated buffer must stand in one place only.
    ema = jax.tree.map(jnp.copy, widen(params))
  weights = None if balance_weights is None else jnp.asarray(balance_weights)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=opt_state,
    ema=ema,
    balance_weights=weights,
    recent=None if recent is None else jnp.asarray(recent),
  )


def abstract_state(
  params: Params,
  *,
  optimizer: optax.GradientTransformation,
  axes: Any,
  mesh: Mesh | AbstractMesh,
  keep_ema: bool = False,
  balance_weights: Float[np.ndarray, "L"] | None = None,
  recent: Float[np.ndarray, "2 W"] | None = None,
) -> TrainState:
  """Shapes, dtypes and shardings of the state, without allocating any.

  Args:
    params: the parameters' shapes.
    optimizer: of `make_optimizer`.
    axes: the `LeafAxes` of every parameter.
    mesh: of the devices.
    keep_ema: whether the stage averages its parameters.
    balance_weights: of `balance.initial_weights`.
    recent: of `spikes.no_steps`.

  Returns:
    A TrainState of ShapeDtypeStruct. Moments and EMA lie where their parameters
    lie; all else is replicated.
  """
  shapes = jax.eval_shape(
    lambda p: create_state(
      p,
      optimizer=optimizer,
      keep_ema=keep_ema,
      balance_weights=balance_weights,
      recent=recent,
    ),
    params,
  )
  shardings = state_shardings(shapes, axes=axes, mesh=mesh)
  return laid_out(shapes, shardings)


def state_shardings(
  state: TrainState, *, axes: Any, mesh: Mesh | AbstractMesh
) -> TrainState:
  """A TrainState of NamedSharding, from the axes of the parameters."""
  everywhere: Any = NamedSharding(mesh, PartitionSpec())
  by_param = param_shardings(axes, state.params, mesh)
  opt_state = jax.tree.map(lambda _: everywhere, state.opt_state)
  get_moments(opt_state)  # there is exactly one set of them
  return TrainState(
    step=everywhere,
    params=by_param,
    opt_state=set_moments(
      opt_state, AdamMoments(count=everywhere, mu=by_param, nu=by_param)
    ),
    ema=None if state.ema is None else by_param,
    balance_weights=None if state.balance_weights is None else everywhere,
    recent=None if state.recent is None else everywhere,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitialModel:
  """Where a stage starts: initialised, loaded or grown."""

  params: Params
  moments: AdamMoments | None = None  # None: Adam starts afresh
  ema: Params | None = None  # None: the average starts at the parameters


def place_initial(
  initial: InitialModel,
  *,
  optimizer: optax.GradientTransformation,
  like: TrainState,
  balance_weights: Float[np.ndarray, "L"] | None = None,
  recent: Float[np.ndarray, "2 W"] | None = None,
) -> TrainState:
  """The state at step 0, laid out on the mesh.

  The arrays of `initial` are copied, so the donated step leaves them alone, and
  fresh moments are made where they belong, never whole on one device.

  Args:
    initial: its leaves may lie anywhere.
    optimizer: of `make_optimizer`.
    like: of `abstract_state`.
    balance_weights: of `balance.initial_weights`.
    recent: of `spikes.no_steps`.

  Returns:
    The state.
  """
  shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
  by_param = shardings.params
  params, ema = processes.place(
    (initial.params, initial.ema),
    (by_param, None if initial.ema is None else by_param),
  )
  moments = initial.moments
  if moments is not None:
    moments = processes.place(moments, get_moments(shardings.opt_state))

  make = make_placement(
    optimizer, like=like, balance_weights=balance_weights, recent=recent
  )
  return make(params, moments, ema)


def make_placement(
  optimizer: optax.GradientTransformation,
  *,
  like: TrainState,
  balance_weights: Float[np.ndarray, "L"] | None = None,
  recent: Float[np.ndarray, "2 W"] | None = None,
) -> Any:
  """Jitted (parameters, moments, EMA) -> the state that `place_initial` makes.

  Args:
    optimizer: of `make_optimizer`.
    like: of `abstract_state`.
    balance_weights: of `balance.initial_weights`.
    recent: of `spikes.no_steps`.

  Returns:
    A `jax.jit` function; what it is given stays.
  """

  def create(params, moments, ema):
    return create_state(
      params,
      optimizer=optimizer,
      keep_ema=like.ema is not None,
      moments=moments,
      ema=ema,
      balance_weights=balance_weights,
      recent=recent,
    )

  shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
  return jax.jit(create, out_shardings=shardings)
