"""Options that transformers and TRL offer every trainer, and that GRPO would take for something else, or for nothing."""

import pytest
import torch
from datasets import Dataset
from omni_runs import DEFAULTS, spread_reward
from tiny_models import save_tiny

from maple_trl import (
    AvatarConfig,
    AvatarTrainer,
    MAPOConfig,
    OmniGRPOConfig,
    OmniGRPOTrainer,
    OmniSFTConfig,
    OmniSFTTrainer,
)
from maple_trl.trainers.common.arguments import check_compared_set


GRPO = {"grpo": OmniGRPOConfig, "mapo": MAPOConfig, "avatar": AvatarConfig}
BEST = {
    "load_best_model_at_end": True,
    "save_strategy": "steps",
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_steps": 2,
}
REFUSED = [
    ({"data_seed": 3}, "data_seed=3 has no effect: seed decides the order"),
    ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy='group_by_length' has no effect"),
    ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 has no effect"),
    ({"neftune_noise_alpha": 5}, "neftune_noise_alpha=5 is for supervised training"),
    ({"max_completion_length": None}, "max_completion_length must be a number"),
    ({"accelerator_config": {"split_batches": True}}, "accelerator_config.split_batches must stay False"),
    ({"accelerator_config": {"dispatch_batches": True}}, "accelerator_config.dispatch_batches must stay False"),
    ({"gradient_checkpointing_kwargs": {"every_n_layers": 2}}, "every_n_layers does not last"),
    ({"activation_checkpointing_kwargs": {"offload": True}}, "offload does not last"),
    (BEST | {"metric_for_best_model": "eval_loss"}, "load_best_model_at_end compares by metric_for_best_model"),
    (
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"},
        r"Set metric_for_best_model: reward, and lr_scheduler_kwargs: \{mode: max\}",
    ),
    ({"loss_type": "cispo"}, "epsilon_high=0.2 with loss_type='cispo'"),
]


