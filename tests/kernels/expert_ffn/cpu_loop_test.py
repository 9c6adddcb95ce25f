"""The loop over blocks in use."""

from __future__ import annotations

from tests.kernels.expert_ffn import contract


class TestCpuLoop(contract.ExpertFfnContract):
  implementation = "cpu_loop"
