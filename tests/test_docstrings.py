"""Docstrings say what is raised, and name attributes that exist."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "fusion_upcycle"
MODULES = {
    str(path.relative_to(PACKAGE)): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
}
#: Errors of users' making; others are invariants, or asked for by Python.
USERS = ("UpcyclingError", "ProofError", "VersionError", "unknown")
Definition = ast.ClassDef | ast.FunctionDef


def public(body: list[ast.stmt]) -> Iterator[Definition]:
    for node in body:
        if isinstance(node, Definition) and (
            not node.name.startswith("_") or node.name in ("__init__", "__post_init__")
        ):
            yield node


def raises(function: Definition) -> bool:
    """Whether it raises users' errors itself, in its own body."""
    raised = (node.exc for node in ast.walk(function) if isinstance(node, ast.Raise))
    calls = [error.func for error in raised if isinstance(error, ast.Call)]
    return any(isinstance(name, ast.Name) and name.id in USERS for name in calls)


def says_so(documented: Definition) -> bool:
    return re.search("Raises|[Rr]efuse", ast.get_docstring(documented) or "") is not None


def test_public_functions_say_what_they_raise() -> None:
    silent = []
    for file, module in MODULES.items():
        for node in public(module.body):
            functions = [node] if isinstance(node, ast.FunctionDef) else public(node.body)
            for function in functions:
                # What a constructor raises, the class says.
                documented = node if function.name.startswith("__") else function
                if raises(function) and not says_so(documented):
                    silent.append(f"{file}:{function.lineno} {function.name}")
    assert not silent


def test_attributes_that_are_documented_exist() -> None:
    missing, seen = [], 0
    for file, module in MODULES.items():
        for node in ast.walk(module):
            if not isinstance(node, ast.ClassDef) or node.bases:  # which may have the attribute
                continue
            section = (ast.get_docstring(node) or "").partition("\nAttributes:\n")[2]
            section = re.split(r"\n\n(?=\S)", section)[0]
            entries = re.findall(r"^    (\w[\w, ]*):", section, re.MULTILINE)
            there = {n.target.id for n in node.body if _is_field(n)}
            there |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
            for name in (name for entry in entries for name in entry.split(", ")):
                seen += 1
                if name not in there:
                    missing.append(f"{file}: {node.name}.{name}")
    assert not missing
    assert seen > 100


def _is_field(node: ast.stmt) -> bool:
    return isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
