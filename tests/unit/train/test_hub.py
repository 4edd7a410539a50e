"""Pushing a trained model, to a server that speaks the hub's protocol."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.hub import hf_api

from otj_runtime import GRPOConfig, GRPOTrainer
from otj_runtime.data.model import build_tiny


class Hub(BaseHTTPRequestHandler):
    """Takes every file as part of a commit; remembers the last commit's files and message."""

    files: dict[str, bytes]
    message: str

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        url = f"http://127.0.0.1:{self.server.server_address[1]}/me/model"
        if self.path.endswith("/repos/create"):
            self._answer({"url": url, "name": "me/model", "id": "1"})
        elif self.path.endswith("/validate-yaml"):
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self._answer({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})
        elif "/commit/" in self.path:
            self._commit([json.loads(line) for line in body.splitlines()])
            self._answer({"commitUrl": f"{url}/commit/1", "commitOid": "1", "success": True})
        else:
            self.send_error(404, self.path)

    def _commit(self, parts: list[dict[str, Any]]) -> None:
        Hub.message = next(part["value"]["summary"] for part in parts if part["key"] == "header")
        added = [part["value"] for part in parts if part["key"] == "file"]
        Hub.files = {file["path"]: base64.b64decode(file["content"]) for file in added}

    def _answer(self, document: dict[str, Any]) -> None:
        data = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(hf_api(), "endpoint", f"http://127.0.0.1:{server.server_address[1]}")
    yield Hub
    server.shutdown()
    server.server_close()


def constant(completions: list[str], **_: Any) -> list[float]:
    return [1.0] * len(completions)


def test_the_hub_gets_the_model_and_its_card_and_nothing_else_of_the_output_folder(hub: type[Hub], tmp_path: Path) -> None:
    build_tiny(tmp_path / "tiny")
    output = tmp_path / "output"
    args = GRPOConfig(
        output_dir=str(output),
        use_cpu=True,
        per_device_train_batch_size=8,
        max_completion_length=2,
        max_steps=1,
        save_steps=1,
        push_to_hub=True,
        hub_model_id="me/model",
        hub_token="hf_made_up",
    )
    trainer = GRPOTrainer(str(tmp_path / "tiny"), constant, args=args, train_dataset=[{"prompt": "abc"}, {"prompt": "bcd"}])
    trainer.train()
    trainer.push_to_hub(dataset_name="letters")
    assert (output / "checkpoint-1").exists()
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= hub.files.keys()
    assert not any("/" in name or "checkpoint" in name or name.endswith(".jsonl") for name in hub.files)
    assert hub.message == "End of training"
    card = hub.files["README.md"].decode()
    assert "# me/model" in card
    assert "- prompts: letters" in card
