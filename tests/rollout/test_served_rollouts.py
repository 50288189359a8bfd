"""Training whose completions a server samples: what is asked of it, and what becomes of the run when it fails."""

import json

import pytest
import torch
from datasets import Dataset
from jobs.runner import Job, changes, facts, weights, write_inputs
from PIL import Image
from stand_in_server import StandIn
from tiny_models import save_tiny
from vllm_runs import BOUND, build, one_of_each

from maple_trl.omni.loading import load_model
from maple_trl.rollout.engine import EngineError
from maple_trl.trainers.common.run_errors import EngineLostError


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return folder, one_of_each(folder)


def run(kind, clips, folder, server, resume=None, **options):
    """Train two steps, of all rows each, and return the trainer and its weights."""
    where = {"vllm_mode": "server", "vllm_server_base_url": server.url, "vllm_server_timeout": 5.0}
    options = {"per_device_train_batch_size": 28, "max_steps": 2, "max_completion_length": 4, **where, **options}
    trainer = build(kind, *clips, output_dir=str(folder), **options)
    trainer.train(resume)
    return trainer, {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def worst(trainer):
    return max(error for rollout in trainer.worst for error in rollout.values())


def equal(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def undisturbed(clips, tmp_path_factory):
    with StandIn() as server:
        trainer, weights = run("grpo", clips, tmp_path_factory.mktemp("undisturbed"), server)
        assert (server.syncs, server.asked) == (2, 14) and worst(trainer) <= BOUND
        return weights


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("mapo", {"batching": "mixed", "tag_weights": "adaptive"}),
        ("avatar", {"replayed_generations": 1, "max_steps": 3, "tas_lambda": 0.5}),
        ("avatar", {"replayed_generations": 2, "max_steps": 3, "vllm_importance_sampling_mode": "token_truncate"}),
    ],
)
@pytest.mark.matrix(cases=1)
def test_what_was_sampled_is_what_is_trained(kind, options, clips, tmp_path):
    with StandIn() as server:
        trainer, _ = run(kind, clips, tmp_path, server, **options)
    assert worst(trainer) <= BOUND and server.syncs == len(trainer.worst) == trainer.args.max_steps
    logged = trainer.state.log_history[0]
    assert all(
        f"tag/{tag}/importance_ratio/{name}" in logged for tag in ("all", "VA", "S") for name in ("min", "clipped")
    )
    assert not (tmp_path / "engine_weights").exists()


@pytest.mark.long
def test_a_server_that_was_started_anew_is_given_the_weights(clips, tmp_path, undisturbed):
    """It has those of the checkpoint, and says so; the run ends with the same numbers."""
    with StandIn() as server:

        def forget(number, row):
            if number == 9:  # in the second step
                server.version = None

        server.choose = forget
        trainer, weights = run("grpo", clips, tmp_path, server)
        assert server.syncs == 3 and worst(trainer) <= BOUND
    assert equal(weights, undisturbed)


def test_a_prompt_that_fails_once_is_asked_for_again(clips, tmp_path, undisturbed):
    with StandIn(choose=lambda number, row: RuntimeError("once") if number in (3, 12) else None) as server:
        _, weights = run("grpo", clips, tmp_path, server)
        assert server.asked == 16
    assert equal(weights, undisturbed)


@pytest.mark.long
@pytest.mark.parametrize(
    ("instead", "reason"),
    [(RuntimeError("no such codec"), "RuntimeError: no such codec"), (9.0, "no answer within 4 seconds")],
)
@pytest.mark.matrix(cases=1)
def test_a_prompt_that_fails_twice_is_left_out(instead, reason, clips, tmp_path):
    """Its completions count nowhere, it goes into quarantine, and the run says so."""
    tags = clips[1]["tag"]
    Image.new("RGB", (56, 84), "red").save(clips[0] / "seen.png")
    rows = [
        {**row, "image": None} if row["tag"] != "V" else {**row, "image": "seen.png", "video": None}
        for row in clips[1]
    ]
    clips = clips[0], Dataset.from_list(rows)

    def choose(number, row):
        return instead if set(row.items) == {"image"} and len(row.token_ids) == shown else None

    with StandIn() as server:
        probe = build("grpo", *clips, output_dir=str(tmp_path / "probe"), use_vllm=False)
        shown = len(probe.encode_rows([clips[1][tags.index("V")]])[1][0])
        server.choose = choose
        trainer, _ = run("grpo", clips, tmp_path, server, vllm_request_timeout=4.0, max_quarantined_share=0.5)
    (left_out,) = json.loads((tmp_path / "quarantine.json").read_text())
    assert left_out["reason"] == "engine-failed" and left_out["detail"] == reason and left_out["path"] == "seen.png"
    assert trainer.unscorable_completions["V"] == 4 and "V" not in trainer.worst[0]
    assert any("engine-failed" in note["text"] for note in trainer.left_out())


