"""`maple-trl parity` for the families whose rollouts vLLM makes on a CPU, and an engine that is wrong."""

import json

import pytest
from vllm_runs import BOUND, save_wide

from maple_trl import cli


pytest.importorskip("vllm", reason="make test-vllm runs these where vLLM is")
pytestmark = [pytest.mark.slow, pytest.mark.vllm]


@pytest.mark.parametrize("family", ["builtin:tiny-omni", "qwen2_5_omni", "qwen2_5_vl"])
def test_trainer_and_engine_are_the_same(family, tmp_path, capsys):
    model = family if ":" in family else save_wide(family, tmp_path / "model")
    assert cli.main(["parity", "--model", model, "--json", str(tmp_path / "parity.json")]) == 0
    table = {row["kind"]: row for row in json.loads((tmp_path / "parity.json").read_text())}
    fed = {"V", "S", "image", "image V", "text"}
    fed |= {"A", "VA", "VA interleaved", "image VA interleaved"} if "omni" in family else set()
    assert {kind for kind, row in table.items() if row["applies"]} == fed
    for kind in fed:
        row = table[kind]
        assert row["same_ids"] and row["problem"] is None and row["tokens"] > 0
        assert (row["image_tokens"] > 0) == ("image" in kind)
        assert max(row["logps"], row["logps_after"]) <= BOUND
        assert (row["features"] is not None) == (kind not in ("S", "text")) and (row["features"] or 0) < 1e-5
    shown = capsys.readouterr().out
    assert "against engine" in " ".join(shown.split())


def test_pictures_that_are_normalised_twice_are_seen(tmp_path, monkeypatch):
    """The negative control: vLLM's own default for this family."""
    from dataclasses import replace

    from maple_trl.rollout import engine_models

    known = engine_models.ENGINE_MODELS["qwen2_5_vl"]
    monkeypatch.setitem(engine_models.ENGINE_MODELS, "qwen2_5_vl", replace(known, switched_off=()))
    model = save_wide("qwen2_5_vl", tmp_path / "model")
    assert cli.main(["parity", "--model", model, "--json", str(tmp_path / "parity.json")]) == 1
    table = {row["kind"]: row for row in json.loads((tmp_path / "parity.json").read_text())}
    for kind in ("V", "image"):
        assert "log-probabilities differ" in table[kind]["problem"] and table[kind]["features"] > 0.1
    assert table["text"]["problem"] is None
