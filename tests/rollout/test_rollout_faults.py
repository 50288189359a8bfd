"""What would go wrong silently with an engine of other weights, or with rows that it or the trainer leaves out."""

import json
import time

import pytest
import torch
from aiohttp import web
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from stand_in_server import StandIn
from vllm_runs import BOUND, build, one_of_each

from maple_trl.omni.loading import load_model
from maple_trl.rollout import vllm_generation
from maple_trl.rollout.engine import EngineError, WrongWeightsError
from maple_trl.rollout.engine_models import engine_weights
from maple_trl.rollout.merged_weights import places
from maple_trl.rollout.vllm_generation import OmniVLLMGeneration
from maple_trl.trainers.common.hinted_rows import prompt_key
from maple_trl.trainers.common.run_errors import EngineLostError


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return folder, one_of_each(folder)


@pytest.fixture(scope="module")
def texts(clips):
    return clips[0], clips[1].select([clips[1]["tag"].index("S")] * 2)


def make(kind, clips, folder, server, **options):
    where = {"vllm_mode": "server", "vllm_server_base_url": server.url, "vllm_server_timeout": 5.0}
    options = {"max_steps": 2, "max_completion_length": 4, **where, **options}
    return build(kind, *clips, output_dir=str(folder), **options)


def worst(trainer):
    return max(error for rollout in trainer.worst for error in rollout.values())


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def equal(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_second_run_of_one_step(texts, tmp_path):
    """Both roll out at step 0, the second one with the weights that the first has trained."""
    with StandIn() as server:
        trainer = make("grpo", texts, tmp_path, server, max_steps=1)
        trainer.train()
        trainer.train()
    assert len(trainer.worst) == 2 and worst(trainer) <= BOUND


def test_the_best_model_is_what_answers_afterwards(texts, tmp_path):
    """Its step is another, though the number of the last step stays."""
    with StandIn() as server:
        trainer = make("grpo", texts, tmp_path, server, max_steps=2)
        trainer.train()
        other = make("grpo", texts, tmp_path / "other", server, max_steps=1, use_vllm=False)
        other.save_model(str(tmp_path / "best"))
        trainer.generate_completions([texts[1][0]])
        trainer.state.best_model_checkpoint = str(tmp_path / "best")
        trainer._load_best_model()
        assert equal(weights(trainer), weights(other))
        trainer.generate_completions([texts[1][0]])
        assert equal(dict(server.model.named_parameters()), weights(other))


def test_an_answer_that_the_engine_fails_on_is_none(clips, tmp_path):
    with StandIn(choose=lambda number, row: RuntimeError("no such codec") if row.items else None) as server:
        trainer = make("grpo", clips, tmp_path, server)
        rows = [clips[1][i] for i in range(len(clips[1])) if clips[1]["tag"][i] in ("V", "S")]
        answers = trainer.generate_completions(rows)
    tags = [row["tag"] for row in rows]
    assert answers[tags.index("V")] is None and isinstance(answers[tags.index("S")], str)


def failed_at_once(completions, **kwargs):
    return [0.0] * len(completions)


@pytest.mark.parametrize("hinted", [True, False])
def test_a_prompt_on_which_the_engine_fails_leaves_with_what_is_stored_of_it(hinted, clips, tmp_path):
    """With its hint or without, and by the end of the step: a resumed run would not have its completions either."""
    row = clips[1][clips[1]["tag"].index("S")]
    asked = [[{"role": "user", "content": text}] for text in ("which word is it", "which letter is it")]
    rows = [
        {**row, "prompt": prompt, "hint": hint} for prompt, hint in zip(asked, ("quartz zebra", None), strict=True)
    ]
    options = {"replayed_generations": 2, "replay_scope": "prompt", "max_steps": 3}
    options |= {"hints": True, "hint_visits": 1} if hinted else {}  # at the third visit
    clips = clips[0], Dataset.from_list(rows)
    with StandIn() as server:
        trainer = make("avatar", clips, tmp_path, server, reward=failed_at_once, learning_rate=0.0, **options)
        tokenizer = trainer.processing_class.tokenizer

        def choose(number, row):
            text = tokenizer.decode(row.token_ids)
            fails = "zebra" in text if hinted else "which word" in text and number > 4
            return RuntimeError("no such codec") if fails else None

        server.choose = choose
        trainer.train()
    key = trainer.prompt_builder.spec(rows[0]).key
    (left_out,) = json.loads((tmp_path / "quarantine.json").read_text())
    assert left_out | {"key": key, "rows": [0], "reason": "engine-failed"} == left_out
    assert trainer.state.log_history[-2]["replay/discarded"] == 6  # of the two visits before
    assert [prompt_key(stored) == key for stored in trainer.memory.buffer.prompts()] == [False]


def informative_half(completions, tag, **kwargs):
    return [
        sum(map(ord, c[0]["content"])) % 11 / 11 if t in ("V", "S") else 0.5
        for c, t in zip(completions, tag, strict=True)
    ]


@pytest.mark.long
@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
@pytest.mark.matrix(cases=1)
def test_completions_that_are_dropped_have_no_ratio(mode, clips, tmp_path):
    """Their log-probabilities under the policy are not computed."""
    options = {"batching": "mixed", "dynamic_sampling": "early", "max_steps": 1, "per_device_train_batch_size": 28}
    with StandIn() as server:
        trainer = make(
            "mapo", clips, tmp_path, server, reward=informative_half, vllm_importance_sampling_mode=mode, **options
        )
        trainer.train()
    logged = trainer.state.log_history[0]
    assert trainer.tally.counts["dropped_groups"] >= 5 and "tag/A/importance_ratio/mean" not in logged
    # Random models put some weight on media tokens, which the engine cannot sample.
    assert 0.5 < logged["tag/all/importance_ratio/min"] <= logged["tag/all/importance_ratio/max"] <= 1 + BOUND
    assert logged["sampling/sampling_logp_difference/max"] < 0.5


def test_an_engine_is_compared_once_there_is_a_completion_to_compare(clips, tmp_path, monkeypatch):
    """All groups of the first rollout are dropped, and with them what the policy makes of them."""
    with StandIn() as server:
        complete, seen = server.complete, []

        def of_another_model(row, count, sampling):
            return [[ids, [logp - 1.0 for logp in logps]] for ids, logps in complete(row, count, sampling)]

        def alike_at_first(completions, **_):
            seen.append(len(completions))
            return [0.5 if len(seen) == 1 else i % 4 / 4 for i in range(len(completions))]

        options = {"batching": "mixed", "dynamic_sampling": "early", "max_steps": 3, "per_device_train_batch_size": 28}
        trainer = make("mapo", clips, tmp_path, server, reward=alike_at_first, **options)
        monkeypatch.setattr(server, "complete", of_another_model)
        with pytest.raises(EngineLostError, match=r"differ from the trainer's by \d\.\d\d on average"):
            trainer.train()
    assert len(seen) == 2 and trainer.state.global_step == 1


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("mapo", {"batching": "stratified", "tag_weights": "adaptive", "per_device_train_batch_size": 4}),
        ("mapo", {"batching": "mixed", "dynamic_sampling": "early", "refill_rounds": 1}),
        ("avatar", {"replayed_generations": 2}),
    ],
)
@pytest.mark.matrix(cases=1)
def test_a_rollout_that_was_lost_is_made_again(kind, options, clips, tmp_path):
    """What was drawn for it, and what its first rounds have told, is as if it had not begun."""
    reward = informative_half if "dynamic_sampling" in options else None
    options = {"max_steps": 4, "per_device_train_batch_size": 8} | options | ({"reward": reward} if reward else {})
    ends = []
    for name in ("undisturbed", "broken"):
        with StandIn() as server:
            trainer = make(kind, clips, tmp_path / name, server, **options)
            if name == "broken":
                last = ends[0][1]
                server.choose = lambda number, row, last=last: 500 if number == last else None
                with pytest.raises(EngineLostError, match="checkpoint is in .*checkpoint-[123]"):
                    trainer.train()
                server.choose = lambda number, row: None
                trainer = make(kind, clips, tmp_path / name, server, **options)
                trainer.train(resume_from_checkpoint=True)
            else:
                trainer.train()
            ends.append((weights(trainer), server.asked))
    assert equal(ends[0][0], ends[1][0])


