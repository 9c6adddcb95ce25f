"""The command of lm-evaluation-harness, which knows the model `aquila`.

  python -m aquila_jax.cli.harness --model aquila --model_args model=MODEL \
    --tasks hellaswag [...]

All flags are the harness's own, and so is what it prints and writes. For the
tasks that come with this package: --include_path aquila_jax/evaluation/tasks.
"""

from __future__ import annotations

import sys

from aquila_jax.core import errors
from aquila_jax.evaluation import harness
from aquila_jax.training.compilation import enable_compilation_cache


def main() -> None:
  try:
    harness.model_class()
    enable_compilation_cache()
    harness.command()
  except errors.UserError as error:
    print(f"aquila_jax: {error}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
  main()
