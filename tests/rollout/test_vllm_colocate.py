"""Training whose completions vLLM samples in the trainer's process, against plain forwards of each row."""

import json

import pytest
import torch
from peft import LoraConfig
from vllm_runs import BOUND, KINDS, build, one_of_each

from maple_trl.rollout.vllm_colocate import ColocatedGeneration
from maple_trl.trainers.common.run_errors import EngineLostError


pytest.importorskip("vllm", reason="make test-vllm runs these where vLLM is")
pytestmark = [pytest.mark.slow, pytest.mark.vllm]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder of clips and a row of each tag; that of VA has its sound among the pictures of a longer clip."""
    folder = tmp_path_factory.mktemp("clips")
    return folder, one_of_each(folder)


def worst(trainer):
    return max(error for rollout in trainer.worst for error in rollout.values())


def kinds(trainer):
    return {kind for rollout in trainer.worst for kind in rollout}


OPTIONS = {
    "mapo": {"batching": "mixed", "tag_weights": "adaptive", "curriculum": "none"},
    "avatar": {"replayed_generations": 1},
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_what_was_sampled_is_what_is_trained(kind, clips, tmp_path):
    """Towers, language model and head are trained with a large step, so that anything stale would be far off."""
    options = {"output_dir": str(tmp_path), "per_device_train_batch_size": 28, **OPTIONS[kind]}
    trainer = build(kind, *clips, **options)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    assert kinds(trainer) == {"V", "A", "S", "VA+", "VS", "AS", "VAS"}
    assert len(trainer.worst) == 3 and worst(trainer) <= BOUND
    moved = [name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])]
    assert all(any(part in name for name in moved) for part in ("audio_tower", "visual", "language_model"))
    logged = trainer.state.log_history[0]
    assert all(f"tag/{tag}/importance_ratio/mean" in logged for tag in ("all", "V", "VA", "S"))
    ratios = [logged[f"tag/all/importance_ratio/{name}"] for name in ("min", "mean", "max")]
    assert ratios == sorted(ratios)
    if kind == "avatar":
        assert trainer.state.log_history[-2]["replay/share"] > 0


def test_adapters_reach_the_engine(clips, tmp_path):
    adapters = LoraConfig(
        r=4, target_modules=r".*(language_model.*(q_proj|v_proj)|visual.*\.(q|k|v))", init_lora_weights=False
    )
    options = {"output_dir": str(tmp_path), "peft_config": adapters, "per_device_train_batch_size": 28}
    trainer = build("grpo", *clips, **options)
    trainer.train()
    assert len(trainer.worst) == 3 and worst(trainer) <= BOUND


def without(method, instead):
    """Generation of which one method does something else."""
    return type("Faulty", (ColocatedGeneration,), {method: instead})


def use(monkeypatch, generation):
    from maple_trl.trainers.omni_grpo import engines as module

    monkeypatch.setattr(module, "generation_class", lambda mode: generation)


def test_an_engine_with_former_weights_ends_the_run(clips, tmp_path, monkeypatch):
    def only_once(self, weights):
        if getattr(self, "loaded", False):
            for _ in weights:
                pass
        else:
            ColocatedGeneration._load(self, weights)
        self.loaded = True

    use(monkeypatch, without("_load", only_once))
    options = {"output_dir": str(tmp_path), "save_strategy": "no", "per_device_train_batch_size": 28}
    trainer = build("grpo", *clips, **options)
    with pytest.raises(EngineLostError, match="(?s)other weights than the trainer.*checkpoint is in .*checkpoint-1"):
        trainer.train()
    assert (tmp_path / "checkpoint-1" / "trainer_state.json").exists()


def test_a_cache_of_former_features_would_be_seen(clips, tmp_path, monkeypatch):
    """The control of the comparison: towers are trained, clips come again, and vLLM keeps what it made of them."""

    def as_trl_does(self, weights):
        from vllm.model_executor.model_loader.reload.inplace import reload_weights

        reload_weights(
            self._runner.vllm_config,
            self._runner.get_model(),
            weights_iterator=weights,
            weights_path=None,
            is_checkpoint_format=True,
        )
        self.llm.reset_prefix_cache()

    use(monkeypatch, without("_load", as_trl_does))
    options = {"output_dir": str(tmp_path), "per_device_train_batch_size": 28, "learning_rate": 0.05}
    trainer = build("grpo", *clips, **options)
    trainer.train()
    first, *later = trainer.worst
    assert max(first.values()) <= BOUND
    assert max(error for rollout in later for kind, error in rollout.items() if kind != "S") > 100 * BOUND
    assert max(rollout["S"] for rollout in later) <= BOUND


def test_a_scheduler_that_counts_on_lost_features_ends_the_run(clips, tmp_path, monkeypatch):
    """Not a prompt's fault: all of a batch fail, and none of them goes into quarantine."""

    def keep_the_list(self):
        self.llm.reset_prefix_cache()

    use(monkeypatch, without("empty_caches", keep_the_list))
    chosen = clips[1].select([i for i, tag in enumerate(clips[1]["tag"]) if tag in ("V", "A")])
    trainer = build("grpo", clips[0], chosen, output_dir=str(tmp_path), learning_rate=0.05)
    with pytest.raises(EngineLostError, match="failed on each of 2 prompts: .*Encoder cache miss"):
        trainer.train()
    assert json.loads((tmp_path / "quarantine.json").read_text()) == []


