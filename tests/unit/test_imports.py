"""What tests share stands in tests/support: no test module or conftest is imported by another."""

from __future__ import annotations

import ast

from tests.support.paths import ROOT


def imported_tests(source: str) -> list[str]:
    """Test modules that a source imports, dotted."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [name for name in names if _is_test_module(name.split("."))]
    return found


def _is_test_module(parts: list[str]) -> bool:
    names = parts[1:] if parts[0] == "tests" else []
    return any(name == "conftest" or name.startswith("test_") for name in names)


def test_an_import_of_a_test_module_is_found() -> None:
    assert imported_tests("from tests.unit.a.test_b import C")
    assert imported_tests("def f():\n    from tests.system.conftest import D\n")
    assert imported_tests("from tests.unit.a import test_b")
    assert imported_tests("import tests.unit.test_b")
    assert not imported_tests("from tests.support.stack import Stack\nimport test_b")


def test_no_test_module_is_imported_by_another() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for name in imported_tests(path.read_text())
    ]
    assert not wrong, "\n".join(wrong)
