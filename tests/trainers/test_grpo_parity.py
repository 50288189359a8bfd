"""On text-only data the omni trainer is TRL's GRPO trainer: same losses, gradients and weights, step for step."""

import pytest
import torch
from datasets import Dataset
from tiny_models import build_tiny, build_tiny_text, save_tiny
from trl import GRPOConfig, GRPOTrainer

from maple_trl import OmniGRPOConfig, OmniGRPOTrainer
from maple_trl.omni.families import family_for


pytestmark = pytest.mark.slow


WORDS = "red green blue yellow what color is the square answer low high".split()


def letters(completions, **kwargs):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(map(ord, text)) % 7 / 7 for text in texts]


def dataset(conversational):
    questions = [" ".join(WORDS[i : i + 2 + i % 4]) + "?" for i in range(8)]
    prompts = [[{"role": "user", "content": q}] for q in questions] if conversational else questions
    return Dataset.from_dict({"prompt": prompts})


def run(trainer_class, config_class, model, processing_class, folder, data, **options):
    options = {"max_completion_length": 6} | options
    if options["max_completion_length"] > 6:  # many tokens end a completion, so that lengths differ
        model.generation_config.eos_token_id = list(range(0, 400, 6))
    args = config_class(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_generations=4,
        max_steps=3,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        seed=11,
        **options,
    )
    trainer = trainer_class(model, letters, args, train_dataset=data, processing_class=processing_class)
    grads = []

    def remember(optimizer, *_):
        named = trainer.model.named_parameters()
        grads.append({n: p.grad.clone() for n, p in named if p.grad is not None})

    original = trainer.create_optimizer

    def create_optimizer(*a, **k):
        optimizer = original(*a, **k)
        optimizer.register_step_pre_hook(remember)
        return optimizer

    trainer.create_optimizer = create_optimizer
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return logs, grads, trainer.model.state_dict()


CASES = {
    "default": {},
    "grpo loss": {"loss_type": "grpo"},
    "bnpo, reference model": {"loss_type": "bnpo", "beta": 0.1},
    "two iterations": {"num_iterations": 2, "epsilon_high": 0.3},
    "several steps per rollout": {"steps_per_generation": 4, "num_iterations": 2},
    "bnpo loss, lengths differ": {"loss_type": "bnpo", "max_completion_length": 12},
    "high-entropy tokens": {"top_entropy_quantile": 0.5, "max_completion_length": 12},
    "padded to a multiple, no checkpointing": {"pad_to_multiple_of": 8, "gradient_checkpointing": False},
}


def build(kind, tmp_path, seed=0):
    """A model that remembers its folder, so that TRL can load a reference model."""
    if kind == "text":
        model, tokenizer = build_tiny_text(seed)
        model.save_pretrained(tmp_path / "text")
        tokenizer.save_pretrained(tmp_path / "text")
        return type(model).from_pretrained(tmp_path / "text"), tokenizer
    model, processor = build_tiny(kind, seed)
    folder = save_tiny(kind, tmp_path / kind, seed)
    return type(model).from_pretrained(folder), processor


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("kind", ["text", "qwen2_5_omni"])
@pytest.mark.matrix(cases=3)
def test_same_losses_gradients_and_weights(kind, options, tmp_path):
    data = dataset(conversational=kind != "text")
    model, processing_class = build(kind, tmp_path)
    trl_options = dict(options)
    if kind != "text":  # TRL keeps only image tokens out of completions; ours keeps all media tokens out
        trl_options["generation_kwargs"] = {"suppress_tokens": family_for(model, processing_class).suppressed_ids}
    expected = run(GRPOTrainer, GRPOConfig, model, processing_class, tmp_path / "trl", data, **trl_options)
    model, processing_class = build(kind, tmp_path)
    # Sharing prompts rounds otherwise, which Adam multiplies where a gradient is nearly zero.
    own = options | {"shared_prefix": "off"}
    ours = run(OmniGRPOTrainer, OmniGRPOConfig, model, processing_class, tmp_path / "omni", data, **own)

    assert len(expected[0]) == len(ours[0]) == 3
    for theirs, mine in zip(expected[0], ours[0], strict=True):
        for name in ("loss", "grad_norm", "reward", "entropy"):
            if name in theirs:
                assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    for theirs, mine in zip(expected[1], ours[1], strict=True):
        assert theirs.keys() == mine.keys()
        for name in theirs:
            torch.testing.assert_close(
                mine[name], theirs[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )
    for name, value in expected[2].items():
        torch.testing.assert_close(ours[2][name], value, rtol=1e-4, atol=1e-6)
    assert max(entry["grad_norm"] for entry in expected[0]) > 1e-3
    if options.get("max_completion_length"):
        assert expected[0][0]["completions/min_length"] < expected[0][0]["completions/max_length"]


def test_another_model_is_told_apart(tmp_path):
    """The negative control: the comparison above sees a difference when there is one."""
    data = dataset(conversational=True)
    logs = []
    for seed in (0, 1):
        model, processor = build("qwen2_5_omni", tmp_path / str(seed), seed)
        logs.append(run(OmniGRPOTrainer, OmniGRPOConfig, model, processor, tmp_path / str(seed) / "out", data)[0])
    assert logs[0][0]["grad_norm"] != pytest.approx(logs[1][0]["grad_norm"], rel=1e-4)