def test_a_prompt_that_leaves_no_room_for_a_whole_completion(clips, tmp_path):
    """VLLM would cut its completions shorter than the others without a word."""
    with StandIn() as server:
        server.model_length = 176
        options = {"per_device_train_batch_size": 28, "max_quarantined_share": 1.0, "max_steps": 1}
        trainer = make("grpo", clips, tmp_path, server, **options)
        trainer.train()
    assert set(trainer.worst[0]) == {"V", "A", "S", "VS", "AS", "VAS"}
    (left_out,) = json.loads((tmp_path / "quarantine.json").read_text())
    assert "177 tokens and a completion of 4 do not fit into 176 (vllm_max_model_length" in left_out["detail"]


def test_a_server_that_computes_in_another_precision(texts, tmp_path):
    """Its weights are the trainer's, rounded to what it holds."""
    with StandIn() as server:
        server.model.to(torch.bfloat16)
        trainer = make("grpo", texts, tmp_path, server)
        trainer.train()
    assert BOUND < worst(trainer) < 0.5


@pytest.mark.parametrize(
    ("fault", "message"), [("slow", "has not answered .*weights within 1 s"), ("400", "with 400")]
)
def test_weights_that_are_not_taken(fault, message, texts, tmp_path):
    """The run ends as one whose engine is lost, and leaves no copy of the weights behind."""
    with StandIn() as server:
        give = server.take

        def refuse(folder):
            if fault == "slow":
                time.sleep(3)
                return give(folder)
            raise web.HTTPBadRequest(text="no weights in there")

        server.take = refuse
        trainer = make("grpo", texts, tmp_path, server, vllm_server_timeout=1.0)
        with pytest.raises(EngineLostError, match=message):
            trainer.train()
    assert not (tmp_path / "engine_weights").exists()


