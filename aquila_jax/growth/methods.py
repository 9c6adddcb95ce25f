"""The methods of Scale-Up: each a few lines that choose maps and sources.

  fpi          every index map copies the layer's own values. bert2BERT (arXiv
               2110.07143), section 3.2; its maps are `width_map="random"`, the
               default here is circular, which is exact at whole factors.
  aki          the new outputs of a layer are those of the next layer of the
               source; bert2BERT, section 3.3. The paper says nothing of the
               residual's own outputs: `aki_residual` has both readings.
  aki_pro      aki with depth by interpolation, key/value groups kept and query
               heads grown inside them. AquilaMoE (arXiv 2408.06567), section
               2.2.
  bert2bert    aki, then depth by whole copies and the topmost layers once more;
               bert2BERT, section 3.4. Its training of parts of the model in
               turn is no part of a growth.
  hypercloning whole copies of everything, with noise that cancels over the
               copies. HyperCloning (arXiv 2409.12903), section 3, its "noisy
               symmetric" expansion; split_noise=0 is the "symmetric" one.
  lemon        the residual padded with zeros and its norms corrected, heads and
               neurons copied with random shares. LEMON (arXiv 2310.07999) for
               models with RMSNorm. There a copy's share is one number; here
               every entry has its own: under Adam, whose step does not feel the
               size of a gradient, copies of shares a and b would stay together.
  msg          the source as it is; new indices are drawn and new layers copied,
               and masked until training has raised the mask. Masked Structural
               Growth (arXiv 2305.02869); models/growth_mask.py.
  ligo         a linear operator that is learned on the target's loss; it starts
               as fpi with depth by interpolation. LiGO (arXiv 2303.00980);
               ligo.py. It needs text, so it is a stage of a pipeline.
  random       the target's initialisation; nothing of the source but its
               tokenizer.

Which of them keeps the function, and of which pair, is not said here: it
follows from the maps (exactness.py). Width comes before depth: "next layer" is
the next layer of the source, and what is drawn is drawn anew for each copy of a
layer.

A method of one's own is a function from a `Pair` to a `Growth`, named in a
config as "module:function"; Python must find the module (PYTHONPATH).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath

from aquila_jax.core import errors
from aquila_jax.core.axes import Role
from aquila_jax.core.experiment_config import DepthRule, ScaleUp
from aquila_jax.growth import axis_map, depth
from aquila_jax.growth.axis_map import EMPTY, AxisMap
from aquila_jax.growth.depth import LayerMap
from aquila_jax.growth.growth import Growth

# The axes whose maps a method chooses, and the config field that sets each; of
# a model those that it has (Pair.axes).
WIDTH = {
  "embed": "embed_dim",
  "mlp": "mlp_dim",
  "dense_mlp": "moe.dense_mlp_dim",
  "kv_head": "num_kv_heads",
  "q_per_kv": "num_heads",
}
_DEPTH = {"layer": "num_layers"}
_TABLE = {"vocab": "vocab_size"}
FIELDS = WIDTH | _DEPTH | _TABLE


def option(path: str, field: str) -> str:
  """The dotted name of an option of a growth, beside that of its target."""
  if path.startswith("--"):
    return f"--{field}"
  return f"{path.removesuffix('model')}init.{field}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
  """What a method is given: the sizes of source and target, and the options."""

  old: Mapping[str, int]  # by axis name
  new: Mapping[str, int]
  options: ScaleUp
  seed: int
  path: str  # the dotted name of the target, for messages

  @property
  def axes(self) -> tuple[str, ...]:
    """The axes of width of both models."""
    return tuple(n for n in WIDTH if n in self.old and n in self.new)

  def widths(self, **chosen: AxisMap) -> dict[str, AxisMap]:
    """A map for every axis of width.

    Args:
      **chosen: by the method, by axis name; others are the config's
        `width_map`. What the user gives in `maps` stands above both.

    Returns:
      The maps.
    """
    given = self._given()
    return {
      name: given.get(name) or chosen.get(name) or self._map(name)
      for name in self.axes
    }

  def layers(self, rule: DepthRule = "interpolate") -> LayerMap:
    """The map of depth.

    Args:
      rule: the method's own, where the config chooses none.

    Returns:
      The map.
    """
    chosen = self.options.layers
    if "layer" in self._file:
      if chosen or self.options.depth or self.options.method == "aki_pro":
        raise errors.UserError(
          f"{self._maps}: layer: expected none beside layers,"
          " depth or method='aki_pro', which say the same"
        )
      given = self._checked("layer", self._file["layer"])
      chosen = tuple(given.source.tolist())
    try:
      if chosen:
        return depth.given(self.old["layer"], self.new["layer"], chosen)
    except errors.UserError as error:
      raise errors.UserError(option(self.path, str(error))) from error
    try:
      make = depth.RULES[self.options.depth or rule]
      return make(self.old["layer"], self.new["layer"])
    except errors.UserError as error:  # it knows its field, and we the path
      raise errors.UserError(f"{self.path}.{error}") from error

  def vocab(self) -> AxisMap | None:
    """The rows of a vocabulary that grows; None where it stays."""
    given = self._given().get("vocab")
    if self.new["vocab"] == self.old["vocab"]:
      return None
    return given or axis_map.padded(
      self.old["vocab"], self.new["vocab"], silent=None
    )

  def noise(self, own: float = 0.0) -> float:
    """The config's `split_noise`, or the method's own."""
    given = self.options.split_noise
    return own if given is None else given

  def _map(self, name: str) -> AxisMap:
    old, new = self.old[name], self.new[name]
    if self.options.width_map == "random":
      return axis_map.random(old, new, name=name, seed=self.seed)
    return axis_map.circular(old, new)

  def _given(self) -> dict[str, AxisMap]:
    """The maps of the user's file, but for `layer`."""
    return {
      name: self._checked(name, rows)
      for name, rows in self._file.items()
      if name != "layer"
    }

  @property
  def _maps(self) -> str:
    return f"{option(self.path, 'maps')}={self.options.maps!r}"

  @functools.cached_property
  def _file(self) -> dict[str, Any]:
    path = self.options.maps
    if not path:
      return {}
    try:
      found = json.loads(epath.Path(path).expanduser().read_text())
    except (OSError, ValueError) as error:
      raise errors.UserError(
        f"{self._maps}: cannot be read: {error}"
      ) from error
    if not isinstance(found, dict):
      raise errors.UserError(f"{self._maps}: expected an object of lists")
    for name in found:
      if name not in FIELDS or name not in self.old:
        known = [axis for axis in FIELDS if axis in self.old]
        raise errors.unknown_name(f"{self._maps}: axis", name, known)
    return found

  def _checked(self, name: str, rows: Any) -> AxisMap:
    what = f"{self._maps}: {name}"
    may_be_none = name == "vocab"  # a new row of the mean
    old, new = self.old[name], self.new[name]
    if not isinstance(rows, list):
      raise errors.UserError(f"{what}: expected a list")
    if len(rows) != new:
      raise errors.UserError(
        f"{what} fills {len(rows)} indices; expected a source index for each of"
        f" the target's {new}"
      )
    for i, row in enumerate(rows):
      if row is None and may_be_none:
        continue
      if type(row) is not int or not 0 <= row < old:
        expected = f"0 to {old - 1}" + (", or null" if may_be_none else "")
        raise errors.UserError(
          f"{what}[{i}]={json.dumps(row)}: expected {expected}"
        )
    source = np.array([EMPTY if row is None else row for row in rows], int)
    moved = np.flatnonzero(source[:old] != np.arange(min(old, new)))
    if name == "vocab" and len(moved):
      i = int(moved[0])
      raise errors.UserError(
        f"{what}[{i}]={rows[i]}: expected {i}; tokens keep their ids, and new"
        " ones stand behind them"
      )
    return AxisMap(source=source, source_size=old)


