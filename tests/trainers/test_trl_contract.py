"""The private parts of TRL that the trainers rely on: a new TRL that moves one fails here, by name."""

import ast
import importlib.metadata
import inspect
import math
from collections import deque

import pytest
import torch
from accelerate.utils import is_peft_model
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import base_trainer, grpo_trainer
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import RepeatSampler, shuffle_sequence_dict, split_tensor_dict


SIGNATURES = {
    "_get_train_sampler": ["self", "dataset"],
    "_set_signature_columns_if_needed": ["self"],
    "_prepare_inputs": ["self", "generation_batch"],
    "_tokenize_prompts": ["self", "prompts"],
    "_generate_single_turn": [
        "self",
        "prompt_ids",
        "images",
        "multimodal_fields",
        "num_generations",
        "has_tool_images",
    ],
    "_generate": ["self", "prompts"],
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "training_step": ["self", "model", "inputs", "num_items_in_batch"],
    "_get_grad_norm": ["self", "model", "grad_norm"],
    "set_initial_training_values": ["self", "args", "dataloader"],
    "_init_training_state": [
        "self",
        "max_steps",
        "num_update_steps_per_epoch",
        "num_train_epochs",
        "resume_from_checkpoint",
        "trial",
    ],
    "_generate_and_score_completions": ["self", "inputs"],
    "_compute_loss": ["self", "model", "inputs"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_load_best_model": ["self"],
    "_save_rng_state": ["self", "output_dir"],
    "_save": ["self", "output_dir", "state_dict"],
    "create_model_card": ["self", "model_name", "dataset_name", "tags"],
    "init_hf_repo": ["self", "token", "private"],
    "_push_from_checkpoint": ["self", "checkpoint_folder"],
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    method = inspect.unwrap(getattr(GRPOTrainer, name))
    assert list(inspect.signature(method).parameters) == SIGNATURES[name], f"TRL changed GRPOTrainer.{name}"


def test_logps_signature_begins_as_we_call_it():
    method = inspect.unwrap(GRPOTrainer._get_per_token_logps_and_entropies)
    names = list(inspect.signature(method).parameters)
    assert names[:6] == ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"]


def source(name):
    return inspect.getsource(inspect.unwrap(getattr(GRPOTrainer, name)))


def test_the_log_prob_loop_only_calls_its_model_with_keywords():
    """`_forward_with_media` stands in for the model there, and takes the rows chunk by chunk, in order."""
    body = source("_get_per_token_logps_and_entropies")
    assert "outputs = model(**model_inputs, labels=labels, fused_lm_head=True)" in body
    assert body.count("model(") == 1
    assert 'model_inputs = {"input_ids": input_ids_batch, "attention_mask": attention_mask_batch}' in body


def test_multimodal_tensors_reach_generate_unchanged():
    body = source("_generate_single_turn")
    assert "if isinstance(v, torch.Tensor):\n                    generate_inputs[k] = v" in body


def test_rewards_can_be_known_before_the_passes_over_the_completions():
    """Dynamic sampling scores what `_generate` returns, and spares dropped groups the passes that come after it."""
    body = source("_generate_and_score_completions")
    assert body.index("= self._generate(prompts)") < body.index("self._get_per_token_logps_and_entropies(")
    assert "= self._calculate_rewards(inputs, prompts, completions, completion_ids_list)" in body
    assert (
        inspect.getsource(inspect.unwrap(GRPOTrainer._generate))
        .rstrip()
        .endswith(
            "return prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields, images, tool_images"
        )
    )


def test_the_losses_are_linear_in_the_size_of_the_advantage():
    """`_fold_weights` lets the weight of a row stand in its advantage, and undoes these divisors."""
    body = source("_compute_loss")
    assert 'normalizer = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes' in body
    assert "normalizer * self.current_gradient_accumulation_steps / self.args.steps_per_generation" in body
    assert "loss = ((per_token_loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()" in body


def test_the_trainer_ends_an_epoch_where_it_is_told_to():
    body = inspect.getsource(Trainer._run_epoch)
    assert "if self.control.should_epoch_stop or self.control.should_training_stop:" in body
    assert inspect.getsource(Trainer._inner_training_loop).count("set_initial_training_values(") == 1


def test_a_float32_head_is_found_where_text_models_have_their_embedding():
    body = inspect.getsource(GRPOTrainer.__init__)
    assert "target_model.model.embed_tokens.register_forward_hook" in body


def test_user_generation_kwargs_replace_the_suppressed_tokens():
    body = inspect.getsource(GRPOTrainer.__init__)
    suppress = body.index('generation_kwargs["suppress_tokens"] = [model.config.image_token_id]')
    assert suppress < body.index("generation_kwargs.update(args.generation_kwargs)")
    assert "create_model_from_path(get_config_model_id(self.model.config)" in body
    assert hasattr(grpo_trainer, "create_model_from_path")


def test_a_list_of_objects_stays_with_its_rows():
    prompts = [object() for _ in range(8)]
    batch = {"prompt_ids": torch.arange(8)[:, None], "num_items_in_batch": torch.tensor(3.0), "omni_prompts": prompts}
    shuffled = shuffle_sequence_dict(batch)
    for part in split_tensor_dict(shuffled, 4):
        assert [prompts[i] for i in part["prompt_ids"][:, 0]] == part["omni_prompts"]
        assert part["num_items_in_batch"] == 3.0


def test_drawing_one_index_of_the_sampler_draws_the_order_of_an_epoch():
    """A resumed run draws the orders of finished epochs so."""
    samplers = [RepeatSampler(range(9), 2, 3, 2, shuffle=True, seed=4) for _ in range(2)]
    epochs = [list(samplers[0]) for _ in range(3)]
    for _ in range(2):
        next(iter(samplers[1]))
    assert list(samplers[1]) == epochs[2] != epochs[0]


def test_state_is_loaded_in_the_order_we_rely_on():
    """`_init_training_state` gives the finished epochs; rank files are complete before trainer_state.json is written."""
    body = inspect.getsource(Trainer._init_training_state)
    assert "return epochs_trained, steps_trained_in_current_epoch" in body
    save = inspect.getsource(Trainer._save_checkpoint)
    assert save.index("self._save_rng_state(output_dir)") < save.index("TRAINER_STATE_NAME")


def test_what_trl_changes_beside_the_policy_is_what_a_checkpoint_keeps():
    """The entropy's state, which it writes once a checkpoint counts as complete, and the parameters of a reference."""
    save, load = map(inspect.getsource, (GRPOTrainer._save_checkpoint, GRPOTrainer._load_optimizer_and_scheduler))
    assert save.index("super()._save_checkpoint(model, trial)") < save.index("if self.use_adaptive_entropy and")
    assert '{"entropy_coef": self.entropy_coef, "last_world_entropy": self._last_world_entropy}' in save
    assert all('"entropy_ctrl_state.json"' in body for body in (save, load))
    assert "zip(target_model.parameters(), model.parameters()" in inspect.getsource(SyncRefModelCallback)


def test_trl_changes_no_attribute_of_which_we_do_not_know():
    """What a later TRL changes while it trains has to be in checkpoints, or to be found needless there: see docs/running.md."""
    methods = ast.parse(inspect.getsource(GRPOTrainer)).body[0].body
    stored = [
        node.attr
        for method in methods
        if getattr(method, "name", "__init__") != "__init__"
        for node in ast.walk(method)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    ]
    kept = {"_step", "_buffered_inputs", "entropy_coef", "_last_world_entropy"}
    begun_anew = {"_entropy_window_stats", "_last_loaded_step", "_current_train_step_time", "_signature_columns"}
    of_tools = {"environments", "_batch_environments", "_sync_tool_dicts", "_async_tool_dicts"}  # which we refuse
    assert set(stored) == kept | begun_anew | of_tools


def test_attributes_that_we_read(tmp_path):
    body = inspect.getsource(GRPOTrainer)
    for name in ("_buffered_inputs", "_step", "_metrics", "num_iterations", "pad_to_multiple_of", "num_generations"):
        assert f"self.{name}" in body, name
    for name in ("steps_per_generation", "generation_batch_size", "generation_kwargs", "chat_template_kwargs"):
        assert hasattr(GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False), name), name


def test_columns_of_completions_are_made_as_long_as_the_prompts():
    from maple_trl.trainers.common.trl_compat import fit_columns

    def column(values):
        return deque(values, maxlen=4)

    extra = {"late": column("c"), "whole": column("xyz"), "of two functions": column("abcd")}
    rewards = {"whole": column([1.0, 2.0, 3.0]), "late": column([1.0])}
    logs = {"prompt": column("abc"), "rewards": rewards, "extra": extra}
    fit_columns(logs)
    assert list(map(list, extra.values())) == [[None, None, "c"], list("xyz"), list("bcd")]
    assert list(rewards["whole"]) == [1.0, 2.0, 3.0]
    assert len(rewards["late"]) == 3 and math.isnan(rewards["late"][0])


def test_packages_are_looked_for_once(monkeypatch):
    """By accelerate, which unwraps a model several times in each micro-batch."""
    import maple_trl.trainers.common.trl_compat  # noqa: F401

    is_peft_model(torch.nn.Linear(1, 1))
    looked, metadata = [], importlib.metadata.metadata
    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: looked.append(name) or metadata(name))
    is_peft_model(torch.nn.Linear(1, 1))
    assert looked == []


def test_cards_and_uploads_go_through_names_that_can_be_lent():
    """`PublishingTrainer` has TRL's card and the parent's client of the Hub replaced while the parent's methods run."""
    card = inspect.getsource(base_trainer._BaseTrainer.create_model_card)
    assert "model_card = generate_model_card(" in card and 'os.path.join(self.args.output_dir, "README.md")' in card
    for name in ("push_to_hub", "_push_from_checkpoint"):
        assert "hf_api().upload_folder(" in inspect.getsource(getattr(Trainer, name))
    assert "torch.save(self.args" in inspect.getsource(Trainer._save)  # with its key, unless that is taken out
