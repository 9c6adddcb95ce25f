"""Rewrites tests/golden/configs: python -m tests.golden.update."""

from __future__ import annotations

from tests.golden import resolved


def main() -> None:
  """Writes a file for every config and removes those of configs that left."""
  for path in resolved.GOLDEN.glob("*.txt"):
    path.unlink()
  for name in resolved.names():
    path = resolved.GOLDEN / f"{name}.txt"
    path.write_text(resolved.text(name), encoding="utf-8")
    print(path.relative_to(resolved.ROOT))


if __name__ == "__main__":
  main()