Method = Callable[[Pair], Growth]


def fpi(pair: Pair) -> Growth:
  return Growth(
    width=pair.widths(),
    layers=pair.layers(),
    vocab=pair.vocab(),
    noise=pair.noise(),
  )


def aki(pair: Pair) -> Growth:
  taking = set(pair.axes)
  if pair.options.aki_residual == "own_layer":
    taking.remove("embed")
  return dataclasses.replace(fpi(pair), from_next_layer=frozenset(taking))


def aki_pro(pair: Pair) -> Growth:
  before, after = pair.old["kv_head"], pair.new["kv_head"]
  if before != after:
    raise errors.UserError(
      f"{pair.path}.num_kv_heads={after}: expected the source's {before};"
      " method='aki_pro' keeps the key/value groups and grows query heads"
      " inside them, method='aki' or 'fpi' can add groups"
    )
  return aki(pair)


def bert2bert(pair: Pair) -> Growth:
  return dataclasses.replace(aki(pair), layers=pair.layers("stack_top"))


def hypercloning(pair: Pair) -> Growth:
  for name in pair.axes:
    field = WIDTH[name]
    old, new = pair.old[name], pair.new[name]
    if new % old:
      raise errors.UserError(
        f"{pair.path}.{field}: {name} grows from {old} to {new}; expected a"
        f" multiple, as {new // old * old or old} or {-(-new // old) * old};"
        " method='hypercloning' copies everything equally often, method='lemon'"
        " is exact at any size"
      )
  # 10 dB between the shares and the noise; HyperCloning, section 4.
  return dataclasses.replace(fpi(pair), noise=pair.noise(10**-0.5))


