"""Models come from folders; what cannot be loaded is one line, not a traceback."""

from __future__ import annotations

import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from nabla_rl.models.loading import (
    PolicyOptions,
    RewardOptions,
    _check_hub,
    load_classifier,
    load_policy,
    resolve_dtype,
)
from nabla_rl.types import UserError
from tests import toys_hf as toys

CPU = torch.device("cpu")


def test_a_saved_model_comes_back_the_same(tmp_path: Path):
    """Policy and classifier from a folder give the logits of the models that were saved, in the type asked for."""
    policy, model = toys.build_llama(), toys.build_classifier()
    for name, saved in (("policy", policy), ("reward", model)):
        saved.save_pretrained(tmp_path / name)
        toys.tokenizer().save_pretrained(tmp_path / name)
    loaded = load_policy(str(tmp_path / "policy"), dtype="float64", device=CPU)
    assert loaded.backbone.weight.dtype == torch.float64
    assert loaded.encode_prompt("cab") == toys.policy().encode_prompt("cab")
    ids = torch.tensor([[4, 5, 6]])
    torch.testing.assert_close(
        loaded.backbone.model(input_ids=ids).logits.float(), policy(input_ids=ids).logits, atol=1e-5, rtol=1e-5
    )
    judge, tokenizer = load_classifier(str(tmp_path / "reward"), RewardOptions(), device=CPU)
    assert tokenizer.get_vocab() == toys.tokenizer().get_vocab()
    torch.testing.assert_close(judge(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_folder_without_a_model_is_refused(tmp_path: Path):
    """A path without config.json, an unknown name and a model without a tokenizer each name their argument."""
    with pytest.raises(UserError, match="^policy.name: expected a model folder"):
        load_policy(PolicyOptions(name=str(tmp_path)), device=CPU)
    with pytest.raises(UserError, match="^reward.name: expected a folder, a Hub name"):
        load_classifier("no-such-model", RewardOptions(), device=CPU)
    toys.build_llama().save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="expected a tokenizer beside"):
        load_policy(str(tmp_path / "bare"), device=CPU)


def test_auto_is_float32_off_the_gpu():
    """The automatic type is bfloat16 on a GPU and float32 elsewhere."""
    assert resolve_dtype("auto", CPU) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16


def online(monkeypatch, address: str) -> None:
    """The Hub is taken to be there."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("nabla_rl.models.loading.hf_hub_url", lambda name, file: f"{address}/{name}/resolve/{file}")


def test_a_wrong_name_without_a_connection_is_refused_within_seconds(monkeypatch):
    """Left to the libraries it would be asked for anew for most of a minute, and then for a tokenizer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]  # nobody listens there
    online(monkeypatch, f"http://127.0.0.1:{port}")
    start = time.perf_counter()
    with pytest.raises(
        UserError, match=rf"found 'nobody/none', .* cannot be reached \(http://127.0.0.1:{port}: "
    ) as e:
        load_policy("nobody/none", device=CPU, argument="teacher")
    assert time.perf_counter() - start < 10
    assert str(e.value).startswith("teacher.name: expected a folder, a Hub name or an embedded model")


def test_what_the_hub_answers_is_left_to_the_libraries(monkeypatch):
    """One question; there and missing names both go on to them."""
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_response(200 if "there" in self.path else 404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        online(monkeypatch, f"http://127.0.0.1:{server.server_port}")
        for name in ("there", "missing"):
            _check_hub("model.x", name)
    finally:
        server.shutdown()
        server.server_close()
    assert asked == ["/there/resolve/config.json", "/missing/resolve/config.json"]


def test_what_is_in_the_cache_is_not_asked_for(monkeypatch, tmp_path):
    folder = tmp_path / "models--some--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (folder / "snapshots" / ("0" * 40) / "config.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    online(monkeypatch, "http://127.0.0.1:1")
    monkeypatch.setattr("nabla_rl.models.loading.get_hf_file_metadata", lambda url: pytest.fail("asked"))
    _check_hub("model.x", "some/model")
