"""Attention by cuDNN: its features on jax's own attention, and its lowering."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aquila_jax.kernels.attention import cudnn
from tests.kernels.attention import contract

ON_GPU = jax.default_backend() == "gpu"


class TestCudnn(contract.AttentionContract):
  """cuDNN on a GPU; elsewhere jax's own attention, of the same arguments."""

  cases = contract.product(length=24, windows=(None, 1, 5))
  dtypes = (jnp.bfloat16,) if ON_GPU else (jnp.bfloat16, jnp.float32)

  @pytest.fixture(autouse=True)
  def _promotion(self):
    """Which jax's own attention relies on."""
    with jax.numpy_dtype_promotion("standard"):
      yield

  def call(self, query, key, value, *, segments, window):
    return cudnn.causal_attention(
      query,
      key,
      value,
      segments=segments,
      window=window,
      implementation="cudnn" if ON_GPU else "xla",
    )


@pytest.mark.parametrize(
  ("length", "head_dim", "features"),
  [
    # C(8, 4) = 70 sets, C(16, 8) = 12870, C(24, 12) = 2704156.
    (70, 64, 8),
    (71, 64, 16),
    (12870, 128, 16),
    (12871, 128, 24),
    # H + d is a multiple of 8: C(4, 2) = 6, C(12, 6) = 924.
    (6, 4, 4),
    (7, 4, 12),
    (925, 4, 20),
  ],
)
def test_so_many_features_tell_so_many_documents_apart(
  length, head_dim, features
):
  assert cudnn.num_features(length, head_dim=head_dim) == features
  assert math.comb(features, features // 2) >= length


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_features_are_exact_and_vanish_within_documents_only(dtype):
  """As many documents as tokens, T = 90, with any numbers."""
  numbers = np.random.default_rng(0).permutation(90) * 1_000_003 - 40_000_000
  rows = jnp.asarray(np.stack([numbers, numbers // 7_000_000]), jnp.int32)
  member = np.asarray(cudnn._members(rows, head_dim=64), np.float64)
  of_query, of_key = (
    np.asarray(jnp.asarray(x).astype(dtype), np.float64)
    for x in (-cudnn._HIDDEN * member, cudnn._HIDDEN * (1 - member))
  )
  products = of_query[:, :, None] * of_key[:, None]
  same = np.asarray(rows)[:, :, None] == np.asarray(rows)[:, None]
  assert not np.any(products[same])
  assert np.all(products[~same].sum(-1) <= -(2.0**24))


@pytest.mark.parametrize("window", [None, 64])
def test_lowers_to_cudnn_forward_and_backward(monkeypatch, window):
  """Without a GPU; T = 256 and H = 64 become no [T, T] of any kind."""
  # Where jax asks what cuDNN there is.
  from jax._src.cudnn import fused_attention_stablehlo

  monkeypatch.setattr(
    fused_attention_stablehlo, "check_cudnn_version", lambda: 91000
  )
  case = contract.Case(length=256, head_dim=64, window=window)
  arguments = contract.inputs(case, jnp.bfloat16)
  rows = jnp.asarray(contract.segments(case))

  def both(query, key, value, upstream):
    call = functools.partial(
      cudnn.causal_attention, segments=rows, window=window
    )
    out, pull = jax.vjp(call, query, key, value)
    return out, pull(upstream)

  lowered: Any = jax.jit(both).trace(*arguments)
  text = lowered.lower(lowering_platforms=("cuda",)).as_text()
  assert "@__cudnn$fmhaSoftmax(" in text
  assert "__cudnn$fmhaSoftmaxBackward" in text
  assert "__cudnn$fmhaScaleBiasSoftmax" not in text
  assert "256x256" not in text
  assert f"sliding_window_length\\22: {window or 0}" in text


class _Device:
  def __init__(self, compute_capability):
    self.compute_capability = compute_capability


@pytest.mark.parametrize(
  ("dtype", "head_dim", "capability", "reason"),
  [
    (
      jnp.float32,
      64,
      "9.0",
      "cudnn needs bfloat16 or float16, not float32",
    ),
    (jnp.bfloat16, 64, "gfx90a", "cudnn needs an NVIDIA GPU, not gfx90a"),
    (
      jnp.bfloat16,
      64,
      "7.5",
      "cudnn needs compute capability 8.0 or later; this is 7.5",
    ),
    (
      jnp.bfloat16,
      128,
      "8.0",
      "cudnn needs heads of at most 128 on compute capability 8.0; H=128, and"
      " 16 more tell documents apart",
    ),
    (
      jnp.bfloat16,
      128,
      "10.0",
      "cudnn needs heads of at most 128 on compute capability 10.0; H=128, and"
      " 16 more tell documents apart",
    ),
    (
      jnp.float16,
      256,
      "9.0",
      "cudnn needs heads of at most 256 on compute capability 9.0; H=256, and"
      " 16 more tell documents apart",
    ),
    (jnp.bfloat16, 128, "9.0", None),
    (jnp.bfloat16, 112, "8.6", None),
  ],
)
def test_what_it_cannot_do_is_refused(
  monkeypatch, dtype, head_dim, capability, reason
):
  monkeypatch.setattr(jax, "local_devices", lambda: [_Device(capability)])
  query = jnp.zeros((1, 2048, 1, 2, head_dim), dtype)
  if reason is None:
    cudnn.check(query)
    return
  with pytest.raises(NotImplementedError) as error:
    cudnn.check(query)
  assert str(error.value) == reason
