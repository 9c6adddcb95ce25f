"""The body of the forward kernel for TPUs: one tile of tokens after the other.

A tile goes through phases, each a loop over some of its lanes, because what
limits them differs: comparing all experts wants few lanes, so that vectors stay
in registers; picking the best from sublanes is a chain of dependent steps, and
wants many.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from aquila_jax.kernels.topk_routing import lanes as vec
from aquila_jax.kernels.topk_routing import total_order
from aquila_jax.kernels.topk_routing.grid import KernelShape
from aquila_jax.kernels.topk_routing.lanes import LANES, SUBLANES
from aquila_jax.kernels.topk_routing.tuning import Blocks

_LARGEST = 2**31 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape(KernelShape):
  """What the forward kernel is compiled for."""

  blocks: Blocks
  is_half: bool  # logits of 16 bits
  has_bias: bool
  steps_per_piece: int  # tiles whose counts and sums are one output

  @property
  def copies_logits(self) -> bool:
    """Whether they have to be widened, or rows below them filled."""
    return self.is_half or self.num_experts % SUBLANES != 0

  @property
  def tiles_per_set(self) -> int:
    """With more than 8 tiles, neighbours that are first compared."""
    return -(-self.num_tiles // SUBLANES)

  @property
  def num_sets(self) -> int:
    """At most 8."""
    return -(-self.num_tiles // self.tiles_per_set)


class Refs:
  """The kernel's arguments by name; None where there is none."""

  def __init__(self, shape: Shape, refs):
    left = iter(refs)
    self.logits = next(left)  # float [E T]
    self.bias = next(left) if shape.has_bias else None  # float [E 128]
    self.valid = next(left) if shape.has_valid else None  # int [1 T]
    self.experts = next(left)  # int [slots T]; output
    self.gates = next(left)  # float [slots T]; output
    self.positions = next(left)  # int [slots T]; output
    self.chosen = next(left)  # float [slots T]; output, logits of the chosen
    self.logsumexp = next(left)  # float [1 T]; output
    self.counts = next(left)  # int [E 128]; output, of the core so far
    self.probability = next(left)  # float [E 128]; output, sums over lanes
    self.scalars = next(left)  # float [16 128]; output: z and entropy, 8 times
    # float [E T]; logits in float32, with -inf below the last expert
    self.x = next(left) if shape.copies_logits else self.logits
    self.keys = next(left)  # int [E T]
    self.best_keys = next(left)  # int [max(slots, 64) T]
    self.best_experts = next(left)  # int [max(slots, 64) T]
    self.exps = next(left)  # float [E T]
    self.ranks = next(left)  # float [E 128]; assignments so far, of the core
    self.triangle = next(left)  # bfloat16 [128 256]
    self.inverse = next(left)  # float [1 T]; 1 over the sum of `exps`
    assert not list(left)


def scratch(shape: Shape) -> list[Any]:
  """VMEM for what lies between the phases."""
  rows, tokens = shape.num_tiles * SUBLANES, shape.blocks.tokens
  kept = max(shape.slots, SUBLANES * SUBLANES)
  copies = [pltpu.VMEM((rows, tokens), jnp.float32)]
  return [
    *(copies if shape.copies_logits else []),
    pltpu.VMEM((rows, tokens), jnp.int32),
    pltpu.VMEM((kept, tokens), jnp.int32),
    pltpu.VMEM((kept, tokens), jnp.int32),
    pltpu.VMEM((rows, tokens), jnp.float32),
    pltpu.VMEM((rows, LANES), jnp.float32),
    pltpu.VMEM((LANES, 2 * LANES), jnp.bfloat16),
    pltpu.VMEM((1, tokens), jnp.float32),
  ]


