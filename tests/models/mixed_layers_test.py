"""Decoders with experts in some layers, against a loop over the layers."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.core import axes
from aquila_jax.core.model_config import GrowthMask, ModelConfig, MoeConfig
from aquila_jax.core.types import RoutingStats
from aquila_jax.layers import rotary
from aquila_jax.models import decoder_lm, layer_runs
from aquila_jax.models.decoder_lm import DecoderLM
from aquila_jax.models.growth_mask import make_masks, weigh_losses
from aquila_jax.models.mixed_layers import stack_captured

EVERY_SECOND = ModelConfig(
  vocab_size=11,
  num_layers=4,
  embed_dim=8,
  mlp_dim=6,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  rope_theta=100.0,
  compute_dtype="float32",
  moe=MoeConfig(num_experts=3, top_k=2, block_size=4, layers="every_second"),
)


def _with_layers(layers: Any, **fields: Any) -> ModelConfig:
  assert EVERY_SECOND.moe is not None
  moe = dataclasses.replace(EVERY_SECOND.moe, layers=layers)
  return dataclasses.replace(EVERY_SECOND, moe=moe, **fields)


# Cut into (dense, experts) twice and (experts) twice.
LIST = _with_layers((1, 3, 4, 5), num_layers=6)
WIDE = dataclasses.replace(LIST, param_dtype="float64", compute_dtype="float64")
assert WIDE.moe is not None
# FFNs of 9 hidden units beside experts of 6.
UNEVEN = dataclasses.replace(
  WIDE, moe=dataclasses.replace(WIDE.moe, dense_mlp_dim=9)
)
# Two documents would need a mask of their own in the loop: one, and padding.
TOKENS = np.array([[3, 1, 4, 1, 5, 0, 0], [9, 2, 6, 5, 3, 5, 8]], np.int32)
SEGMENTS = np.array([[1, 1, 1, 1, 1, 0, 0], [1] * 7], np.int32)
POSITIONS = np.broadcast_to(np.arange(7, dtype=np.int32), (2, 7))
VALID = SEGMENTS > 0


@functools.cache
def _params(config: ModelConfig):
  """Random everywhere: biases and scales are not special."""
  generator = np.random.default_rng(0)

  def draw(path, leaf):
    is_scale = axes.path_name(path).endswith("scale")
    drawn = 0.4 * generator.standard_normal(leaf.shape) + is_scale
    return jnp.asarray(drawn, leaf.dtype)

  return jax.tree_util.tree_map_with_path(
    draw, decoder_lm.abstract_params(config)
  )


def _apply(config: ModelConfig, params, **options: Any) -> Any:
  model = DecoderLM(config, listed=options.pop("listed", False))
  row = dict(positions=POSITIONS, segments=SEGMENTS) | options
  cache = row.pop("cache", None)
  arrays: dict[str, Any] = {
    name: jnp.asarray(part) for name, part in row.items()
  }
  tokens = arrays.pop("tokens", jnp.asarray(TOKENS))
  return model.apply({"params": params}, tokens, cache=cache, **arrays)


def _norm(x, scale):
  mean = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
  return x / jnp.sqrt(mean + 1e-5) * scale[None, None]


def _attention(x, leaves, config):
  tables = rotary.rotary_tables(
    jnp.asarray(POSITIONS), head_dim=4, theta=config.rope_theta
  )
  query, key, value = (
    jnp.tensordot(x, leaves[f"{name}_kernel"], 1)
    + leaves[f"{name}_bias"][None, None]
    for name in ("query", "key", "value")
  )
  query, key = rotary.rotate(query, tables), rotary.rotate(key, tables)
  logits = jnp.einsum("BTKGH,BSKH->BKGTS", query, key) / 2  # sqrt(4)
  past = np.tril(np.ones((7, 7), bool))[None] & VALID[:, None, :]
  logits = jnp.where(past[:, None, None], logits, -1e30)
  weights = jax.nn.softmax(logits, axis=-1)
  heads = jnp.einsum("BKGTS,BSKH->BTKGH", weights, value)
  return jnp.einsum("BTKGH,KGHD->BTD", heads, leaves["out_kernel"])


def _ffn(x, gate, up, down):
  hidden = x @ gate
  return (hidden / (1 + jnp.exp(-hidden)) * (x @ up)) @ down


def _experts(x, leaves, moe):
  """Every expert on every token, times gates of which most are zero."""
  logits = x @ leaves["router"]["kernel"]
  least = jnp.sort(logits, axis=-1)[..., -moe.top_k]
  chosen = logits >= least[..., None]
  gates = jax.nn.softmax(jnp.where(chosen, logits, -jnp.inf), axis=-1)
  kernels = (leaves[f"{name}_kernel"] for name in ("gate", "up", "down"))
  out = sum(
    gates[..., e, None] * _ffn(x, *expert)
    for e, expert in enumerate(zip(*kernels, strict=True))
  )
  counts = jnp.sum(chosen[VALID], axis=0)
  return out, counts / jnp.sum(counts)


def _loop(config: ModelConfig, params):
  """Logits, and the load of every layer with experts."""
  x = params["embedding"]["table"][TOKENS]
  stack, loads = params["layers"], []
  rows = {"mlp": 0, "dense_mlp": 0}
  for layer in range(config.num_layers):

    def leaves(part, row):
      return jax.tree.map(lambda leaf: leaf[row], stack[part])

    scale = leaves("attention_norm", layer)["scale"]
    x = x + _attention(_norm(x, scale), leaves("attention", layer), config)
    normed = _norm(x, leaves("mlp_norm", layer)["scale"])
    part = "mlp" if layer in config.moe_layers else "dense_mlp"
    own = leaves(part, rows[part])
    rows[part] += 1
    if part == "mlp":
      out, load = _experts(normed, own, config.moe)
      loads.append(load)
    else:
      out = _ffn(
        normed, own["gate_kernel"], own["up_kernel"], own["down_kernel"]
      )
    x = x + out
  x = _norm(x, params["final_norm"]["scale"])
  return x @ params["lm_head"]["kernel"], jnp.stack(loads)


def _with_gradient(function, params):
  """(logits where there is text, load) and the gradient of a sum of them."""
  weights = np.random.default_rng(2).standard_normal((*TOKENS.shape, 11))

  def loss(params):
    logits, load = function(params)
    return jnp.sum((weights * logits)[VALID]), (logits[VALID], load)

  (_, found), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  return found, gradient


@functools.cache
def _scanned(config: ModelConfig):
  def apply(params):
    out = _apply(config, params)
    return out.logits, out.routing.load

  return _with_gradient(apply, _params(config))


def _close(found, expected, tolerance: float = 1e-11):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance),
    found,
    expected,
  )


@pytest.fixture
def float64():
  with jax.enable_x64(True):
    yield


@pytest.mark.mostly_long(one_in=2)
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("config", [WIDE, UNEVEN], ids=["even", "uneven"])
def test_outputs_and_gradients_are_those_of_a_loop_over_layers(config):
  expected = _with_gradient(functools.partial(_loop, config), _params(config))
  # Sums of up to 24 products in some 40 steps, of gradients up to hundreds:
  # 40 * sqrt(24) * 300 * 2^-53 = 7e-12.
  _close(_scanned(config), expected)


@pytest.mark.mostly_long(one_in=2)
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
  "change", [dict(remat="full"), dict(scan_layers=False)]
)
def test_remat_and_unrolling_change_no_output_and_no_gradient(change):
  config = dataclasses.replace(WIDE, **change)
  _close(_scanned(config), _scanned(WIDE))


@functools.cache
def _whole():
  apply = jax.jit(functools.partial(_apply, EVERY_SECOND))
  return apply(_params(EVERY_SECOND)).logits


@pytest.mark.mostly_long(one_in=2)
@pytest.mark.parametrize("listed", [False, True], ids=["stacked", "listed"])
def test_a_cache_continues_rows_with_padding_in_front(listed):
  config, params = EVERY_SECOND, _params(EVERY_SECOND)
  cache: Any = decoder_lm.make_cache(config, batch_size=2, num_slots=8)
  if listed:
    params = decoder_lm.list_layers(params, config)
    cache = decoder_lm.list_cache(cache)
  # Row 0 is its 5 tokens behind the two of padding.
  roll = np.array([np.roll(np.arange(7), 2), np.arange(7)])
  rows = [
    np.take_along_axis(part, roll, axis=1)
    for part in (TOKENS, POSITIONS, SEGMENTS)
  ]
  append = jax.jit(functools.partial(_apply, config, listed=listed))
  logits = []
  for part in (slice(0, 5), slice(5, 6), slice(6, 7)):
    tokens, positions, segments = (row[:, part] for row in rows)
    out = append(
      params, tokens=tokens, positions=positions, segments=segments, cache=cache
    )
    cache = out.cache
    assert out.routing.load.shape == (2, 3)
    logits.append(out.logits)
  found = np.concatenate(logits, axis=1)
  expected = np.take_along_axis(np.asarray(_whole()), roll[..., None], 1)
  valid = rows[2] > 0
  # float32: some hundred roundings of 6e-8 on logits of a few units.
  np.testing.assert_allclose(found[valid], expected[valid], atol=5e-5)


def test_a_list_of_all_layers_is_all():
  every = _with_layers("all", num_layers=3)
  listed = _with_layers((0, 1, 2), num_layers=3)
  assert not listed.is_mixed
  assert decoder_lm.abstract_params(listed) == decoder_lm.abstract_params(every)
  assert decoder_lm.parameter_axes(listed) == decoder_lm.parameter_axes(every)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
  ("config", "dense"), [(LIST, 6), (UNEVEN, 9)], ids=["even", "uneven"]
)
def test_leaves_say_which_layers_they_are_of(config, dense):
  sizes = dict(
    vocab=11, embed=8, kv_head=2, q_per_kv=2, head_dim=4, mlp=6, expert=3
  )
  sizes["dense_mlp"] = dense
  shapes = decoder_lm.abstract_params(config)
  declared = decoder_lm.parameter_axes(config)
  assert jax.tree.structure(shapes) == jax.tree.structure(declared)
  for (path, leaf), leaf_axes in zip(
    jax.tree.leaves_with_path(shapes), jax.tree.leaves(declared), strict=True
  ):
    name = axes.path_name(path)
    part = name.split("/")[1]
    layers = {"mlp": (1, 3, 4, 5), "dense_mlp": (0, 2)}.get(part)
    assert leaf_axes.layers == layers, name
    rows = {"layer": 6 if layers is None else len(layers)}
    assert leaf.shape == tuple((sizes | rows)[axis] for axis in leaf_axes.names)
    assert (leaf_axes.index("layer") == 0) == name.startswith("layers/")
    assert leaf_axes.has("expert") == (part == "mlp")
    assert leaf_axes.has("dense_mlp") == (part == "dense_mlp")
    assert not (leaf_axes.has("mlp") and part == "dense_mlp")


def test_init_draws_every_layer_anew_with_the_deviation_asked_for():
  config = dataclasses.replace(
    EVERY_SECOND, embed_dim=64, mlp_dim=64, init_std=0.1
  )
  params = jax.jit(functools.partial(decoder_lm.init_params, config))(
    key=jax.random.key(0)
  )
  assert jax.eval_shape(lambda: params) == decoder_lm.abstract_params(config)
  stack = params["layers"]
  for part, rows in (("mlp", 2), ("dense_mlp", 2)):
    kernel = stack[part]["up_kernel"]  # 8,192 values or more: 0.8%
    assert abs(jnp.std(kernel) / 0.1 - 1) < 0.03
    for one in range(rows):
      for other in range(one):
        assert jnp.max(jnp.abs(kernel[one] - kernel[other])) > 0.1
  np.testing.assert_array_equal(stack["attention_norm"]["scale"], 1)


def test_what_is_captured_lies_by_run_and_block():
  def captured(params):
    _, variables = DecoderLM(LIST).apply(
      {"params": params},
      jnp.asarray(TOKENS),
      positions=jnp.asarray(POSITIONS),
      segments=jnp.asarray(SEGMENTS),
      capture_intermediates=lambda module, _: "mlp" in (module.name or ""),
      mutable=["intermediates"],
    )
    return variables["intermediates"]

  found = jax.eval_shape(captured, decoder_lm.abstract_params(LIST))["layers"]
  for run, block, part in (
    ("run_0", "block_0", "dense_mlp"),
    ("run_0", "block_1", "mlp"),
    ("run_1", "block_0", "mlp"),
  ):
    out = found[run][block][part]["__call__"][0]
    out = out[0] if part == "mlp" else out
    assert out.shape == (2, 2, 7, 8)  # repeats, rows, tokens, width


def test_what_is_captured_comes_back_in_the_order_of_the_layers():
  runs = layer_runs.find_runs(tuple(i in LIST.moe_layers for i in range(6)))
  assert len(runs) == 2
  stack = {"mlp": {"experts": (jnp.asarray(LIST.moe_layers, float),)}}
  found = stack_captured(layer_runs.split(stack, runs), LIST)
  assert found["mlp"]["experts"][0].tolist() == [1, 3, 4, 5]


def test_a_deeper_pattern_is_no_longer_program():
  def length(num_layers):
    config = _with_layers("every_second", num_layers=num_layers)
    shapes = decoder_lm.abstract_params(config)
    program = jax.make_jaxpr(functools.partial(_apply, config))
    return str(program(shapes)).count(" = ")

  assert length(12) == length(4)


def test_losses_of_new_layers_weigh_their_share_among_those_with_experts():
  mask = GrowthMask(
    value=0.5,
    embed_dim=8,
    mlp_dim=6,
    num_kv_heads=2,
    queries_per_kv=2,
    new_layers=(2, 3),
  )
  config = dataclasses.replace(EVERY_SECOND, growth_mask=mask)
  ones = jnp.ones(2)
  routing = RoutingStats(
    load=jnp.full((2, 3), 1 / 3),
    probability=jnp.full((2, 3), 1 / 3),
    sequence_balance=ones,
    z_loss=2 * ones,
    entropy=ones,
    top_gate=ones,
    dropped=ones,
  )
  found = weigh_losses(routing, config, make_masks(config))
  assert found is not None
  # Layers 1 and 3, with weights 1 and 1/2 over their mean of 3/4.
  np.testing.assert_allclose(found.balance_loss, [4 / 3, 2 / 3], rtol=1e-6)
  np.testing.assert_allclose(found.z_loss, [8 / 3, 4 / 3], rtol=1e-6)
  np.testing.assert_allclose(found.sequence_balance, [4 / 3, 2 / 3], rtol=1e-6)
  for name in ("load", "entropy", "top_gate", "dropped"):
    np.testing.assert_array_equal(
      getattr(found, name), getattr(routing, name), name
    )
