"""docs/parity.md, out of what the parity tests recorded.

python -m tests.parity.page RECORDS   lines of JSON; writes the results first
python -m tests.parity.page           out of benchmarks/results/parity.json
"""

from __future__ import annotations

import datetime
import json
import pathlib
import sys
from typing import Any

from aquila_jax import version

_HERE = pathlib.Path(__file__).resolve()
_ROOT = _HERE.parents[2]
RESULTS = _ROOT / "benchmarks" / "results" / "parity.json"
PAGE = _ROOT / "docs" / "parity.md"

_SECTIONS = (
  "pretrained",
  "another language",
  "imported",
  "exported",
  "upcycled",
  "QKV bias and experts",
)
# Of which the differences are reported without a limit.
UNLIMITED = "another language"
_COLUMNS = (
  "model",
  "options",
  "texts",
  "tokens",
  "largest difference",
  "same best token",
  "same continuation",
)


def report(lines: list[str]) -> dict[str, Any]:
  """The results file of a whole run."""
  records = [json.loads(line) for line in lines]
  missing = set(_SECTIONS) - {row["section"] for row in records}
  if missing:
    sys.exit(f"not a whole run, nothing is written: no {sorted(missing)}")
  versions = {"aquila_jax": version.VERSION} | records[0]["versions"]
  for row in records:
    del row["versions"]
  return {
    "date": datetime.date.today().isoformat(),
    "device": "CPU, float32",
    "versions": versions,
    # Processes record in no order.
    "records": sorted(
      records,
      key=lambda row: (
        _SECTIONS.index(row["section"]),
        row["model"],
        row["options"],
      ),
    ),
  }


def render(results: dict[str, Any]) -> str:
  """The page of a results file."""
  records = results["records"]
  limited = [row for row in records if row["section"] != UNLIMITED]
  values = {
    "date": results["date"],
    "device": results["device"],
    "versions": ", ".join(f"{k} {v}" for k, v in results["versions"].items()),
    "count": str(len(limited)),
    "largest": f"{max(row['largest_difference'] for row in limited):.1e}",
  }
  for section in _SECTIONS:
    rows = [row for row in records if row["section"] == section]
    values[section] = "\n".join(
      [_line(_COLUMNS), "|---|---|--:|--:|--:|--:|--:|", *map(_row, rows)]
    )
  text = _HERE.with_name("page.md").read_text(encoding="utf-8")
  for name, value in values.items():
    text = text.replace("{" + name + "}", value)
  return text


def _row(row: dict[str, Any]) -> str:
  ties = row["ties"]
  return _line(
    (
      row["model"].removesuffix("ForCausalLM"),
      row["options"],
      str(row["texts"]),
      f"{row['tokens']:,}",
      f"{row['largest_difference']:.1e}",
      f"{row['same_best']:,} of {row['decided']:,}",
      f"{row['continued_same']:,} of {row['continued']:,}"
      + (f"; {ties} at a tie" if ties else ""),
    )
  )


def _line(cells: tuple[str, ...]) -> str:
  return f"| {' | '.join(cells)} |"


def main(arguments: list[str]) -> None:
  if arguments:
    lines = pathlib.Path(arguments[0]).read_text(encoding="utf-8").splitlines()
    text = json.dumps(report(lines), indent=2) + "\n"
    RESULTS.write_text(text, encoding="utf-8")
  results = json.loads(RESULTS.read_text(encoding="utf-8"))
  PAGE.write_text(render(results), encoding="utf-8")


if __name__ == "__main__":
  main(sys.argv[1:])
