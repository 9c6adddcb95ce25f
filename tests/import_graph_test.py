"""Imports point one way, and only at what setup.py installs."""

from __future__ import annotations

import ast
import pathlib
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# From the top down: a package imports from tiers below its own.
TIERS = (
  {"cli"},
  {"pipeline"},
  {
    "growth",
    "data",
    "training",
    "evaluation",
    "generation",
    "interop",
    "planning",
  },
  {"models"},
  {"layers"},
  {"kernels", "sharding"},
  {"core"},
)
# Edges inside a tier.
SIDEWAYS = {
  ("training", "data"),
  ("evaluation", "generation"),
  ("evaluation", "data"),
}
# Modules outside any package, which everybody may import.
FREE = {"version"}

# Import name -> name in setup.py, where they differ.
DISTRIBUTIONS = {
  "absl": "absl-py",
  "ml_collections": "ml-collections",
  "orbax": "orbax-checkpoint",
}
# Imported inside functions only, from extras.
OPTIONAL = {"datasets", "lm_eval", "torch", "transformers", "triton"}


def _tier(package: str) -> int:
  return next(i for i, tier in enumerate(TIERS) if package in tier)


def _allowed(package: str, imported: str) -> bool:
  if imported in FREE | {package}:
    return True
  return (package, imported) in SIDEWAYS or _tier(imported) > _tier(package)


def _imports(tree: ast.AST) -> Iterator[str]:
  """The dotted names that a module imports, one `from` name at a time."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, "imports are absolute"
      assert node.module is not None
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _parsed(folder: str) -> Iterator[tuple[str, ast.Module]]:
  for path in sorted((ROOT / folder).rglob("*.py")):
    text = path.read_text(encoding="utf-8")
    yield path.relative_to(ROOT).as_posix(), ast.parse(text)


def _module_names() -> set[str]:
  """Every module and package of aquila_jax, dotted."""
  names = set()
  for path, _ in _parsed("aquila_jax"):
    parts = path.removesuffix(".py").split("/")
    names.update(".".join(parts[: i + 1]) for i in range(len(parts)))
  return names


def _edges() -> Iterator[tuple[str, str, str]]:
  """(file, its package, imported package) inside aquila_jax."""
  for path, tree in _parsed("aquila_jax"):
    parts = path.split("/")
    if len(parts) == 2:  # aquila_jax/version.py and the table of contents
      continue
    for name in _imports(tree):
      if name.startswith("aquila_jax."):
        yield path, parts[1], name.split(".")[1]


def test_every_package_has_a_tier():
  packages = {
    path.name
    for path in (ROOT / "aquila_jax").iterdir()
    if path.is_dir() and any(path.rglob("*.py"))
  }
  assert packages <= set().union(*TIERS)


def test_imports_point_one_way():
  wrong = [
    f"{path} imports aquila_jax.{imported}"
    for path, package, imported in _edges()
    if not _allowed(package, imported)
  ]
  assert wrong == []


@pytest.mark.parametrize(
  ("package", "imported", "allowed"),
  [
    ("cli", "core", True),
    ("training", "data", True),
    ("data", "training", False),
    ("growth", "models", True),
    ("models", "growth", False),
    ("growth", "training", False),
    ("layers", "kernels", True),
    ("kernels", "sharding", False),
    ("core", "version", True),
    ("core", "layers", False),
  ],
)
def test_rule(package, imported, allowed):
  assert _allowed(package, imported) == allowed


def test_modules_do_not_import_each_other_in_a_circle():
  modules = _module_names()
  graph: dict[str, set[str]] = {}
  for path, tree in _parsed("aquila_jax"):
    own = path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    found = set()
    for name in _imports(tree):
      # `from a.b import c` names a module a.b.c, or c inside the module a.b.
      known = name if name in modules else name.rpartition(".")[0]
      if known in modules and known != own:
        found.add(known)
    graph[own] = found
  done: set[str] = set()

  def visit(module: str, trail: tuple[str, ...]):
    assert module not in trail, " -> ".join((*trail, module))
    if module in done:
      return
    for imported in graph.get(module, ()):
      visit(imported, (*trail, module))
    done.add(module)

  for module in graph:
    visit(module, ())


def test_configs_import_ml_collections_and_nothing_else():
  for path, tree in _parsed("experiments/configs"):
    top = {name.split(".")[0] for name in _imports(tree)}
    assert top <= {"__future__", "ml_collections"}, path


def test_package_never_imports_its_tests_or_experiments():
  for path, tree in _parsed("aquila_jax"):
    top = {name.split(".")[0] for name in _imports(tree)}
    assert not top & {"tests", "experiments", "benchmarks"}, path


def test_imports_stand_at_the_top_but_for_optional_dependencies():
  hidden = []
  for path, tree in _parsed("aquila_jax"):
    for function in ast.walk(tree):
      if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
        hidden += [
          f"{path}: {name}"
          for name in _imports(function)
          if name.split(".")[0] not in OPTIONAL
        ]
  assert sorted(set(hidden)) == []


def test_everything_imported_is_installed_by_setup_py():
  setup = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
  (dependencies,) = (
    ast.literal_eval(node.value)
    for node in setup.body
    if isinstance(node, ast.Assign)
    and isinstance(node.targets[0], ast.Name)
    and node.targets[0].id == "_DEPENDENCIES"
  )
  installed = {
    requirement.split(">")[0].split("[")[0] for requirement in dependencies
  }
  local = {"aquila_jax", *sys.stdlib_module_names}
  imported = {
    name.split(".")[0]
    for _, tree in _parsed("aquila_jax")
    for name in _imports(tree)
  }
  needed = {
    DISTRIBUTIONS.get(name, name) for name in imported - local - OPTIONAL
  }
  assert needed <= installed