def kernel(*refs, shape: Shape) -> None:
  """One tile of tokens of one core; tiles come in order."""
  ref = Refs(shape, refs)
  step = pl.program_id(1)

  @pl.when(step == 0)
  def _():
    ref.ranks[...] = jnp.zeros_like(ref.ranks)
    ref.triangle[...] = triangle()

  in_piece = jax.lax.rem(step, shape.steps_per_piece)

  @pl.when(in_piece == 0)
  def _():
    ref.probability[...] = jnp.zeros_like(ref.probability)
    ref.scalars[...] = jnp.zeros_like(ref.scalars)

  blocks = shape.blocks
  if shape.tiles_per_set > 1 or shape.slots > SUBLANES or shape.has_bias:
    _over(blocks, blocks.compare, lambda at: _compare(ref, shape, at))
  if shape.slots > SUBLANES:
    _over(blocks, blocks.choose, lambda at: _choose_many(ref, shape, at))
  else:
    _over(blocks, blocks.choose, lambda at: _choose(ref, shape, at))
    if shape.tiles_per_set > 1:
      _over(blocks, blocks.choose, lambda at: _choose_again(ref, shape, at))
  _over(blocks, blocks.sums, lambda at: _sums(ref, shape, at))
  _over(blocks, blocks.sums, lambda at: _add_probability(ref, shape, at))
  _over(blocks, blocks.place, lambda at: _place(ref, shape, at))

  @pl.when(in_piece == shape.steps_per_piece - 1)
  def _():
    ref.counts[...] = ref.ranks[...].astype(jnp.int32)


class _At:
  """Some lanes of the tile."""

  def __init__(self, lanes, width: int):
    self.lanes, self.width = lanes, width

  def tile(self, number):
    """Eight rows of them."""
    return vec.part(number, SUBLANES), self.lanes


def _over(blocks: Blocks, width: int, body: Callable[[_At], None]) -> None:
  vec.loop(
    blocks.tokens // width, lambda i: body(_At(vec.part(i, width), width))
  )


