"""The compiler's grouped matmul."""

from __future__ import annotations

from tests.kernels.expert_ffn import contract


class TestRaggedDot(contract.ExpertFfnContract):
  implementation = "ragged_dot"