def test_a_prompt_that_the_engine_fails_on_is_left_out(clips, tmp_path, monkeypatch):
    """It is tried alone, then quarantined; the others of its batch are sampled and trained on."""
    tried = []

    def break_one(self, rows, counts):
        model = self._runner.get_model()
        embed = model.embed_multimodal

        def embed_or_fail(**inputs):
            if any("video" in name for name in inputs):
                tried.append(len(rows))
                raise RuntimeError("a clip that the engine cannot take")
            return embed(**inputs)

        model.embed_multimodal = embed_or_fail
        try:
            return ColocatedGeneration._run(self, rows, counts)
        finally:
            del model.embed_multimodal

    use(monkeypatch, without("_run", break_one))
    chosen = clips[1].select([i for i, tag in enumerate(clips[1]["tag"]) if tag in ("V", "A", "S", "AS")])
    options = {"output_dir": str(tmp_path), "per_device_train_batch_size": 16, "max_quarantined_share": 1.0}
    trainer = build("grpo", clips[0], chosen, max_steps=2, **options)
    trainer.train()
    assert 1 in tried and kinds(trainer) == {"A", "S", "AS"} and worst(trainer) <= BOUND
    (left_out,) = json.loads((tmp_path / "quarantine.json").read_text())
    assert left_out["reason"] == "engine-failed" and "a clip that the engine cannot take" in left_out["detail"]
    assert trainer.unscorable_completions["V"] == 4


def test_other_tokens_than_those_trained_on_end_the_run(clips, tmp_path, monkeypatch):
    def one_more(self, rows, counts):
        found = ColocatedGeneration._sample(self, rows, counts)
        found[0].token_ids.append(5)
        return found

    use(monkeypatch, without("_sample", one_more))
    trainer = build("grpo", *clips, output_dir=str(tmp_path), per_device_train_batch_size=28)
    with pytest.raises(EngineLostError, match=r"has read \d+ tokens of prompt .* \(tag .*\), which are not the \d+"):
        trainer.train()


def test_half_precision(clips, tmp_path):
    """The engine computes in what the trainer's autocast does; its weights are proven to be the trainer's, rounded."""
    trainer = build("grpo", *clips, output_dir=str(tmp_path), bf16=True, per_device_train_batch_size=28)
    trainer.train()
    assert len(trainer.worst) == 3 and 1e-4 < worst(trainer) < 0.5


def test_a_family_that_vllm_is_not_known_to_serve(clips, tmp_path):
    from tiny_models import save_tiny

    saved = save_tiny("qwen2_audio", tmp_path / "model")
    with pytest.raises(ValueError, match="use_vllm=True: vLLM rollouts are known for .*, not for 'qwen2_audio'"):
        dataset = clips[1].filter(lambda tag: tag == "S", input_columns="tag")
        build("grpo", clips[0], dataset, model=str(saved), trainer=KINDS["grpo"][0], output_dir=str(tmp_path))