def lemon(pair: Pair) -> Growth:
  residual = axis_map.padded(
    pair.old["embed"], pair.new["embed"], silent=Role.WRITES
  )
  return Growth(
    width=pair.widths(embed=residual),
    layers=pair.layers("lemon"),
    vocab=pair.vocab(),
    noise=pair.noise(1.0),
  )


def msg(pair: Pair) -> Growth:
  if pair.options.maps:
    raise errors.UserError(
      f"{option(pair.path, 'maps')}={pair.options.maps!r}: expected none;"
      " method='msg' keeps the source in front and masks what stands behind it"
    )
  return Growth(
    width={
      name: axis_map.padded(pair.old[name], pair.new[name], silent=None)
      for name in pair.axes
    },
    layers=pair.layers(),
    vocab=pair.vocab(),
    masked=True,
  )


def ligo(pair: Pair) -> Growth:
  if pair.vocab() is not None:
    raise errors.UserError(
      f"{pair.path}.vocab_size={pair.new['vocab']}: expected the source's"
      f" {pair.old['vocab']}; method='ligo' learns no rows of new tokens"
    )
  return dataclasses.replace(fpi(pair), learned=True)


METHODS: dict[str, Method] = {
  "fpi": fpi,
  "aki": aki,
  "aki_pro": aki_pro,
  "bert2bert": bert2bert,
  "hypercloning": hypercloning,
  "lemon": lemon,
  "msg": msg,
  "ligo": ligo,
}
# What makes no maps of the source.
OTHERS = ("random",)


def find(name: str, *, what: str = "method") -> Method:
  """The method of a name, or of a "module:function".

  Args:
    name: as in `ScaleUp.method`; none of `OTHERS`.
    what: the field or flag that named it, for messages.

  Returns:
    The method.

  Raises:
    errors.UserError: where there is none.
  """
  if name in METHODS:
    return METHODS[name]
  module, colon, function = name.partition(":")
  if not colon:
    raise errors.unknown_name(what, name, [*METHODS, *OTHERS])
  try:
    method = getattr(importlib.import_module(module), function)
  except (ImportError, AttributeError, ValueError) as error:
    raise errors.UserError(f"{what}={name!r}: {error}") from error

  def checked(pair: Pair) -> Growth:
    growth = method(pair) if callable(method) else method
    if not isinstance(growth, Growth):
      raise errors.UserError(
        f"{what}={name!r}: expected a function from a Pair to a Growth; it gave"
        f" a {type(growth).__name__}"
      )
    return growth

  return checked
