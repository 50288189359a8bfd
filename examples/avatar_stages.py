# /// script
# requires-python = ">=3.11"
# dependencies = ["maple-trl[judge]"]
# ///
"""
AVATAR's three stages of reinforcement learning, each from the model of the one before (arXiv 2508.03100, Table 1).

    accelerate launch examples/avatar_stages.py --model_name_or_path runs/sft_cold_start --dataset_name data/rows \
        --media_root data/clips --judge_model OpenGVLab/InternVL3-2B --judge_url http://127.0.0.1:8001/v1

Stage 0 is sft_cold_start.py. Without a judge, the third stage does without its grades. The embedded model and data, on a CPU:

    accelerate launch examples/avatar_stages.py --config examples/tiny.yaml

`maple-trl train --config recipes/avatar/stages.yaml` trains stages too, and goes on where it was stopped.
"""

import os
from dataclasses import dataclass, field

import trl
from trl import TrlParser

from maple_trl import AvatarConfig, AvatarTrainer
from maple_trl.chat import ChatOptions
from maple_trl.rewards import StepwiseReasoningJudge, accuracy_reward, format_reward, self_consistency_reward
from maple_trl.train import OmniModelConfig, load_datasets, load_for_training


@dataclass
class ScriptArguments(trl.ScriptArguments):
    judge_model: str | None = field(
        default=None, metadata={"help": "Judge of the third stage, as its server knows it."}
    )
    judge_url: str | None = field(default=None, metadata={"help": "Root of its API. Default: OpenAI's."})


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, AvatarConfig, OmniModelConfig))
    # What neither --config nor the command line says.
    parser.set_defaults_with_config(
        model_name_or_path="Qwen/Qwen2.5-Omni-3B",
        dtype="bfloat16",
        use_peft=True,
        lora_dropout=0.0,  # replay compares log-probabilities over time, which dropout makes random
        output_dir="runs/avatar_stages",
        # Four of a group's eight completions are replayed, and what stands at both ends of a completion counts more.
        num_generations=8,
        replayed_generations=4,
        tas_lambda=0.3,
        beta=0.1,
        num_frames=32,
        max_pixels=224 * 224,
        prompt_template="think",
        max_completion_length=2048,
        per_device_train_batch_size=8,
        learning_rate=5e-7,
        num_train_epochs=4,
    )
    script_args, training_args, model_args = parser.parse_args_and_config()

    # Dataset: here tags say which stage a row belongs to; the paper's stages are data sets, which a column `source` can tell
    splits, training_args.media_root = load_datasets(script_args, training_args.media_root)
    dataset = splits[script_args.dataset_train_split]

    # Rewards: the judge sees pictures of the clip and the thoughts, and is blind to the answer
    judges = []
    if script_args.judge_model is not None:
        server = ChatOptions(
            model=script_args.judge_model,
            base_url=script_args.judge_url,
            sampling={"temperature": 0, "max_tokens": 200},
            cache_file=f"{training_args.output_dir}/judge.sqlite",
        )
        judges.append(StepwiseReasoningJudge(server, frames=8, loader=training_args.media_loader))
    localization = [format_reward, accuracy_reward, self_consistency_reward, *judges]
    stages = {
        "1_visual": (["V", "VS"], [format_reward, accuracy_reward], [0.5, 0.5]),
        "2_audio_visual": (
            ["A", "AS", "VA"],
            [format_reward, accuracy_reward, self_consistency_reward],
            [0.2, 0.4, 0.4],
        ),
        "3_localization": (["VAS"], localization, [1 / len(localization)] * len(localization)),
    }

    # Training
    folder = training_args.output_dir
    for name, (tags, rewards, weights) in stages.items():
        training_args.output_dir = os.path.join(folder, name)
        training_args.reward_weights = weights
        model, processor, peft_config = load_for_training(model_args, training_args)
        trainer = AvatarTrainer(
            model=model,
            reward_funcs=rewards,
            args=training_args,
            train_dataset=dataset.filter(lambda tag, tags=tags: tag in tags, input_columns="tag"),
            processing_class=processor,
            peft_config=peft_config,
        )
        trainer.train()
        trainer.save_model()
        trainer.accelerator.wait_for_everyone()
        model_args.model_name_or_path = training_args.output_dir

    # Push the last one
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
