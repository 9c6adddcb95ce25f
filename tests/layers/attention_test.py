"""Grouped-query attention against loops over heads, queries and keys."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.core import axes
from aquila_jax.core.model_config import (
  LinearRopeScaling,
  Llama3RopeScaling,
  ModelConfig,
)
from aquila_jax.kernels.attention import chunked
from aquila_jax.layers import rotary
from aquila_jax.layers.attention import Attention, KVCache


def _config(**fields) -> ModelConfig:
  defaults: dict[str, Any] = dict(
    vocab_size=8,
    num_layers=1,
    embed_dim=6,
    mlp_dim=8,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    rope_theta=100.0,
    compute_dtype="float32",
  )
  return ModelConfig(**(defaults | fields))


def _normal(seed: int, shape) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# Three documents; the last two slots are padding.
SEGMENTS = np.array([[1, 1, 1, 2, 2, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
POSITIONS = np.array([[0, 1, 2, 0, 1, 0, 0, 0], [0, 1, 2, 3, 4, 5, 6, 7]])


def _attend_by_loops(query, key, value, mask, *, xp=np):
  """softmax(q k / sqrt(H)) v, one query and one key at a time; [B T N H]."""
  rows = []
  for b, t, n in np.ndindex(query.shape[:3]):
    seen = [s for s in range(key.shape[1]) if mask[b, t, s]]
    group = n // (query.shape[2] // key.shape[2])
    logits = [xp.dot(query[b, t, n], key[b, s, group]) for s in seen]
    weights = xp.exp(xp.stack(logits) / query.shape[-1] ** 0.5)
    weights = weights / xp.sum(weights)
    rows.append(weights @ xp.stack([value[b, s, group] for s in seen]))
  return xp.stack(rows).reshape(query.shape)


@functools.cache
def _layer(**fields):
  """A layer with random parameters, biases among them."""
  config = _config(**fields)
  x = jnp.asarray(_normal(4, (2, 8, 6)))
  variables, declared = axes.split_declared(
    Attention(config).init(
      jax.random.key(0),
      x,
      tables=rotary.tables_of(config, jnp.asarray(POSITIONS)),
      segments=jnp.asarray(SEGMENTS),
    )
  )
  leaves, structure = jax.tree.flatten(variables["params"])
  params = structure.unflatten(
    [jnp.asarray(_normal(i, leaf.shape)) / 2 for i, leaf in enumerate(leaves)]
  )
  return config, params, declared["params"], x


def _run(config, params, x, *, segments, positions, cache=None) -> Any:
  return Attention(config).apply(
    {"params": params},
    x,
    tables=rotary.tables_of(config, jnp.asarray(positions)),
    segments=jnp.asarray(segments),
    cache=cache,
  )


_compiled = jax.jit(_run, static_argnums=0)


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_layer_equals_head_by_head_products(qkv_bias):
  config, params, _, x = _layer(qkv_bias=qkv_bias)
  rows = dict(segments=SEGMENTS, positions=POSITIONS)
  out, cache = _compiled(config, params, x, **rows)
  assert cache is None
  tables = rotary.rotary_tables(jnp.asarray(POSITIONS), head_dim=4, theta=100.0)
  params, x = jax.tree.map(np.asarray, (params, x))
  heads = {}
  for name, kernel_heads in (("query", (2, 3)), ("key", (2,)), ("value", (2,))):
    kernel = params[f"{name}_kernel"].reshape(6, -1, 4)
    bias = params.get(f"{name}_bias", np.zeros((*kernel_heads, 4)))
    one_by_one = [
      x @ kernel[:, n] + bias.reshape(-1, 4)[None, None, n]
      for n in range(kernel.shape[1])
    ]
    heads[name] = jnp.asarray(np.stack(one_by_one, axis=2), jnp.float32)
  mask = (SEGMENTS[:, :, None] == SEGMENTS[:, None, :]) & np.tril(
    np.ones((8, 8), bool)
  )
  attended = _attend_by_loops(
    np.asarray(rotary.rotate(heads["query"], tables)),
    np.asarray(rotary.rotate(heads["key"], tables)),
    np.asarray(heads["value"]),
    mask,
  )
  out_kernel = np.asarray(params["out_kernel"]).reshape(6, 4, 6)
  expected = sum(attended[:, :, n] @ out_kernel[n] for n in range(6))
  np.testing.assert_allclose(out, expected, atol=1e-5)


def _rms(x, scale, epsilon: float = 1e-5):
  mean = jnp.mean(x * x, axis=-1, keepdims=True)
  return (
    x
    / jnp.sqrt(mean + epsilon)
    * jnp.expand_dims(scale, tuple(range(x.ndim - 1)))
  )


def _turn_by_pairs(x, divisors):
  """RoPE of POSITIONS, a frequency at a time, each divided by its divisor."""
  half = x.shape[-1] // 2
  pairs = []
  for i in range(half):
    angle = jnp.asarray(POSITIONS * 100.0 ** (-i / half) / divisors[i])
    angle = angle.astype(jnp.float32)[:, :, None]
    a, b = x[..., i], x[..., i + half]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    pairs.append((a * cos - b * sin, b * cos + a * sin))
  return jnp.stack([p[0] for p in pairs] + [p[1] for p in pairs], axis=-1)


def _by_heads(params, x, *, qk_norm, out_bias, window, divisors):
  """The layer with every option, head by head; differentiable."""
  heads = {}
  for name in ("query", "key", "value"):
    kernel = params[f"{name}_kernel"].reshape(6, -1, 4)
    bias = params[f"{name}_bias"].reshape(-1, 4)
    heads[name] = jnp.stack(
      [x @ kernel[:, n] + bias[None, None, n] for n in range(kernel.shape[1])],
      axis=2,
    )
  if qk_norm:
    for name in ("query", "key"):
      heads[name] = _rms(heads[name], params[f"{name}_norm"]["scale"])
  query, key = (
    _turn_by_pairs(heads[name], divisors) for name in ("query", "key")
  )
  mask = np.zeros((2, 8, 8), bool)
  for b, t, s in np.ndindex(2, 8, 8):
    near = window is None or t - s < window
    mask[b, t, s] = s <= t and near and SEGMENTS[b, t] == SEGMENTS[b, s]
  logits = jnp.einsum("btnh,bsnh->bnts", query, jnp.repeat(key, 3, axis=2)) / 2
  logits = jnp.where(jnp.asarray(mask)[:, None], logits, -1e30)
  weights = jax.nn.softmax(logits, axis=-1)
  value = jnp.repeat(heads["value"], 3, axis=2)
  attended = jnp.einsum("bnts,bsnh->btnh", weights, value)
  out_kernel = params["out_kernel"].reshape(6, 4, 6)
  out = sum(attended[:, :, n] @ out_kernel[n] for n in range(6))
  return out + params["out_bias"][None, None] if out_bias else out


SCALINGS = {
  None: (None, [1.0, 1.0]),
  "linear": (LinearRopeScaling(factor=4.0), [4.0, 4.0]),
  # Base 100 and H=4: wavelengths 2 pi and 20 pi. Of 40 tokens they are 6.37
  # and 0.637 turns; above 4 is kept, below 1 divided.
  "llama3": (
    Llama3RopeScaling(factor=4.0, original_context_length=40),
    [1.0, 4.0],
  ),
}
OPTIONS = [
  dict(qk_norm=qk_norm, out_bias=out_bias, window=window, scaling=scaling)
  for qk_norm, out_bias, window, scaling in [
    *itertools.product([False, True], [False, True], [None, 2], [None]),
    (False, False, None, "linear"),
    (True, True, 2, "linear"),
    (False, True, 3, "llama3"),
    (True, False, 1, "llama3"),
  ]
]


def _layer_with(options):
  return _layer(
    qk_norm=options["qk_norm"],
    out_bias=options["out_bias"],
    sliding_window=options["window"],
    rope_scaling=SCALINGS[options["scaling"]][0],
  )


@pytest.mark.mostly_long(one_in=5)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_and_their_gradients_equal_the_layer_written_out(options):
  config, params, _, x = _layer_with(options)
  upstream = jnp.asarray(_normal(9, x.shape))

  def fast(params, x):
    return _run(config, params, x, segments=SEGMENTS, positions=POSITIONS)[0]

  def slow(params, x):
    return _by_heads(
      params,
      x,
      qk_norm=options["qk_norm"],
      out_bias=options["out_bias"],
      window=options["window"],
      divisors=SCALINGS[options["scaling"]][1],
    )

  found, expected = (
    jax.jit(
      jax.value_and_grad(
        lambda p, x, f=f: (jnp.sum(upstream * f(p, x)), f(p, x)),
        argnums=(0, 1),
        has_aux=True,
      )
    )(params, x)
    for f in (fast, slow)
  )
  # Four products in a chain, sums of up to 6 * 16 numbers of some tens: 4 *
  # sqrt(96) * 2^-24 * 40 = 1e-4.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4),
    found,
    expected,
  )


@pytest.mark.parametrize(
  "options",
  [o for o in OPTIONS if o["window"] is not None and o["qk_norm"]],
  ids=str,
)
def test_cache_gives_what_the_whole_row_gives_with_options(options):
  config, params, _, x = _layer_with(options)
  _assert_cached_equals_whole(config, params, x, steps=(3, 1, 1, 3))


def test_axes_are_declared_with_their_direction():
  _, _, declared, _ = _layer(qkv_bias=True)
  assert {name: str(leaf) for name, leaf in declared.items()} == {
    "query_kernel": "reads embed, writes kv_head, writes q_per_kv,"
    " writes head_dim",
    "query_bias": "writes kv_head, writes q_per_kv, writes head_dim",
    "key_kernel": "reads embed, writes kv_head, writes head_dim",
    "key_bias": "writes kv_head, writes head_dim",
    "value_kernel": "reads embed, writes kv_head, writes head_dim",
    "value_bias": "writes kv_head, writes head_dim",
    "out_kernel": "reads kv_head, reads q_per_kv, reads head_dim, writes embed",
  }
  _, _, declared, _ = _layer(qkv_bias=False, out_bias=True, qk_norm=True)
  flat = jax.tree.leaves_with_path(declared)
  found = {axes.path_name(path): str(leaf) for path, leaf in flat}
  kernels = {"query_kernel", "key_kernel", "value_kernel", "out_kernel"}
  assert {k: v for k, v in found.items() if k not in kernels} == {
    "out_bias": "writes embed",
    "query_norm/scale": "writes head_dim",
    "key_norm/scale": "writes head_dim",
  }


@pytest.mark.parametrize("steps", [(8,), (1,) * 8, (3, 1, 4)])
def test_cache_gives_what_the_whole_row_gives(steps):
  config, params, _, x = _layer(qkv_bias=True)
  _assert_cached_equals_whole(config, params, x, steps=steps)


def _assert_cached_equals_whole(config, params, x, *, steps):
  rows = dict(segments=SEGMENTS, positions=POSITIONS)
  whole, _ = _compiled(config, params, x, **rows)
  cache = KVCache(
    key=jnp.zeros((2, 2, 10, 4)),
    value=jnp.zeros((2, 2, 10, 4)),
    segments=jnp.zeros((2, 10), jnp.int32),
    length=jnp.zeros((), jnp.int32),
  )
  parts = []
  start = 0
  for size in steps:
    window = slice(start, start + size)
    out, cache = _compiled(
      config,
      params,
      x[:, window],
      segments=SEGMENTS[:, window].astype(np.int32),
      positions=POSITIONS[:, window],
      cache=cache,
    )
    parts.append(out)
    start += size
  assert cache is not None
  assert cache.length == 8
  # Padding sees other padding, whose slots differ; nobody reads it.
  valid = SEGMENTS > 0
  np.testing.assert_allclose(
    np.concatenate(parts, axis=1)[valid], np.asarray(whole)[valid], atol=1e-5
  )


@pytest.mark.parametrize("window", [None, 2])
def test_the_implementation_named_is_the_one_that_computes(monkeypatch, window):
  config, params, _, x = _layer(sliding_window=window)
  called = []
  original = chunked.causal_attention

  def watched(*args, **options):
    called.append(options["window"])
    return original(*args, **options)

  monkeypatch.setattr(chunked, "causal_attention", watched)

  def run(name):
    named = dataclasses.replace(config, attention_implementation=name)
    return _run(named, params, x, segments=SEGMENTS, positions=POSITIONS)[0]

  whole = run(None)
  np.testing.assert_array_equal(run("xla"), whole)
  assert called == []
  # Sums of up to 8 terms, of some tens: 8 * 30 * 2^-24 = 1.4e-5.
  np.testing.assert_allclose(run("chunked"), whole, rtol=0, atol=1.4e-5)
  assert called == [window]
  with pytest.raises(NotImplementedError) as error:
    run("splash")
  reason = "implementation='splash' needs a TPU; this is cpu"
  assert str(error.value).splitlines()[0] == reason


def test_parameters_are_made_whatever_the_implementation():
  """The row of `init` is no multiple of a kernel's block."""
  config = _config(attention_implementation="splash")
  variables = Attention(config).init(
    jax.random.key(0),
    jnp.zeros((2, 8, 6)),
    tables=rotary.tables_of(config, jnp.asarray(POSITIONS)),
    segments=jnp.asarray(SEGMENTS),
  )
  assert set(variables["params"]) >= {"query_kernel", "out_kernel"}
