"""`maple-trl parity` and `maple-trl vllm-serve`: what they say when they cannot begin."""

import pytest

from maple_trl import cli
from maple_trl.rollout import server


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["parity"], "--model_name_or_path is missing"),
        (["parity", "--model", "x", "--dtype", "int8"], "--dtype must be float32, bfloat16 or float16"),
        (["parity", "--model", "x", "--video", "no.mp4"], "there is no file no.mp4"),
        (["parity", "--model", "x", "--vdeo", "no.mp4"], "--vdeo"),
        (["parity", "--model", "x", "--max_completion_length", "0"], "--max_completion_length must be 1 or more"),
        (["vllm-serve"], "--model_name_or_path is missing"),
        (["vllm-serve", "--model", "x", "--port", "0"], "--port must be a port, got 0"),
        (["vllm-serve", "--model", "x", "--dtype", "int8"], "--dtype must be auto, float32, bfloat16 or float16"),
        (["vllm-serve", "--model", "x", "--max_model_length", "0"], "--max_model_length must be 1 or more"),
        (["vllm-serve", "--model", "x", "--", "--data-parallel-size", "2"], "one process takes the requests"),
        (["vllm-serve", "--model", "x", "--", "--api-server-count=2"], "one process takes the requests"),
    ],
)
def test_mistakes(words, message, capsys):
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err


def test_without_vllm(capsys, monkeypatch):
    monkeypatch.setattr(server, "find_spec", lambda name: None)
    assert cli.main(["vllm-serve", "--model", "builtin:tiny-omni"]) == 2
    assert "pip install 'maple-trl[vllm]'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["parity", "vllm-serve"])
def test_help(name, capsys):
    assert cli.main([name, "--help"]) == 0
    assert "examples:" in capsys.readouterr().out
