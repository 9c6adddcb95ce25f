"""The plain XLA backend."""

from __future__ import annotations

from tests.kernels.expert_ffn import contract


class TestXla(contract.ExpertFfnContract):
  implementation = "xla"
