"""Scale-Out: a mixture of experts from a dense model.

  sparse_upcycling   every expert is an exact copy of the dense FFN, the router
                     is drawn from N(0, router_init_std^2) (Komatsuzaki et al.,
                     arXiv 2212.05055; AquilaMoE, section 2.3).

Keeps the function where a token's gates sum to one and none is dropped: then
sum_e gate_e FFN(x) = FFN(x). With `softmax_then_topk` and no `renormalise` the
gates sum to less, and the model starts worse.

An FFN's leaf gains the declared axis `expert`; a leaf that *writes* `expert` is
the router's and is new. No path is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from aquila_jax.core import config as config_lib
from aquila_jax.core import dtypes, errors
from aquila_jax.core.axes import LeafAxes, Role, path_name
from aquila_jax.core.experiment_config import ScaleOut
from aquila_jax.core.lineage import Event
from aquila_jax.core.model_config import ModelConfig, MoeConfig
from aquila_jax.core.model_dir import StoredModel
from aquila_jax.core.moments import AdamMoments
from aquila_jax.core.types import Params
from aquila_jax.growth.scale_up import refuse_masked
from aquila_jax.models import decoder_lm

# What an upcycled model may set anew; all else is the source's.
_FREE = (
  "moe",
  "context_length",
  "init_std",
  "remat",
  "param_dtype",
  "compute_dtype",
)


def scale_out(
  source: StoredModel,
  target: ModelConfig,
  options: ScaleOut,
  *,
  seed: int = 0,
  name: str = "",
  path: str = "config.model",
) -> StoredModel:
  """Turns every FFN of a dense model into experts.

  What is preserved stands at the top of this module.

  Args:
    source: a dense model; it is not changed.
    target: its architecture with `moe`.
    options: whether moments are grown or left out (`optimizer`).
    seed: of the router.
    name: of the stage, for the lineage.
    path: the dotted name of `target`, for messages.

  Returns:
    The mixture, in the target's parameter dtype; its lineage has one more
    event.

  Raises:
    errors.UserError: where the source is no dense model of the target's sizes.
  """
  moe = check_pair(source.config, target, path=path)
  header = grown_header(
    source, target, options, seed=seed, name=name, path=path
  )
  draw_router = router_init(moe, seed=seed)

  @jax.jit
  def upcycle(params, moments, ema):
    if moments is not None:
      moments = _moments(moments, target, moe)
    if ema is not None:
      # The average of a router that has not moved is the router.
      ema = copy_experts(
        ema, target, router=lambda shape: _widened(draw_router(shape))
      )
    params = copy_experts(params, target, router=draw_router)
    return decoder_lm.as_declared(params, target), moments, ema

  keep_moments = options.optimizer == "grow"
  params, moments, ema = upcycle(
    source.params, source.moments if keep_moments else None, source.ema
  )
  return dataclasses.replace(header, params=params, moments=moments, ema=ema)


def grown_header(
  source: StoredModel,
  target: ModelConfig,
  options: ScaleOut,
  *,
  seed: int,
  name: str,
  path: str,
) -> StoredModel:
  """What `scale_out` makes but for its arrays: shapes of parameters.

  Args and errors are those of `scale_out`. It warns where the mixture will not
  compute what the dense model did.
  """
  moe = check_pair(source.config, target, path=path)
  if not moe.gates_sum_to_one:
    logging.warning(
      "the gates of router_order=%r without renormalise sum to less than one:"
      " the upcycled model does not compute what the dense one did",
      moe.router_order,
    )
  event = Event(
    kind="scale_out",
    name=name,
    parent=options.source,
    options=config_lib.to_dict(options)
    | {"seed": seed, "moe": config_lib.to_dict(moe)},
  )
  return dataclasses.replace(
    source,
    config=target,
    lineage=source.lineage.then(event),
    params=decoder_lm.abstract_params(target),
    moments=None,
    ema=None,
  )


def router_init(
  moe: MoeConfig, *, seed: int
) -> Callable[[jax.ShapeDtypeStruct], jax.Array]:
  """Draws a router's leaf from N(0, router_init_std^2)."""
  key = jax.random.key(seed)

  def draw(shape: jax.ShapeDtypeStruct) -> jax.Array:
    drawn = jax.random.normal(key, shape.shape, jnp.float32)
    return (moe.router_init_std * drawn).astype(shape.dtype)

  return draw


