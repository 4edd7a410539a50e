"""Acting on a module that somebody else imports."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from otj_runtime.compat.hook import after_import


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module that can be imported and has `value = 1`."""
    (tmp_path / "adapted_package").mkdir()
    (tmp_path / "adapted_package" / "__init__.py").touch()
    (tmp_path / "adapted_package" / "inner.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield "adapted_package.inner"
    for name in [name for name in sys.modules if name.startswith("adapted_package")]:
        del sys.modules[name]


def change(module: ModuleType) -> None:
    module.value += 1  # type: ignore[attr-defined]


def test_a_module_is_changed_before_its_importer_sees_it(module: str) -> None:
    after_import(module, change)
    assert module not in sys.modules
    assert importlib.import_module(module).value == 2


def test_a_module_that_was_imported_before_is_changed_at_once(module: str) -> None:
    imported = importlib.import_module(module)
    after_import(module, change)
    assert imported.value == 2


def test_what_the_change_raises_reaches_the_importer(module: str) -> None:
    def refuse(module: ModuleType) -> None:
        raise LookupError("another version")

    after_import(module, refuse)
    with pytest.raises(LookupError, match="another version"):
        importlib.import_module(module)
