"""What compare_hf refuses; its agreement with torch is in tests/parity."""

from __future__ import annotations

import pytest

from tests.cli.commands import names


@pytest.fixture
def without_torch(commands, tmp_path):
  """The commands where torch cannot be imported, installed or not."""
  (tmp_path / "stub").mkdir()
  (tmp_path / "stub" / "torch.py").write_text("raise ImportError('none')\n")
  return commands.with_environment(PYTHONPATH=str(tmp_path / "stub"))


def test_refused(without_torch, dense, tmp_path):
  empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
  empty.write_text("\n \n")
  binary.write_bytes(b"\xff\xfe\xff")
  reference = tmp_path / "reference"
  reference.mkdir()
  taken = tmp_path / "taken.json"
  taken.write_text("{}")
  compare = (
    *("compare_hf", f"--model={dense}", f"--reference={reference}"),
    "--continue_tokens=8",
  )
  without_torch.assert_refused(
    {
      "no reference": (
        ("compare_hf", f"--model={dense}"),
        "--reference must be given; --help lists the flags",
      ),
      "a reference that is not there": (
        (*compare, f"--reference={tmp_path}/none"),
        f"--reference='{tmp_path}/none': there is no such file",
      ),
      "no torch": (
        compare,
        "a comparison needs the packages torch and transformers; install them"
        " with: pip install -e .[parity]",
      ),
      "a model that is not there": (
        (*compare, f"--model={tmp_path}/none"),
        f"--model='{tmp_path}/none': there is no such directory",
      ),
      "an output that is taken": (
        (*compare, f"--output={taken}"),
        f"--output='{taken}': it exists; choose another",
      ),
      "no text in the file": (
        (*compare, f"--text_file={empty}"),
        f"--text_file='{empty}': there is no text in it",
      ),
      "no file of texts": (
        (*compare, f"--text_file={tmp_path}/none.txt"),
        f"--text_file='{tmp_path}/none.txt': cannot be read: No such file or"
        " directory",
      ),
      "a file that is no text": (
        (*compare, f"--text_file={binary}"),
        f"--text_file='{binary}': cannot be read: 'utf-8' codec can't decode"
        " byte 0xff in position 0: invalid start byte",
      ),
      "a continuation longer than the context": (
        (*compare, "--continue_tokens=64"),
        "--continue_tokens=64: expected fewer than the MODEL's"
        " context_length=64",
      ),
      "a tolerance below 0": (
        (*compare, "--tolerance=-1"),
        "--tolerance=-1: -1.0 is not a non-negative number",
      ),
    }
  )
  assert names(tmp_path) == [
    "binary.txt",
    "empty.txt",
    "reference",
    "stub",
    "taken.json",
  ]