def check_pair(
  source: ModelConfig, target: ModelConfig, *, path: str
) -> MoeConfig:
  """The experts of the target, where it is the source with experts.

  Raises:
    errors.UserError: naming the field, its value and what was expected.
  """
  refuse_masked(source)
  if source.moe is not None:
    raise errors.UserError(
      f"the source has {source.moe.num_experts} experts; Scale-Out starts from"
      " a dense model"
    )
  if target.moe is None:
    raise errors.UserError(f"{path}.moe=None: expected the experts to make")
  shared = target.moe.shared_expert_dim
  if shared:
    raise errors.UserError(
      f"{path}.moe.shared_expert_dim={shared}: expected 0;"
      " sparse upcycling makes routed experts only"
    )
  for field in dataclasses.fields(ModelConfig):
    given, needed = getattr(target, field.name), getattr(source, field.name)
    if field.name not in _FREE and given != needed:
      raise errors.UserError(
        f"{path}.{field.name}={given!r}: expected the source's {needed!r};"
        " Scale-Out copies FFNs as they are, Scale-Up changes sizes"
      )
  return target.moe


def copy_experts(
  tree: Params,
  target: ModelConfig,
  *,
  router: Callable[[jax.ShapeDtypeStruct], jax.Array],
  divisor: int = 1,
) -> Params:
  """Fills a mixture's leaves from a dense model's.

  Args:
    tree: shaped as the parameters of the dense model.
    target: the mixture's architecture.
    router: makes a leaf that writes `expert`, from its shape.
    divisor: what the copies of an FFN are divided by.

  Returns:
    A tree shaped as the mixture's parameters; copied leaves keep their dtype.
  """
  source = {path_name(path): leaf for path, leaf in _leaves(tree)}

  def fill(path: Any, shape: Any, axes: LeafAxes) -> jax.Array:
    if axes.is_selection_bias:  # nothing has been chosen yet
      return jnp.zeros(shape.shape, shape.dtype)
    if axes.has("expert", Role.WRITES):
      return router(shape)
    leaf = source.pop(path_name(path))
    dim = axes.index("expert")
    if dim is not None:
      one = jnp.expand_dims(leaf, dim) / jnp.asarray(divisor, leaf.dtype)
      leaf = jnp.broadcast_to(one, shape.shape)
    assert leaf.shape == shape.shape, (path_name(path), leaf.shape)
    return leaf

  filled = jax.tree_util.tree_map_with_path(
    fill, decoder_lm.abstract_params(target), decoder_lm.parameter_axes(target)
  )
  assert not source, f"leaves of the source are left: {', '.join(source)}"
  return filled


def _moments(
  moments: AdamMoments, target: ModelConfig, moe: MoeConfig
) -> AdamMoments:
  """The moments of E copies of which a token meets A with gates near 1 / A.

  With d_t the dense gradient of token t, an expert's gradient is the sum of
  d_t / A over the share A / E of the tokens that it gets. Its mean is the dense
  one divided by E; the copies' gradients sum to the dense gradient. Its square,
  where the tokens' d_t are mostly noise, is sum d_t^2 / A^2 * A / E:

    mu' = mu / E        nu' = nu / (A E)

  (Were there no noise, nu' would be nu / E^2, E / A times less.) Measured on
  a longer quickstart, E = 8 and A = 2: 0.057 to 0.058 of the dense mean square,
  where 1 / (A E) is 0.0625 and 1 / E^2 0.0156 (benchmarks/upcycled_moments.py).
  The router has no past: zeros.
  """
  divisors = moment_divisors(moe)
  return AdamMoments(
    count=moments.count,
    mu=copy_experts(
      moments.mu, target, router=_no_past, divisor=divisors["mu"]
    ),
    nu=copy_experts(
      moments.nu, target, router=_no_past, divisor=divisors["nu"]
    ),
  )


def moment_divisors(moe: MoeConfig) -> dict[str, int]:
  """What an expert's copy of each moment is divided by; see `_moments`."""
  return {"mu": moe.num_experts, "nu": moe.num_experts * moe.top_k}


def _widened(leaf: jax.Array) -> jax.Array:
  return leaf.astype(dtypes.at_least_float32(leaf.dtype))


def _no_past(shape: jax.ShapeDtypeStruct) -> jax.Array:
  return jnp.zeros(shape.shape, dtypes.at_least_float32(shape.dtype))


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
  return jax.tree_util.tree_flatten_with_path(tree)[0]
