# /// script
# requires-python = ">=3.11"
# dependencies = ["maple-trl"]
# ///
"""
GRPO for prompts with video, audio and subtitles, each row its own, in one batch: TRL's GRPO, and a reward function of one's own.

    maple-trl data convert daily-omni data/Daily-Omni data/rows
    accelerate launch examples/omni_grpo.py --dataset_name data/rows --dataset_train_split test --media_root data/Daily-Omni

The embedded model and data, on a CPU:

    accelerate launch examples/omni_grpo.py --config examples/tiny.yaml
"""

from trl import ScriptArguments, TrlParser

from maple_trl import OmniGRPOConfig, OmniGRPOTrainer
from maple_trl.rewards import accuracy_reward
from maple_trl.train import OmniModelConfig, load_datasets, load_for_training


def form_reward(completions, **columns):
    """Partial credit for the form: a model that never gets it right could not learn it from all or nothing."""
    texts = [completion[0]["content"] for completion in completions]
    return [
        sum(text.count(mark) == 1 for mark in ("<think>", "</think>", "<answer>", "</answer>")) / 4 for text in texts
    ]


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, OmniGRPOConfig, OmniModelConfig))
    # What neither --config nor the command line says.
    parser.set_defaults_with_config(
        model_name_or_path="Qwen/Qwen2.5-Omni-3B",
        dtype="bfloat16",
        use_peft=True,
        lora_vision=False,  # frozen towers read each clip once
        lora_audio=False,
        output_dir="runs/omni_grpo",
        num_frames=16,
        max_pixels=224 * 224,
        prompt_template="think",
        max_completion_length=512,
        num_generations=8,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=8,
        learning_rate=1e-5,
        reward_weights=[0.2, 1.0],
    )
    script_args, training_args, model_args = parser.parse_args_and_config()

    # Dataset: media paths are relative to the media root
    splits, training_args.media_root = load_datasets(script_args, training_args.media_root)

    # Model
    model, processor, peft_config = load_for_training(model_args, training_args)

    # Training
    trainer = OmniGRPOTrainer(
        model=model,
        reward_funcs=[form_reward, accuracy_reward],
        args=training_args,
        train_dataset=splits[script_args.dataset_train_split],
        processing_class=processor,
        peft_config=peft_config,
    )
    trainer.train()

    # Save and push
    trainer.save_model()
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
