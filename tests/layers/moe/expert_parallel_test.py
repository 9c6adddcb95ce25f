"""However rows reach experts, outputs and gradients are those of one device."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from aquila_jax.core import token_order
from aquila_jax.core.errors import UserError
from aquila_jax.core.experiment_config import MeshConfig
from aquila_jax.core.model_config import MoeConfig
from aquila_jax.kernels.target import Target
from aquila_jax.layers.moe import exchanges, expert_parallel
from aquila_jax.layers.moe.exchanges import Group
from aquila_jax.layers.moe.mixture import mixture
from aquila_jax.layers.moe.router import Affinity
from aquila_jax.sharding.mesh import BATCH_AXES, make_mesh
from aquila_jax.sharding.rules import GATHERED

ROWS, TOKENS, WIDTH, HIDDEN, EXPERTS = 8, 8, 16, 24, 8
EXCHANGES = ("ragged_all_to_all", "all_to_all", "all_gather")
MESHES = {
  "expert 8": MeshConfig(data=1, expert=8),
  "expert 4": MeshConfig(data=2, expert=4),
  "expert 2": MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
  "sequence 2": MeshConfig(data=1, fsdp=2, expert=2, sequence=2),
  "sequence 4": MeshConfig(data=2, sequence=4),
}
EXPERT_MESHES = [name for name, mesh in MESHES.items() if mesh.expert > 1]


def _emulated(rows, out, in_offset, sizes, out_offset, received, *, axis_name):
  """`jax.lax.ragged_all_to_all` by its definition; XLA has none for CPUs."""
  gather = functools.partial(jax.lax.all_gather, axis_name=axis_name)
  rows, in_offset, out_offset, sizes_of_all = map(
    gather, (rows, in_offset, out_offset, sizes)
  )
  devices, slices = in_offset.shape
  me, each = jax.lax.axis_index(axis_name), slices // devices
  place = jnp.arange(out.shape[0])
  for source in range(devices):
    for i in range(each):
      j = me * each + i
      start, size = out_offset[source, j], sizes_of_all[source, j]
      # What the receiver expects is what comes.
      size = jnp.where(size == received[source * each + i], size, 0)
      inside = (place >= start) & (place < start + size)
      index = jnp.clip(
        in_offset[source, j] + place - start, 0, len(rows[0]) - 1
      )
      out = jnp.where(inside[:, None], rows[source][index], out)
  return out


@pytest.fixture
def ragged(monkeypatch):
  """The exchange of TPUs, on CPUs."""
  monkeypatch.setattr(jax.lax, "ragged_all_to_all", _emulated)
  monkeypatch.setattr(
    expert_parallel, "target", lambda: Target(platform="tpu", device_kind="")
  )


def _inputs(choice: str, dtype=np.float32):
  """Tokens, logits, kernels; `choice` says whom tokens like."""
  rng = np.random.default_rng(7)
  num_tokens = ROWS * TOKENS
  logits = rng.normal(size=(num_tokens, EXPERTS))
  # Liked a little more than the best: gates stay far from 0 and 1.
  best = logits.max(axis=1) + 0.3
  if choice == "one":
    logits[:, 5] = best
  if choice == "two":  # experts, which are on one device of two or four
    logits[:, 2], logits[:, 3] = best, best - 0.1
  if choice == "own":  # a row's tokens like the same expert, each row another
    token = np.arange(num_tokens)
    logits[token, token // TOKENS] = best
  valid = np.ones(num_tokens, bool)
  if choice == "masked":
    valid = rng.random(num_tokens) < 0.6
    valid[: 2 * TOKENS] = False
  normal = functools.partial(rng.normal, scale=0.3)
  kernels = (
    normal(size=(EXPERTS, WIDTH, HIDDEN)),
    normal(size=(EXPERTS, WIDTH, HIDDEN)),
    normal(size=(EXPERTS, HIDDEN, WIDTH)),
  )
  x = rng.normal(size=(num_tokens, WIDTH))
  cast = functools.partial(jax.tree.map, lambda a: jnp.asarray(a, dtype))
  return cast(x), cast(logits), cast(kernels), jnp.asarray(valid)


def _chosen_and_kept(logits, valid, config: MoeConfig):
  """Bools [M E]; slots are given out one by one."""
  chosen = np.argsort(-logits, axis=-1, kind="stable")[:, : config.top_k]
  among, kept = np.zeros((2, *logits.shape), bool)
  slots = np.inf
  if config.capacity_factor is not None:
    slots = np.ceil(config.capacity_factor * chosen.size / EXPERTS)
  used = np.zeros(EXPERTS)
  for token, experts in enumerate(chosen):
    among[token, experts] = True
    if valid[token]:
      kept[token, experts] = used[experts] < slots
      used[experts] += 1
  return among, kept


def _expected(x, logits, kernels, *, met):
  """Every expert on every token, times its gate."""
  among, kept = met
  gates = jax.nn.softmax(jnp.where(among, logits, -jnp.inf), axis=-1)
  gates = jnp.where(kept, gates, 0.0)
  gate, up, down = kernels
  hidden = jax.nn.silu(jnp.einsum("MD,EDF->MEF", x, gate))
  hidden *= jnp.einsum("MD,EDF->MEF", x, up)
  return jnp.einsum("MEF,EFD,ME->MD", hidden, down, gates)


@functools.cache
def _on_mesh(config: MoeConfig, mesh_name: str, num_rows: int = ROWS):
  """Outputs and gradients of `mixture`, as a compiled function."""
  mesh = make_mesh(MESHES[mesh_name])

  def place(spec):
    return NamedSharding(mesh, spec)

  rows = place(P(BATCH_AXES) if num_rows == ROWS else P())
  shardings = (
    rows,
    rows,
    (
      place(P("expert", GATHERED, "tensor")),
      place(P("expert", GATHERED, "tensor")),
      place(P("expert", "tensor", GATHERED)),
    ),
    rows,
    rows,
  )

  parts = MESHES[mesh_name].sequence
  length = ROWS * TOKENS // num_rows
  order = token_order.token_order(length, parts)

  def in_rows(flat):  # as they lie
    return flat.reshape(num_rows, length, *flat.shape[1:])[:, order]

  def run(x, logits, kernels, valid, upstream):
    def loss(x, logits, kernels):
      logits = in_rows(logits)
      affinity = Affinity(
        plain=logits, logits=logits, bias=None, valid=in_rows(valid)
      )
      out, _, meetings = mixture(
        in_rows(x), affinity, kernels, config=config, token_parts=parts
      )
      out = out[:, np.argsort(order)].reshape(x.shape)
      return jnp.sum(out * upstream), (out, meetings.dropped)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      grads, (out, dropped) = jax.grad(loss, (0, 1, 2), has_aux=True)(
        x, logits, kernels
      )
    return out, grads, dropped

  return jax.jit(run, in_shardings=shardings), shardings


def _check(config: MoeConfig, mesh_name: str, choice: str, **fields):
  x, logits, kernels, valid = _inputs(choice)
  upstream = jnp.asarray(
    np.random.default_rng(8).normal(size=x.shape), jnp.float32
  )
  run, shardings = _on_mesh(config, mesh_name, **fields)
  out, grads, _ = run(
    *jax.device_put((x, logits, kernels, valid, upstream), shardings)
  )
  met = _chosen_and_kept(np.asarray(logits), np.asarray(valid), config)
  expected, pull_back = jax.vjp(
    functools.partial(_expected, met=met), x, logits, kernels
  )
  # Sums of up to 48 products, over up to 128 rows, in another order.
  tolerance = (10 + np.sqrt(128)) * np.sqrt(48) * 2.0**-24

  def close(actual, wanted):
    scale = np.max(np.abs(wanted))
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=tolerance * scale)

  close(out, expected)
  jax.tree.map(close, grads, pull_back(upstream))


def _config(exchange: str, **fields) -> MoeConfig:
  defaults: dict[str, Any] = dict(
    num_experts=EXPERTS, top_k=2, block_size=4, exchange=exchange
  )
  return MoeConfig(**(defaults | fields))


@pytest.mark.mostly_long(one_in=11)
@pytest.mark.parametrize("choice", ["any", "one", "two", "own", "masked"])
@pytest.mark.parametrize("mesh", EXPERT_MESHES)
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.usefixtures("ragged")
def test_exchanges_equal_one_device(exchange, mesh, choice):
  _check(_config(exchange), mesh, choice)


@pytest.mark.mostly_long(one_in=5)
@pytest.mark.parametrize("choice", ["any", "one"])
@pytest.mark.parametrize(
  "fields",
  [
    dict(buffer_factor=8.0),  # enough for any choice: no other way is compiled
    dict(buffer_factor=1.0),
    dict(capacity_factor=0.75),
    dict(top_k=4, block_size=16),
  ],
  ids=str,
)
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.usefixtures("ragged")
def test_exchanges_of_other_sizes_equal_one_device(exchange, fields, choice):
  _check(_config(exchange, **fields), "expert 4", choice)


@pytest.mark.parametrize("choice", ["any", "one", "own", "masked"])
@pytest.mark.parametrize("mesh", ["sequence 2", "sequence 4"])
def test_capacity_is_given_out_in_the_order_of_the_batch(mesh, choice):
  """Also where the tokens of a row lie on several devices."""
  _check(_config("all_to_all", capacity_factor=0.6), mesh, choice)


@pytest.mark.mostly_long(one_in=7)
@pytest.mark.parametrize("choice", ["any", "one", "masked"])
@pytest.mark.parametrize("capacity_factor", [None, 0.75])
@pytest.mark.parametrize("mesh", MESHES)
def test_one_long_row_is_computed_on_all_devices(mesh, capacity_factor, choice):
  config = _config("all_to_all", capacity_factor=capacity_factor)
  _check(config, mesh, choice, num_rows=1)


def _group(**fields) -> Group:
  defaults: dict[str, Any] = dict(
    axis="expert",
    size=4,
    num_experts=EXPERTS,
    num_tokens=12,
    top_k=2,
    block_size=4,
    buffer_factor=1.5,
  )
  return Group(**(defaults | fields))


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_buffers_that_are_too_small_are_seen(exchange):
  way = exchanges.EXCHANGES[exchange]
  group = _group()
  even = np.full((4, EXPERTS), 3)  # 12 tokens of 2 choices, on 8 experts
  assert way.fits(exchanges.Traffic(jnp.asarray(even)), group)
  skewed = np.zeros((4, EXPERTS), int)
  skewed[:, :2] = 12
  assert not way.fits(exchanges.Traffic(jnp.asarray(skewed)), group)
  assert not way.always_fits(group)
  enough = dataclasses.replace(group, buffer_factor=4.0)
  assert way.fits(exchanges.Traffic(jnp.asarray(skewed)), enough)
  assert way.always_fits(enough)


def test_what_is_sent_decides():
  # Of 2 devices and 2 experts a token, every token is needed everywhere.
  config, group = MoeConfig(num_experts=EXPERTS), _group(size=2)
  choose = functools.partial(expert_parallel._chosen, bytes_per_row=4)
  assert choose(config, group) == exchanges.AllGather()
  group = _group(size=8, num_tokens=1024)
  assert choose(config, group) == exchanges.AllToAll()
  assert exchanges.AllToAll().sent(group) == 2 * 7 * 1.5 * 256
  assert exchanges.RaggedAllToAll().sent(group) == 2 * 7 * 256
  assert exchanges.AllGather().sent(group) == 2 * 7 * 1024


def test_ragged_exchange_is_refused_on_cpu():
  config = _config("ragged_all_to_all")
  with pytest.raises(UserError, match=r"^model\.moe\.exchange='ragged_all_to_"):
    expert_parallel._chosen(config, _group(), bytes_per_row=4)


@pytest.mark.mostly_long(one_in=5)
@pytest.mark.parametrize("mesh", EXPERT_MESHES)
@pytest.mark.parametrize(
  ("exchange", "num_rows"), [("all_to_all", 8), ("all_gather", 8), (None, 1)]
)
def test_kernels_are_not_gathered_over_the_expert_axis(
  exchange, num_rows, mesh
):
  config = _config(exchange or "all_to_all")
  run, shardings = _on_mesh(config, mesh, num_rows)
  x, logits, kernels, valid = _inputs("any")
  arguments = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    (x, logits, kernels, valid, x),
    shardings,
  )
  text = run.lower(*arguments).compile().as_text() or ""
  gathered = re.findall(r"= (\S+) all-gather(?:-start)?\(", text)
  assert gathered or num_rows == 1  # numbers of rows, at least
  whole = EXPERTS * WIDTH * HIDDEN // MESHES[mesh].tensor
  for shape in gathered:
    (sizes,) = re.findall(r"\[([\d,]*)\]", shape)
    assert np.prod([int(n) for n in sizes.split(",")]) < whole


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.usefixtures("ragged")
def test_only_what_does_not_fit_goes_around(exchange, monkeypatch):
  def lost(group, floats, plan, traffic):
    del group, plan, traffic
    return jnp.full_like(floats[0], jnp.nan)

  monkeypatch.setattr(expert_parallel, "_around", lost)
  config = _config(exchange, buffer_factor=2.0)
  compiled_anew: Any = _on_mesh
  run, shardings = compiled_anew.__wrapped__(config, "expert 4")
  for choice, is_lost in (("any", False), ("two", True)):
    x, logits, kernels, valid = _inputs(choice)
    out, *_ = run(*jax.device_put((x, logits, kernels, valid, x), shardings))
    assert np.isnan(out).all() == is_lost
    assert np.isnan(out).any() == is_lost
