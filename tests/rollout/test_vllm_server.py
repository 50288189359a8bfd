"""Training whose completions a vLLM server samples: a real one, killed and started anew in the middle of a run."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest
import requests
import torch
from transformers import TrainerCallback
from vllm_runs import BOUND, build, one_of_each

from maple_trl.rollout.serve_rollouts import STATE, WEIGHTS


pytest.importorskip("vllm", reason="make test-vllm runs these where vLLM is")
pytestmark = [pytest.mark.slow, pytest.mark.vllm]
START = 400.0  # seconds; it takes one or two minutes


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    def __init__(self, folder):
        self.port, self.folder, self.starts = free_port(), folder, 0
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        self.starts += 1
        words = ["vllm-serve", "--model_name_or_path", "builtin:tiny-omni", "--port", str(self.port)]
        words += ["--max_model_length", "1024", "--", "--max-num-seqs", "16"]
        with open(self.folder / f"server-{self.starts}.log", "w") as log:
            command = [sys.executable, "-m", "maple_trl.cli", *words]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def wait(self):
        until = time.monotonic() + START
        while time.monotonic() < until:
            assert self.process.poll() is None, (self.folder / f"server-{self.starts}.log").read_text()[-3000:]
            try:
                return requests.get(self.url + STATE, timeout=5).json()
            except requests.ConnectionError:
                time.sleep(1)
        raise TimeoutError

    def kill(self):
        """As a machine that goes down: nobody says goodbye."""
        for process in [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]:
            process.kill()
        self.process.wait(30)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    server.wait()
    yield server
    if server.process.poll() is None:
        server.process.terminate()
        server.process.wait(60)
    left = [p.pid for p in psutil.process_iter() if p.pid != os.getpid() and "VLLM" in p.name() and p.ppid() == 1]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, "the server has left processes behind"


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return folder, one_of_each(folder)


def make(kind, clips, folder, server, **options):
    where = {"vllm_mode": "server", "vllm_server_base_url": server.url, "vllm_server_timeout": START}
    return build(kind, *clips, output_dir=str(folder), per_device_train_batch_size=28, **where, **options)


def worst(trainer):
    return max(error for rollout in trainer.worst for error in rollout.values())


@pytest.mark.parametrize(
    ("kind", "options"), [("mapo", {"batching": "mixed"}), ("avatar", {"replayed_generations": 1})]
)
def test_what_was_sampled_is_what_is_trained(kind, options, clips, tmp_path, server):
    trainer = make(kind, clips, tmp_path, server, **options)
    trainer.train()
    assert {tag for rollout in trainer.worst for tag in rollout} == {"V", "A", "S", "VA+", "VS", "AS", "VAS"}
    assert len(trainer.worst) == 3 and worst(trainer) <= BOUND


def test_other_paths_are_vllms_own(server):
    assert requests.get(server.url + "/v1/models", timeout=30).json()["data"][0]["id"] == "builtin:tiny-omni"
    answer = requests.post(server.url + WEIGHTS, data=b"no json", timeout=30)
    assert answer.status_code == 400 and "no JSON" in answer.json()["error"]


def test_a_server_that_is_killed_and_comes_back(clips, tmp_path, server):
    """It has the weights of the checkpoint then; the run waits, hands over its own, and ends with the same numbers."""

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                server.kill()
                threading.Timer(2.0, server.start).start()

    weights = []
    for name, callbacks in (("undisturbed", []), ("killed", [Kill()])):
        trainer = make("grpo", clips, tmp_path / name, server, max_steps=2)
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.train()
        assert worst(trainer) <= BOUND
        weights.append({key: value.detach().clone() for key, value in trainer.model.named_parameters()})
    assert server.starts == 2
    # Several requests share the engine's batches in the order in which they come, so that sums differ in the last bits.
    assert all(torch.allclose(value, weights[1][key], atol=1e-4) for key, value in weights[0].items())