@pytest.mark.parametrize("kind", GRPO)
@pytest.mark.parametrize(("options", "told"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_would_do_something_else_is_refused(kind, options, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        GRPO[kind](**(DEFAULTS | options | {"output_dir": str(tmp_path)}))


def test_a_bound_of_replayed_ratios_is_refused_too(tmp_path):
    options = DEFAULTS | {"output_dir": str(tmp_path), "loss_type": "cispo", "epsilon_high": 5.0, "num_generations": 8}
    assert AvatarConfig(**options).replay_epsilon_high is None
    with pytest.raises(ValueError, match="replay_epsilon_high=0.3 with loss_type='cispo'"):
        AvatarConfig(**options, replay_epsilon_high=0.3)


@pytest.mark.parametrize("kind", GRPO)
def test_models_are_compared_by_their_reward(kind, tmp_path):
    args = GRPO[kind](**(DEFAULTS | BEST | {"output_dir": str(tmp_path), "num_generations": 8}))
    assert (args.metric_for_best_model, args.greater_is_better) == ("reward", True)
    supervised = OmniSFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **BEST)
    assert (supervised.metric_for_best_model, supervised.greater_is_better) == ("loss", False)  # a likelihood


ROWS = Dataset.from_list(
    [{"prompt": [{"role": "user", "content": "which"}], "subtitle": f"word {i}", "tag": "S"} for i in range(8)]
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_tiny("qwen2_5_omni", tmp_path_factory.mktemp("model"))


COMPARING = [
    BEST | {"metric_for_best_model": "reward"},
    {"save_strategy": "best", "eval_strategy": "steps", "metric_for_best_model": "reward"},
    {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "metric_for_best_model": "reward"},
]


@pytest.mark.parametrize("config", [OmniGRPOConfig, OmniSFTConfig])
@pytest.mark.parametrize("options", COMPARING)
def test_what_compares_models_names_one_of_several_evaluation_sets(config, options, tmp_path):
    common = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "eval_steps": 2, "save_steps": 2}
    args = config(**(common | options))
    check_compared_set(args, ROWS)
    check_compared_set(config(**common), {"one": ROWS, "two": ROWS})  # compares nothing
    for names in (("one", "two"), ("eval_one", "eval_two")):
        rows = dict.fromkeys(names, ROWS)
        with pytest.raises(ValueError, match=f"set it to eval_{names[0]}_reward or eval_{names[1]}_reward"):
            check_compared_set(args, rows)
        args.metric_for_best_model = f"eval_{names[0]}_reward"
        check_compared_set(args, rows)
        args.metric_for_best_model = "reward"


@pytest.mark.parametrize("trainer", [OmniGRPOTrainer, OmniSFTTrainer])
def test_trainers_look_whose_metric_is_meant(trainer, path, tmp_path):
    config = {OmniGRPOTrainer: OmniGRPOConfig, OmniSFTTrainer: OmniSFTConfig}[trainer]
    args = config(output_dir=str(tmp_path), use_cpu=True, bf16=False, **BEST)
    with pytest.raises(ValueError, match="of several evaluation sets each has its own"):
        trainer(str(path), args=args, train_dataset=ROWS, eval_dataset={"one": ROWS, "two": ROWS})


@pytest.mark.parametrize("config", [*GRPO.values(), OmniSFTConfig])
@pytest.mark.parametrize("name", ["gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"])
def test_checkpointing_stays_the_kind_that_it_is(config, name, tmp_path):
    """torch takes the reentrant one for a mapping that does not say which."""
    args = config(output_dir=str(tmp_path), use_cpu=True, bf16=False, **{name: {"preserve_rng_state": False}})
    settled = {"preserve_rng_state": False, "use_reentrant": False}
    assert args.gradient_checkpointing_kwargs == settled == args.activation_checkpointing_kwargs
    args = config(output_dir=str(tmp_path), use_cpu=True, bf16=False, **{name: {"use_reentrant": True}})
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": True}


@pytest.mark.slow
def test_replay_trains_with_options_of_checkpointing(path, tmp_path):
    """The gradients of both terms are asked for by themselves, which the reentrant kind refuses."""
    options = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"preserve_rng_state": False},
        "replayed_generations": 2,
        "replay_gradient_steps": 1,
        "max_completion_length": 4,
        "max_steps": 3,
    }
    args = AvatarConfig(**(DEFAULTS | options | {"output_dir": str(tmp_path)}))
    trainer = AvatarTrainer(str(path), spread_reward, args, ROWS)
    trainer.train()
    assert trainer.state.global_step == 3 and any(
        "replay/gradient" in key for e in trainer.state.log_history for key in e
    )


@pytest.mark.slow
def test_completions_that_end_at_a_string_are_not_cut(path, tmp_path):
    words = sorted({chr(c) for c in range(97, 123)})
    options = {"max_completion_length": 12, "max_steps": 1, "generation_kwargs": {"stop_strings": words}}
    args = OmniGRPOConfig(**(DEFAULTS | options | {"output_dir": str(tmp_path)}))
    trainer = OmniGRPOTrainer(str(path), spread_reward, args, ROWS)
    seen = []
    generate = trainer._generate

    def watched(prompts):
        found = generate(prompts)
        seen.extend(found[1])
        return found

    trainer._generate = watched
    trainer.train()
    [entry] = [entry for entry in trainer.state.log_history if "loss" in entry]
    lengths = torch.tensor([len(ids) for ids in seen])
    ends = {*trainer.eos_token_ids, trainer._tokenizer.pad_token_id}
    cut = torch.tensor([len(ids) == 12 and ids[-1] not in ends for ids in seen])
    assert any(len(ids) < 12 and ids[-1] not in ends for ids in seen)
    assert entry["completions/clipped_ratio"] == pytest.approx(cut.float().mean().item())
    assert entry["completions/mean_terminated_length"] == pytest.approx(lengths[~cut].float().mean().item())