def test_weights_that_cannot_be_written(texts, tmp_path):
    """Adapters are merged for the transfer alone, however it ends."""
    (tmp_path / "engine_weights").write_text("in the way")
    adapters = LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|v_proj)", init_lora_weights=False)
    with StandIn() as server:
        trainer = make("grpo", texts, tmp_path, server, peft_config=adapters)
        with pytest.raises(EngineLostError, match="weights could not be written for the server: .*engine_weights"):
            trainer.train()
    layers = [module for module in trainer.model.modules() if hasattr(module, "merged")]
    assert layers and not any(layer.merged for layer in layers)


def test_a_server_of_something_else(texts, tmp_path):
    with StandIn() as server:
        server.facts = "<html>welcome</html>"
        with pytest.raises(EngineError, match="is no server for rollouts of maple_trl"):
            make("grpo", texts, tmp_path, server)


def test_two_runs_on_one_server(texts, tmp_path):
    """Each notices that it is not asking its own model; one that cannot have the server for itself ends."""
    with StandIn() as server:
        trainer = make("grpo", texts, tmp_path, server)

        def taken_over(number, row):
            server.version = "another run's"

        server.choose = taken_over
        with pytest.raises(EngineLostError, match="another run uses it, which takes a server of its own"):
            trainer.train()


@pytest.mark.parametrize("own", [EngineError("broken"), WrongWeightsError("other weights"), None])
def test_ranks_go_on_or_end_together(own, monkeypatch):
    """Giving weights anew is a collective call: no rank may begin it where another ends the run."""
    others = [EngineError("broken"), WrongWeightsError("other weights")]
    monkeypatch.setattr(vllm_generation, "gather_object", lambda found: [*others, *found])

    def act():
        if own is not None:
            raise own

    with pytest.raises(EngineError) as raised:
        OmniVLLMGeneration._agreeing(None, act)
    assert type(raised.value) is EngineError


def test_adapters_over_nccl(texts, tmp_path):
    """What comes over the wire is merged, also at first, when the server is told names and shapes."""
    adapters = LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|v_proj)", init_lora_weights=False)
    with StandIn() as server:
        trainer = make("grpo", texts, tmp_path, server, peft_config=adapters, max_steps=1)
        generation = trainer.vllm_generation
        generation._over_nccl = True
        generation._nccl = Wire(server)
        trainer.train()
    assert worst(trainer) <= BOUND


def test_an_adapter_that_is_trained_on_leaves_its_base_alone(texts, tmp_path):
    """In half precision, with a reference of its own, which has modules that no engine knows."""
    base = load_model("builtin:tiny-omni", dtype="bfloat16")
    targets = r".*language_model.*(q_proj|v_proj)"
    adapters = LoraConfig(r=4, lora_alpha=16, target_modules=targets, modules_to_save=["language_model.norm"])
    own = {name: value.detach().clone() for name, value in base.named_parameters()}
    with StandIn() as server:
        server.model.to(torch.bfloat16)
        trainer = make("grpo", texts, tmp_path, server, model=get_peft_model(base, adapters), beta=0.1, max_steps=3)
        assert set(trainer.model.peft_config) == {"default", "ref"}
        trainer.train()
        there = dict(server.model.named_parameters())
    assert server.syncs == len(trainer.worst) == 3 and worst(trainer) < 0.5
    left = {place.name: place for place in places(trainer.model.get_base_model())}
    assert set(left) - set(own) == {"lm_head.weight"}  # which is the embedding
    whole_module = "model.language_model.norm.weight"
    assert [name for name in own if not torch.equal(left[name].weight, own[name])] == [whole_module]
    # The engine has what the third rollout began with: merged layers, and the module as it was trained by then.
    moved = {name for name, value in there.items() if not torch.equal(value, own[name])}
    merged = {name for name, place in left.items() if place.layers and name.endswith(".weight")}
    assert moved == merged | {whole_module}


class Wire:
    """Stands in for TRL's client: weights reach the server one by one."""

    def __init__(self, server):
        self.server = server

    def update_named_params(self, metadata, weights):
        shapes = {name: shape for name, _, shape in metadata}
        own = dict(
            zip((n for n, _ in self._named()), (v for _, v in self.server.model.named_parameters()), strict=True)
        )
        with torch.no_grad():
            for name, value in weights:
                assert list(value.shape) == shapes.pop(name)
                if name in own:  # the head is the embedding, which came before
                    own[name].copy_(value)
        assert not shapes

    def _named(self):
        return engine_weights(self.server.model.named_parameters(), self.server.known, None)
