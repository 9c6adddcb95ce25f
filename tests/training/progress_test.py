from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from aquila_jax.training.progress import Reporter, duration


def _row(step, loss: float | None = 2.5):
  return {"step": step, "loss": loss, "tokens_per_s": 1234.5}


def test_plain_lines_where_there_is_no_terminal(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(time, "perf_counter", lambda: now[0])
  out = io.StringIO()
  console = Console(file=out, force_terminal=False)
  with Reporter("dense", total_steps=100, step=10, console=console) as reporter:
    now[0] = 20.0  # 10 steps in 20 s leave 80 steps in 160 s
    reporter.advance(20)
    reporter.show(_row(20))
    reporter.show(_row(20, loss=None))
    reporter.show_validation(20, loss=3.0)
  assert out.getvalue() == (
    "dense: step 20/100  loss 2.5000  1,234 tokens/s  2:40 left\n"
    "dense: step 20/100  loss -  1,234 tokens/s  2:40 left\n"
    "dense: step 20/100  validation loss 3.0000\n"
  )


def test_a_bar_on_a_terminal():
  out = io.StringIO()
  console = Console(file=out, force_terminal=True, width=100)
  with Reporter("dense", total_steps=100, console=console) as reporter:
    reporter.advance(20)
    reporter.show(_row(20))
  text = out.getvalue()
  for part in ("dense", "20/100", "loss 2.5000", "1,234 tokens/s"):
    assert part in text, part


@pytest.mark.parametrize(
  "seconds, text",
  [(0.4, "0:00"), (59.6, "1:00"), (3599.0, "59:59"), (3723.0, "1:02:03")],
)
def test_duration(seconds, text):
  assert duration(seconds) == text
