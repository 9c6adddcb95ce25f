from __future__ import annotations

import time

import jax
import numpy as np
import pytest

from aquila_jax.training import throughput


@pytest.mark.parametrize(
  "kind, teraflops",
  [
    ("TPU v4", 275),
    ("TPU v5 lite", 197),
    ("TPU v5e", 197),
    ("TPU v5", 459),
    ("TPU v5p", 459),
    ("TPU v6 lite", 918),
    ("TPU v6e", 918),
    ("TPU7x", 1153.5),
    ("NVIDIA H100 80GB HBM3", 989),
    ("NVIDIA H100 PCIe", 756),
    ("NVIDIA H200", 989),
    ("NVIDIA A100-SXM4-80GB", 312),
  ],
)
def test_known_peaks(kind, teraflops):
  assert throughput.known_peak_flops(kind) == teraflops * 1e12


def test_known_peaks_count_the_devices(monkeypatch):
  monkeypatch.setattr(throughput, "known_peak_flops", lambda kind: 989e12)
  assert throughput.peak_flops(jax.devices()[:4]) == 4 * 989e12


def test_simulated_devices_of_a_cpu_share_one_measured_peak():
  assert throughput.known_peak_flops("cpu") is None
  devices = jax.devices()
  assert throughput.peak_flops(devices) == throughput.peak_flops(devices[:1])


def test_the_measured_peak_is_near_that_of_numpy():
  measured = throughput.measure_matmul_flops(jax.devices()[0])
  matrix = np.ones((512, 512), np.float32)
  best = 0.0
  for _ in range(5):
    start = time.perf_counter()
    np.matmul(matrix, matrix)
    best = max(best, 2 * 512**3 / (time.perf_counter() - start))
  # Other libraries, threads and a busy machine: the order of magnitude.
  assert best / 30 < measured < best * 30