@pytest.mark.long
def test_a_run_whose_server_breaks_goes_on_from_where_it_stopped(clips, tmp_path, undisturbed):
    with StandIn(choose=lambda number, row: 500 if number >= 8 else None) as server:
        with pytest.raises(
            EngineLostError, match="answered /maple_trl/sample with 500.*checkpoint is in .*checkpoint-1"
        ):
            run("grpo", clips, tmp_path, server)
        server.choose = lambda number, row: None
        _, weights = run("grpo", clips, tmp_path, server, resume=True)
    assert equal(weights, undisturbed)
    at_first = load_model(str(tmp_path / "checkpoint-1"), dtype="float32")
    assert not equal(dict(at_first.named_parameters()), weights)


def test_a_server_that_keeps_its_weights_ends_the_run(clips, tmp_path):
    with StandIn() as server:
        take, taken = server.take, []
        server.take = lambda folder: taken.append(folder) if taken else (taken.append(folder), take(folder))
        with pytest.raises(EngineLostError, match="other weights than the trainer in: .*language model"):
            run("grpo", clips, tmp_path, server)


def test_other_tokens_end_the_run(clips, tmp_path):
    with StandIn() as server:
        complete = server.complete
        server.complete = lambda row, *rest: (complete(row, *rest), row.token_ids.append(5))[0]
        with pytest.raises(EngineLostError, match=r"has read \d+ tokens of prompt .*, which are not the \d+"):
            run("grpo", clips, tmp_path, server)


def test_where_there_is_no_such_server(clips, tmp_path):
    """Known before the first step."""
    with StandIn() as server:
        where = {"vllm_server_base_url": server.url + "/elsewhere"}
        with pytest.raises(
            EngineError, match="is no server for rollouts of maple_trl: start it with `maple-trl vllm-serve`"
        ):
            run("grpo", clips, tmp_path, server, **where)
        with pytest.raises(
            EngineError, match="serves a model of type qwen2_5_omni_thinker; the trained one is a qwen2_5_vl"
        ):
            model = str(save_tiny("qwen2_5_vl", tmp_path / "model"))
            dataset = clips[1].filter(lambda tag: tag == "S", input_columns="tag")
            run("grpo", (clips[0], dataset), tmp_path, server, model=model, per_device_train_batch_size=4)
    with pytest.raises(EngineError, match="was not to be reached for 1 seconds"):
        run("grpo", clips, tmp_path, server, vllm_server_timeout=1.0)


@pytest.mark.long
def test_ranks_share_a_server_and_its_end(tmp_path):
    """Each sends its own prompts; one hands over the weights; what one is told ends all, at the same step."""
    rows = write_inputs(tmp_path)
    with StandIn(str(tmp_path / "model")) as server:
        server.choose = lambda number, row: 500 if server.syncs == 4 and number % 2 else None
        where = {
            "use_vllm": True,
            "vllm_mode": "server",
            "vllm_server_base_url": server.url,
            "vllm_server_timeout": 20.0,
        }
        options = {**where, "max_steps": 2, "save_strategy": "no", "max_completion_length": 4}
        runs = [{"name": name, "options": options} for name in ("whole", "broken")]
        out = Job(2, tmp_path, "out", rows, runs).wait()
    assert server.syncs == 4
    assert all(facts(out, "whole", rank)["error"] is None for rank in (0, 1))
    one, other = (weights(out, "whole", rank) for rank in (0, 1))
    assert equal(one, other) and any(value.abs().max() > 0 for value in changes(out, "whole").values())
    told = [facts(out, "broken", rank)["error"] for rank in (0, 1)]
    assert all("answered /maple_trl/sample with 500" in text and "Stopped after step 1" in text for text in told)
