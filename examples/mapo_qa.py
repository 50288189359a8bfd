# /// script
# requires-python = ">=3.11"
# dependencies = ["maple-trl"]
# ///
"""
MAPO on tagged questions: adaptive tag weights with the adaptive curriculum, MAPLE's most accurate row (arXiv 2602.11596, Table 2).

    accelerate launch examples/mapo_qa.py --dataset_name data/rows --media_root data/clips

Full weights over four GPUs instead of LoRA:

    accelerate launch --config_file examples/accelerate_configs/fsdp2.yaml --num_processes 4 examples/mapo_qa.py \
        --dataset_name data/rows --media_root data/clips --use_peft false --lora_vision true --lora_audio true --dtype float32

The embedded model and data, on a CPU:

    accelerate launch examples/mapo_qa.py --config examples/tiny.yaml
"""

from trl import ScriptArguments, TrlParser

from maple_trl import MAPOConfig, MAPOTrainer
from maple_trl.rewards import accuracy_reward, format_reward
from maple_trl.train import OmniModelConfig, load_datasets, load_for_training


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, MAPOConfig, OmniModelConfig))
    # What neither --config nor the command line says.
    parser.set_defaults_with_config(
        model_name_or_path="Qwen/Qwen2.5-Omni-3B",
        dtype="bfloat16",
        use_peft=True,
        lora_vision=False,  # frozen towers read each clip once
        lora_audio=False,
        output_dir="runs/mapo_qa",
        # A rollout holds rows of one tag, and advantages are scaled within it.
        method="mapo",
        tag_weights="adaptive",  # a tag weighs more while its rewards are far from perfect
        curriculum="adaptive",  # the hardest tag first; at the beginning, the one that is answered worst
        task_reward="accuracy_reward",  # which of the rewards says how hard a tag is
        num_frames=16,
        max_pixels=224 * 224,
        prompt_template="think",
        max_completion_length=512,
        num_generations=8,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=8,
        steps_per_generation=16,  # two optimizer steps per rollout
        learning_rate=1e-5,
        reward_weights=[0.1, 1.0],
    )
    script_args, training_args, model_args = parser.parse_args_and_config()

    # Dataset: each row's tag says which signals its question needs, and exactly these are fed
    splits, training_args.media_root = load_datasets(script_args, training_args.media_root)

    # Model
    model, processor, peft_config = load_for_training(model_args, training_args)

    # Training
    trainer = MAPOTrainer(
        model=model,
        reward_funcs=[format_reward, accuracy_reward],
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
