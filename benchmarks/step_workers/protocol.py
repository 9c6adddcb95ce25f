"""How a worker is told when to compute: one JSON object a line, both ways.

A worker is a process with cases by name. It computes only between a request and
its answer, so that a parent with many workers has one of them compute at a
time. Only the standard library is imported: a worker may run under another
Python, without this project's packages.

                              -> {"ready": true}, once
  {"start": case}             -> {"seconds": s, "last": x, ...}, of a first step
  {"case": case, "steps": n}  -> {"seconds": s, "last": x}
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

# Takes one step, waits for it, and answers with its loss or 0.
Step = Callable[[], float]
# Makes a step, and says what there is to say of it (versions, parameters).
Start = Callable[[], tuple[Step, dict[str, Any]]]


def serve(cases: Mapping[str, Start]) -> None:
  """Answers requests until standard input ends.

  Args:
    cases: by name; made when a request asks for it.
  """
  # Libraries print what they like: that goes to stderr, and only answers here.
  answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
  os.dup2(2, 1)

  def answer(said: dict[str, Any]) -> None:
    print(json.dumps(said), file=answers, flush=True)

  steps: dict[str, Step] = {}
  answer({"ready": True})
  for line in sys.stdin:
    request = json.loads(line)
    begun = time.perf_counter()
    said: dict[str, Any] = {}
    if "start" in request:
      step, said = cases[request["start"]]()
      begun = time.perf_counter()
      said["last"] = step()
      steps[request["start"]] = step
    else:
      for _ in range(request["steps"]):
        said["last"] = steps[request["case"]]()
    said["seconds"] = time.perf_counter() - begun
    answer(said)


class Worker:
  """A worker as its parent sees it.

  Attributes:
    command: of the process.
    process: the worker's.
  """

  def __init__(self, command: list[str], *, environment: Mapping[str, str]):
    """Starts the process and waits until it has imported what it needs.

    Args:
      command: of a program that calls `serve`.
      environment: variables beside the parent's own.
    """
    self.command = command
    self.process = subprocess.Popen(
      command,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      env={**os.environ, **environment},
      text=True,
    )
    self._answer("its start")

  def start(self, case: str) -> dict[str, Any]:
    """Makes a case and takes its first step."""
    return self._ask({"start": case})

  def run(self, case: str, *, steps: int) -> dict[str, Any]:
    """Takes steps."""
    return self._ask({"case": case, "steps": steps})

  def close(self) -> None:
    """Ends the process."""
    for pipe in (self.process.stdin, self.process.stdout):
      assert pipe is not None
      pipe.close()
    self.process.wait()

  def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
    assert self.process.stdin is not None
    print(json.dumps(request), file=self.process.stdin, flush=True)
    return self._answer(str(request))

  def _answer(self, request: str) -> dict[str, Any]:
    assert self.process.stdout is not None
    line = self.process.stdout.readline()
    if not line:
      self.close()
      raise RuntimeError(f"a worker ended on {request}: {self.command}")
    return json.loads(line)
