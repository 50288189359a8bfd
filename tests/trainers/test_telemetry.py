"""Nothing about a run is sent anywhere unless the environment asks for it."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from datasets import Dataset
from huggingface_hub import constants
from huggingface_hub.utils import _telemetry
from omni_runs import QUIET_ON_CPU, spread_reward
from tiny_models import build_tiny

from maple_trl import (
    AvatarConfig,
    AvatarTrainer,
    MAPOConfig,
    MAPOTrainer,
    OmniGRPOConfig,
    OmniGRPOTrainer,
    OmniSFTConfig,
    OmniSFTTrainer,
)


@pytest.fixture
def hub(monkeypatch):
    """Stands where the Hub does, and notes what it is asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            """Quiet."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    # As of a process in whose environment nothing is said, neither for nor against.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    for name in ("CI", "HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    yield asked
    server.shutdown()


KINDS = {
    "omni_grpo": (OmniGRPOTrainer, OmniGRPOConfig),
    "mapo": (MAPOTrainer, MAPOConfig),
    "avatar": (AvatarTrainer, AvatarConfig),
    "omni_sft": (OmniSFTTrainer, OmniSFTConfig),
}
ROWS = [
    {
        "prompt": [{"role": "user", "content": f"which {i}"}],
        "subtitle": f"cat {i}",
        "tag": "S",
        "solution": "A",
        "completion": "A",
    }
    for i in range(8)
]


def make(kind, folder):
    trainer, config = KINDS[kind]
    model, processor = build_tiny("qwen2_5_omni")
    group = {} if kind == "omni_sft" else {"num_generations": 2}
    group |= {"replayed_generations": 1, "advantage_group": "mixed"} if kind == "avatar" else {}
    args = config(
        output_dir=str(folder), media_root=str(folder), per_device_train_batch_size=2, **group, **QUIET_ON_CPU
    )
    rewards = {} if kind == "omni_sft" else {"reward_funcs": spread_reward}
    rows = Dataset.from_list(ROWS)
    rows = rows if kind == "omni_sft" else rows.remove_columns("completion")
    trainer(model, args=args, train_dataset=rows, processing_class=processor, **rewards)
    _telemetry._TELEMETRY_QUEUE.join()


@pytest.mark.parametrize("kind", KINDS)
def test_no_trainer_sends_anything(kind, hub, tmp_path):
    make(kind, tmp_path)
    assert hub == []


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_sent_where_the_environment_asks_for_it(kind, hub, tmp_path, monkeypatch):
    """The control: what the test above would see."""
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
    make(kind, tmp_path)
    assert hub == ["/api/telemetry/trl/other"]


@pytest.mark.parametrize("value", ["", "1", "true", "yes", "ON"])
def test_other_values_do_not_ask_for_it(value, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", value)
    make("omni_grpo", tmp_path)
    assert hub == []
