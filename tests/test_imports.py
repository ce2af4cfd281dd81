"""Imports run one way, as docs/architecture.md draws them."""

import ast
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("compiler", "frontend", "kernels", "runtime", "tools")
ALLOWED = {
    "compiler": ("distaff.compiler", "distaff.kernels"),
    "frontend": ("distaff.frontend", "distaff.compiler.ir"),
    "kernels": ("distaff.kernels",),
    "runtime": ("distaff.runtime", "distaff.kernels", "distaff.compiler.artifact"),
    "tools": ("distaff",),
}
PRIVATE_JAX = ("jax._src", "jax.extend", "jax.interpreters", "jax.core", "jaxlib")
REFERENCES = ("torch", "transformers", "flax", "equinox")


def imports(nodes: Iterable[ast.AST]) -> list[tuple[int, str]]:
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.lineno, "relative"))
    return found


def within(name: str, allowed: tuple[str, ...]) -> bool:
    return any(name == a or name.startswith(a + ".") for a in allowed)


@pytest.mark.smoke
@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_run_one_way(folder):
    wrong = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for line, name in imports(ast.walk(ast.parse(path.read_text()))):
            where = f"{path.relative_to(ROOT)}:{line} imports {name}"
            drives = path.parent == ROOT / "tools" / "peers"  # benchmarks run the references as competitors
            reference = within(name, REFERENCES) and not drives
            upwards = within(name, ("distaff",)) and not within(name, ALLOWED[folder])
            private = within(name, PRIVATE_JAX) and path.name != "jax_compat.py"
            if name == "relative" or reference or upwards or private:
                wrong.append(where)
    assert not wrong, "\n".join(wrong)


@pytest.mark.smoke
def test_every_folder_has_code():
    assert all(len(list((ROOT / folder).rglob("*.py"))) > 3 for folder in FOLDERS)


def test_files_of_tests_are_collected_without_the_references():
    at_top = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        top = imports(ast.parse(path.read_text()).body)
        at_top += [f"{path.relative_to(ROOT)}:{line} {name}" for line, name in top if within(name, REFERENCES)]
    assert not at_top, "take these with pytest.importorskip:\n" + "\n".join(at_top)