def _over_slots(shape: Shape, body: Callable) -> None:
  """body(i) for every vector of chosen experts."""
  vec.loop(shape.slots // SUBLANES, body)


def _load(ref: Refs, shape: Shape, at: _At) -> Iterator[jax.Array]:
  """The logits tile by tile, in float32; there may be rows behind the last."""
  if ref.logits.dtype == jnp.float32:
    for t in range(shape.num_tiles):
      yield ref.logits[at.tile(t)]
  else:
    # Two tiles of 16 bits lie in one vector.
    for t in range(0, shape.num_tiles, 2):
      both = slice(SUBLANES * t, SUBLANES * min(t + 2, shape.num_tiles))
      pair = ref.logits[both, at.lanes].astype(jnp.float32)
      for start in range(0, pair.shape[0], SUBLANES):
        yield pair[start : start + SUBLANES]


def _keys(ref: Refs, shape: Shape, at: _At) -> Iterator[vec.Ranked]:
  """Keys and experts tile by tile; keeps the keys, and logits as float32."""
  sublane = vec.rows(at.width)
  for t, x in enumerate(_load(ref, shape, at)):
    expert = sublane + SUBLANES * t
    ranks = x
    if ref.bias is not None:
      if shape.rule.order == "softmax_then_topk":
        ranks = jnp.exp(x - ref.logsumexp[:, at.lanes])
      elif shape.rule.order == "sigmoid":
        ranks = jax.nn.sigmoid(x)
      column = ref.bias[at.tile(t)[0], :]
      ranks = ranks + jnp.concatenate([column] * (at.width // LANES), axis=1)
    key = total_order.key(ranks)
    if SUBLANES * (t + 1) > shape.num_experts:
      inside = expert < shape.num_experts
      key = jnp.where(inside, key, total_order.NO_KEY)
      x = jnp.where(inside, x, -jnp.inf)
    ref.keys[at.tile(t)] = key
    if shape.copies_logits:
      ref.x[at.tile(t)] = x
    yield key, expert


def _compare(ref: Refs, shape: Shape, at: _At) -> None:
  """Keys; and where there are many tiles, the best of every set of them."""
  if ref.bias is not None and shape.rule.order == "softmax_then_topk":
    ref.logsumexp[:, at.lanes] = _logsumexp(ref, shape, at)
  best, members = None, 0
  for t, ranked in enumerate(_keys(ref, shape, at)):
    # One after the other, so that few vectors are in use at a time.
    best = ranked if best is None else vec.best_of([best, ranked])
    members += 1
    if members == shape.tiles_per_set or t == shape.num_tiles - 1:
      if shape.tiles_per_set > 1:
        number = at.tile(t // shape.tiles_per_set)
        ref.best_keys[number], ref.best_experts[number] = best
      best, members = None, 0


def _logsumexp(ref: Refs, shape: Shape, at: _At) -> jax.Array:
  """Of the logits, [1 W], without knowing the largest."""
  inside = [
    jnp.where(
      vec.rows(at.width) + SUBLANES * t < shape.num_experts, x, -jnp.inf
    )
    for t, x in enumerate(_load(ref, shape, at))
  ]
  largest = inside[0]
  for x in inside[1:]:
    largest = jnp.maximum(largest, x)
  largest = vec.over_sublanes(jnp.maximum, largest)
  total = jnp.zeros_like(largest)
  for x in inside:
    total = total + jnp.exp(x - largest)
  total = vec.over_sublanes(jnp.add, total)
  return (largest + jnp.log(total))[:1]


def _choose(ref: Refs, shape: Shape, at: _At) -> None:
  """The best of at most 8 vectors: of all experts, or of the sets' best."""
  sublane = vec.rows(at.width)
  if shape.tiles_per_set > 1:
    columns = [
      (ref.best_keys[at.tile(s)], ref.best_experts[at.tile(s)])
      for s in range(shape.num_sets)
    ]
  elif shape.has_bias:
    columns = [
      (ref.keys[at.tile(t)], sublane + SUBLANES * t)
      for t in range(shape.num_tiles)
    ]
  else:
    columns = list(_keys(ref, shape, at))
  ordered = vec.sort_columns(columns, shape.rule.top_k)
  best = vec.best_sublanes(ordered, shape.rule.top_k)
  ref.best_keys[at.tile(0)], ref.best_experts[at.tile(0)] = best


def _choose_again(ref: Refs, shape: Shape, at: _At) -> None:
  """The best of the sets that hold the best.

  A set is what its tiles have in one sublane. An expert among the k best is in
  one of the k sets with the best bests: otherwise k experts would precede it.
  """
  winners = ref.best_experts[at.tile(0)]
  sublane = winners & (SUBLANES - 1)
  tile = winners >> 3
  size = shape.tiles_per_set
  number = jnp.zeros_like(tile)
  for s in range(1, shape.num_sets):
    number = jnp.where(tile >= s * size, s, number)
  is_set = [number == s for s in range(shape.num_sets)]
  used = vec.rows(at.width) < shape.rule.top_k
  columns = []
  for member in range(size):
    key = jnp.full_like(winners, total_order.NO_KEY)
    for s in range(shape.num_sets):
      t = s * size + member
      if t < shape.num_tiles:
        key = jnp.where(is_set[s], vec.take(ref.keys[at.tile(t)], sublane), key)
    expert = (number * size + member) * SUBLANES + sublane
    if shape.rule.top_k < SUBLANES:
      key = jnp.where(used, key, total_order.NO_KEY)
      expert = jnp.where(used, expert, total_order.NO_EXPERT)
    columns.append((key, expert))
  ordered = vec.sort_columns(columns, shape.rule.top_k)
  best = vec.best_sublanes(ordered, shape.rule.top_k)
  ref.best_keys[at.tile(0)], ref.best_experts[at.tile(0)] = best


def _choose_many(ref: Refs, shape: Shape, at: _At) -> None:
  """More than 8, one after the other: the best behind the one before."""
  sublane = vec.rows(at.width)

  def next_best(rank, carry):
    last_key, last_expert, keys, experts = carry
    columns = []
    for t in range(shape.num_tiles):
      key, expert = ref.keys[at.tile(t)], sublane + SUBLANES * t
      equal = (key == last_key) & (expert > last_expert)
      left = (key < last_key) | equal
      columns.append(
        (
          jnp.where(left, key, total_order.NO_KEY),
          jnp.where(left, expert, total_order.NO_EXPERT),
        )
      )
    key, expert = vec.best_sublanes([_best_left(columns)], 1)
    key = jnp.broadcast_to(key[:1], key.shape)
    expert = jnp.broadcast_to(expert[:1], expert.shape)
    here = sublane == rank
    return (
      key,
      expert,
      jnp.where(here, key, keys),
      jnp.where(here, expert, experts),
    )

  def eight(i, last):
    none = jnp.full((SUBLANES, at.width), total_order.NO_KEY, jnp.int32)
    *last, keys, experts = jax.lax.fori_loop(
      0, SUBLANES, next_best, (*last, none, jnp.zeros_like(none))
    )
    ref.best_keys[at.tile(i)] = keys
    ref.best_experts[at.tile(i)] = experts
    return tuple(last)

  first = jnp.full((SUBLANES, at.width), _LARGEST, jnp.int32)
  jax.lax.fori_loop(
    0, shape.slots // SUBLANES, eight, (first, jnp.full_like(first, -1))
  )


def _best_left(columns: list[vec.Ranked]) -> vec.Ranked:
  """`vec.best_of`, where those that are out have keys that others have too."""
  best_key, best_expert = columns[0]
  for key, expert in columns[1:]:
    lower = (key == best_key) & (expert < best_expert)
    better = (key > best_key) | lower
    best_key = jnp.where(better, key, best_key)
    best_expert = jnp.where(better, expert, best_expert)
  return best_key, best_expert


def _valid(ref: Refs, at: _At) -> jax.Array | None:
  """Whether a lane's token is no padding, [8 W]."""
  if ref.valid is None:
    return None
  valid = ref.valid[:, at.lanes] > 0
  return jnp.broadcast_to(valid, (SUBLANES, at.width))


def _sums(ref: Refs, shape: Shape, at: _At) -> None:
  """Softmax and gates, and sums over tokens."""
  rule, valid = shape.rule, _valid(ref, at)
  largest = _largest(ref, shape, at)
  total = jnp.zeros((SUBLANES, at.width), jnp.float32)
  product = jnp.zeros_like(total)
  for t in range(shape.num_tiles):
    less = ref.x[at.tile(t)] - largest
    exp = jnp.exp(less)
    total = total + exp
    if rule.order != "sigmoid":
      ref.exps[at.tile(t)] = exp
      product = product + exp * jnp.maximum(less, vec.LEAST)
  total = vec.over_sublanes(jnp.add, total)
  logsumexp = largest + jnp.log(total)
  ref.logsumexp[:, at.lanes] = logsumexp[:1]
  if rule.order == "sigmoid":
    total, product = _sigmoids(ref, shape, at)
    total = vec.over_sublanes(jnp.add, total)
  product = vec.over_sublanes(jnp.add, product)
  # P = exps / total; -sum P log P, with the logarithm of exps in `product`.
  entropy = jnp.log(total) - product / total
  square = logsumexp * logsumexp
  if valid is not None:
    # Not products: what padding holds may not be finite.
    entropy = jnp.where(valid, entropy, 0.0)
    square = jnp.where(valid, square, 0.0)
  ref.scalars[:SUBLANES] += vec.lane_sums(square)
  ref.scalars[SUBLANES:] += vec.lane_sums(entropy)
  ref.inverse[:, at.lanes] = (1 / total)[:1]
  _gates(ref, shape, at, logsumexp[:1])


def _add_probability(ref: Refs, shape: Shape, at: _At) -> None:
  """A loop of its own: else all of `exps` would stay in registers."""
  valid = _valid(ref, at)
  inverse = jnp.broadcast_to(ref.inverse[:, at.lanes], (SUBLANES, at.width))
  for t in range(shape.num_tiles):
    probability = ref.exps[at.tile(t)] * inverse
    if valid is not None:
      probability = jnp.where(valid, probability, 0.0)
    ref.probability[at.tile(t)[0], :] += vec.lane_sums(probability)


def _largest(ref: Refs, shape: Shape, at: _At) -> jax.Array:
  """The largest logit of each token, [8 W]."""
  if ref.bias is None:
    keys = ref.best_keys[at.tile(0)]
    return jnp.broadcast_to(total_order.value(keys)[:1], keys.shape)
  largest = ref.x[at.tile(0)]
  for t in range(1, shape.num_tiles):
    largest = jnp.maximum(largest, ref.x[at.tile(t)])
  return vec.over_sublanes(jnp.maximum, largest)


def _sigmoids(ref: Refs, shape: Shape, at: _At) -> tuple[jax.Array, jax.Array]:
  """Keeps s = sigmoid(logits); sums over tiles of s and s log s, [8 W]."""
  total = jnp.zeros((SUBLANES, at.width), jnp.float32)
  product = jnp.zeros_like(total)
  for t in range(shape.num_tiles):
    score, log_score = vec.sigmoid(ref.x[at.tile(t)])
    ref.exps[at.tile(t)] = score
    total = total + score
    product = product + score * log_score
  return total, product


def _gates(ref: Refs, shape: Shape, at: _At, logsumexp: jax.Array) -> None:
  _over_slots(shape, lambda i: _look_up_chosen(ref, shape, at, i))
  chosen = ref.chosen[:, at.lanes]
  slot = jax.lax.broadcasted_iota(jnp.int32, chosen.shape, 0)
  chosen = jnp.where(slot < shape.rule.top_k, chosen, -jnp.inf)
  gates = shape.rule.scoring.gates(chosen, logsumexp, axis=0)
  if ref.valid is not None:
    gates = jnp.where(ref.valid[:, at.lanes] > 0, gates, 0.0)
  ref.gates[:, at.lanes] = gates


def _look_up_chosen(ref: Refs, shape: Shape, at: _At, i) -> None:
  """Experts out, and the logits of eight chosen."""
  experts = ref.best_experts[at.tile(i)]
  ref.experts[at.tile(i)] = experts
  if ref.bias is None:
    ref.chosen[at.tile(i)] = total_order.value(ref.best_keys[at.tile(i)])
    return
  ref.chosen[at.tile(i)] = at_experts(
    (ref.x[at.tile(t)] for t in range(shape.num_tiles)), experts
  )


def at_experts(tiles: Iterator[jax.Array], experts: jax.Array) -> jax.Array:
  """What [E W], given tile by tile, has at every lane's experts, [8 W]."""
  sublane, tile = experts & (SUBLANES - 1), experts >> 3
  found = None
  for t, x in enumerate(tiles):
    here = vec.take(x, sublane)
    found = here if found is None else jnp.where(tile == t, here, found)
  assert found is not None
  return found


def _place(ref: Refs, shape: Shape, at: _At) -> None:
  """Each assignment's place among those of its expert; and their number.

  Who chose whom, as ones and zeros, times a triangle: how many tokens to the
  left chose the same. float32 adds ones exactly.
  """
  chosen = jnp.concatenate(_chosen_by(ref, shape, at)).astype(jnp.bfloat16)
  ones = ref.triangle[...]
  inside = [
    jnp.dot(chosen[:, i : i + LANES], ones, preferred_element_type=jnp.float32)
    for i in range(0, at.width, LANES)
  ]

  def tiles():
    for t in range(shape.num_tiles):
      rows = slice(SUBLANES * t, SUBLANES * (t + 1))
      so_far = ref.ranks[rows]
      parts = []
      for product in inside:
        parts.append(product[rows, :LANES] + so_far)
        so_far = so_far + product[rows, LANES:]
      ref.ranks[rows] = so_far
      yield jnp.concatenate(parts, axis=1)

  if shape.slots == SUBLANES:
    found = at_experts(tiles(), ref.best_experts[at.tile(0)])
    _store_positions(ref, at, 0, found)
    return
  for t, ranks in enumerate(tiles()):
    ref.exps[at.tile(t)] = ranks

  def eight(i):
    ranks = (ref.exps[at.tile(t)] for t in range(shape.num_tiles))
    _store_positions(
      ref, at, i, at_experts(ranks, ref.best_experts[at.tile(i)])
    )

  _over_slots(shape, eight)


def _store_positions(ref: Refs, at: _At, i, found: jax.Array) -> None:
  positions = found.astype(jnp.int32)
  valid = _valid(ref, at)
  if valid is not None:
    positions = jnp.where(valid, positions, -1)
  ref.positions[at.tile(i)] = positions


def _chosen_by(ref: Refs, shape: Shape, at: _At) -> list[jax.Array]:
  """1 where a token has chosen an expert, else 0, tile by tile.

  Those with a key above the last chosen's, and with the same key up to it.
  """
  valid = _valid(ref, at)
  last = shape.rule.top_k - 1
  tile, sublane = last - last % SUBLANES, last % SUBLANES
  row = slice(tile + sublane, tile + sublane + 1)
  size = (SUBLANES, at.width)
  key = jnp.broadcast_to(ref.best_keys[row, at.lanes], size)
  expert = jnp.broadcast_to(ref.best_experts[row, at.lanes], size)
  # Of the largest key, a NaN of all ones, there is no next one.
  above = key + (key != _LARGEST).astype(jnp.int32)
  ahead = expert - vec.rows(at.width)
  chosen = []
  for t in range(shape.num_tiles):
    least = jnp.where(ahead >= SUBLANES * t, key, above)
    is_chosen = ref.keys[at.tile(t)] >= least
    if valid is not None:
      is_chosen = is_chosen & valid
    chosen.append(jnp.where(is_chosen, 1.0, 0.0))
  return chosen


def triangle() -> jax.Array:
  """[128 256]: ones above the diagonal, and beside them ones alone."""
  size = (LANES, 2 * LANES)
  row = jax.lax.broadcasted_iota(jnp.int32, size, 0)
  column = jax.lax.broadcasted_iota(jnp.int32, size, 1)
  return jnp.where(row < column, 1.0, 0.0).astype(jnp.bfloat16)
