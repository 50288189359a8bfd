# /// script
# requires-python = ">=3.11"
# dependencies = ["maple-trl"]
# ///
"""
Everything together: MAPO's tag weights, curriculum and filtering with AVATAR's replay, shaping (TAS) and hints, in one run.

    accelerate launch examples/maple_avatar.py --dataset_name data/hinted --media_root data/clips

Where rows have no column `hint`, a teacher writes it, and hints that give the answer away are refused:

    maple-trl data hints --dataset_name data/rows/train.parquet --output data/hinted/train.parquet \
        --media_root data/clips --model NAME --base_url http://127.0.0.1:8001/v1

The embedded model and data, on a CPU:

    accelerate launch examples/maple_avatar.py --config examples/tiny.yaml
"""

from trl import ScriptArguments, TrlParser

from maple_trl import AvatarConfig, AvatarTrainer
from maple_trl.rewards import accuracy_reward, format_reward
from maple_trl.train import OmniModelConfig, load_datasets, load_for_training


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, AvatarConfig, OmniModelConfig))
    # What neither --config nor the command line says.
    parser.set_defaults_with_config(
        model_name_or_path="Qwen/Qwen2.5-Omni-3B",
        dtype="bfloat16",
        use_peft=True,
        lora_vision=False,  # frozen towers read each clip once
        lora_audio=False,
        output_dir="runs/maple_avatar",
        # MAPLE
        method="mapo",
        tag_weights="adaptive",
        curriculum="adaptive",
        dynamic_sampling="early",  # groups that were all rewarded alike are not trained on
        revisit="unsolved",
        task_reward="accuracy_reward",
        # AVATAR
        num_generations=8,
        replayed_generations=4,
        replay_draw="balanced",  # as many above as below their prompt's baseline
        tas_lambda=0.3,
        hints=True,
        hint_visits=2,
        num_train_epochs=5,  # a prompt is visited once an epoch
        # Media and batches
        num_frames=16,
        max_pixels=224 * 224,
        prompt_template="think",
        max_completion_length=512,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=8,
        learning_rate=1e-5,
        reward_weights=[0.1, 1.0],
    )
    script_args, training_args, model_args = parser.parse_args_and_config()

    # Dataset: tags for MAPLE, hints for AVATAR
    splits, training_args.media_root = load_datasets(script_args, training_args.media_root)

    # Model
    model, processor, peft_config = load_for_training(model_args, training_args)

    # Training
    trainer = AvatarTrainer(
        model=model,
        reward_funcs=[format_reward, accuracy_reward],
        args=training_args,
        train_dataset=splits[script_args.dataset_train_split],
        processing_class=processor,
        peft_config=peft_config,
    )
    trainer.train()

    # What of it happened: replayed completions, hinted prompts, groups left out
    if trainer.is_world_process_zero():
        for note in [*trainer.fired(), *trainer.left_out()]:
            print(note["text"])

    # Save and push
    trainer.save_model()
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
