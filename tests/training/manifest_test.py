from __future__ import annotations

import json
import zlib

import pytest
from etils import epath

from aquila_jax.training import manifest


@pytest.fixture
def step(tmp_path) -> epath.Path:
  """As a save leaves it: two files, the manifest, and Orbax's two."""
  path = epath.Path(tmp_path) / "7"
  (path / "state").mkdir(parents=True)
  (path / "state/w").write_bytes(b"weights")
  (path / "empty").write_bytes(b"")
  manifest.write(path)
  mark = json.dumps({"custom_metadata": manifest.MARK})
  (path / "_CHECKPOINT_METADATA").write_text(mark)
  (path / "commit_success.txt").write_text("")
  return path


def test_a_step_as_it_was_saved_has_no_fault(step):
  assert manifest.fault(step) is None
  assert not manifest.is_of_before(step)
  written = json.loads((step / "MANIFEST.json").read_text())
  assert written["files"] == {
    "empty": [0, 0],
    "state/w": [7, zlib.crc32(b"weights")],
  }


@pytest.mark.parametrize(
  "file, content, fault",
  [
    ("state/w", b"weight", "state/w has 6 bytes instead of 7"),
    ("state/w", None, "state/w is missing"),
    (
      "state/w",
      b"Weights",
      f"state/w has the CRC-32 {zlib.crc32(b'Weights'):08x} instead of"
      f" {zlib.crc32(b'weights'):08x}",
    ),
    ("empty", None, "empty is missing"),
    ("state/v", b"", "state/v is not of this step"),
    ("MANIFEST.json", None, "MANIFEST.json is missing"),
    ("MANIFEST.json", b"{", "MANIFEST.json is no JSON"),
    ("MANIFEST.json", b"\xff", "MANIFEST.json is no JSON"),
    ("MANIFEST.json", b"[]", "MANIFEST.json is no JSON object"),
    (
      "MANIFEST.json",
      b'{"files": {}, "crc32": 0}',
      "MANIFEST.json differs from its own checksum",
    ),
    ("_CHECKPOINT_METADATA", None, "_CHECKPOINT_METADATA is missing"),
    ("_CHECKPOINT_METADATA", b"", "_CHECKPOINT_METADATA is no JSON"),
    ("commit_success.txt", None, "commit_success.txt is missing"),
  ],
)
def test_what_was_damaged_is_named(step, file, content, fault):
  if content is None:
    (step / file).unlink()
  else:
    (step / file).write_bytes(content)
  assert manifest.fault(step) == fault
  assert not manifest.is_of_before(step)


def test_files_are_read_in_parts(step, monkeypatch):
  monkeypatch.setattr(manifest, "_CHUNK_BYTES", 3)
  assert manifest.fault(step) is None
  (step / "state/w").write_bytes(b"weightS")
  assert manifest.fault(step) is not None


def test_a_step_of_an_earlier_version_says_so(step):
  (step / "MANIFEST.json").unlink()
  (step / "_CHECKPOINT_METADATA").write_text('{"custom_metadata": {}}')
  assert manifest.is_of_before(step)
