# /// script
# requires-python = ">=3.11"
# dependencies = ["maple-trl"]
# ///
"""
Supervised cold start: teach the form of an answer, before reinforcement learning (AVATAR's stage 0, arXiv 2508.03100).

    accelerate launch examples/sft_cold_start.py --dataset_name data/rows --media_root data/clips

Rows have `prompt`, `tag`, the paths of their media, and the columns that `--completion` names. The embedded model and data, on a CPU:

    accelerate launch examples/sft_cold_start.py --config examples/tiny_sft.yaml
"""

from dataclasses import dataclass, field

import trl
from trl import TrlParser

from maple_trl import OmniSFTConfig, OmniSFTTrainer
from maple_trl.train import OmniModelConfig, load_datasets, load_for_training


@dataclass
class ScriptArguments(trl.ScriptArguments):
    completion: str = field(
        default="<think>{reasoning}</think><answer>{solution}</answer>",
        metadata={"help": "What is learned: a text with the names of columns in braces."},
    )


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, OmniSFTConfig, OmniModelConfig))
    # What neither --config nor the command line says.
    parser.set_defaults_with_config(
        model_name_or_path="Qwen/Qwen2.5-Omni-3B",
        dtype="bfloat16",
        use_peft=True,
        output_dir="runs/sft_cold_start",
        num_frames=16,
        max_pixels=224 * 224,
        prompt_template="think",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=32,
        learning_rate=2e-5,
        num_train_epochs=1,
    )
    script_args, training_args, model_args = parser.parse_args_and_config()

    # Dataset: media paths are relative to the media root
    splits, training_args.media_root = load_datasets(script_args, training_args.media_root)
    dataset = splits[script_args.dataset_train_split].map(
        lambda row: {"completion": [{"role": "assistant", "content": script_args.completion.format(**row)}]}
    )

    # Model
    model, processor, peft_config = load_for_training(model_args, training_args)

    # Training
    trainer = OmniSFTTrainer(
        model=model,
        args=training_args,
        train_dataset=dataset,
        processing_class=processor,
        peft_config=peft_config,
    )
    trainer.train()

    # Save and push
    trainer.save_model()
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
