"""
GRPO on the real clips and questions of Daily-Omni, each question in each of the seven modality tags.

Daily-Omni (`liarliar/Daily-Omni`) is not downloaded: give the folder that holds its qa.json and Videos. Questions whose
clips are not there are left out.

    python examples/train_daily_omni.py --data DIR                          # the embedded tiny model, on a CPU
    python examples/train_daily_omni.py --data DIR --model_name_or_path Qwen/Qwen2.5-Omni-3B --dtype bfloat16 \
        --use_cpu false --bf16 true --gradient_checkpointing true --per_device_train_batch_size 8 --num_generations 8 \
        --num_frames 16 --max_completion_length 512 --use_peft true --lora_vision false --lora_audio false

    accelerate launch --num_processes 2 examples/train_daily_omni.py --data DIR

On a machine without a GPU, two processes need

    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no \
        --dynamo_backend no examples/train_daily_omni.py --data DIR

The tags say what a row is fed, not what its question needs, and a description of the sounds stands in for subtitles:
see `maple_trl.data.daily_omni`. The embedded model knows coloured shapes and tones; here it shows that the path runs.
"""

import os
from dataclasses import dataclass, field

from trl import TrlParser

from maple_trl.data.daily_omni import load_daily_omni
from maple_trl.jobs.options import OmniModelConfig
from maple_trl.modalities import ModalityTag
from maple_trl.rewards import accuracy_reward, format_reward
from maple_trl.train import choose_parameters, load_model_and_processor
from maple_trl.trainers.omni_grpo.config import OmniGRPOConfig
from maple_trl.trainers.omni_grpo.trainer import OmniGRPOTrainer


@dataclass
class DataArguments:
    """What is read."""

    data: str | None = field(
        default=os.environ.get("MAPLE_TRL_DAILY_OMNI"),
        metadata={"help": "Folder with qa.json and Videos. Default: the environment variable MAPLE_TRL_DAILY_OMNI."},
    )
    tags: list[str] = field(
        default_factory=lambda: [tag.value for tag in ModalityTag],
        metadata={"help": "Tags in which every question is asked, e.g. VA VAS. Default: all seven."},
    )


def form_reward(completions, **columns) -> list[float]:
    """Partial credit for the form of the answer: a model that never gets it right could not learn it otherwise."""
    texts = [completion[0]["content"] for completion in completions]
    return [
        sum(text.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>")) / 4 for text in texts
    ]


# For the embedded model. What stands on the command line wins.
DEFAULTS = {
    "model_name_or_path": "builtin:tiny-omni",
    "output_dir": "runs/daily-omni",
    "num_frames": 4,
    "max_pixels": 32 * 28 * 28,
    "per_device_train_batch_size": 28,
    "num_generations": 4,
    "max_completion_length": 16,
    "max_steps": 3,
    "learning_rate": 1e-4,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
}


def main() -> None:
    parser = TrlParser((DataArguments, OmniGRPOConfig, OmniModelConfig))
    parser.set_defaults_with_config(**DEFAULTS)
    data_args, training_args, model_args = parser.parse_args_and_config()
    if data_args.data is None:
        parser.error("--data is missing: the folder that holds Daily-Omni's qa.json and Videos")

    training_args.media_root = data_args.data
    model, processor = load_model_and_processor(model_args, training_args)
    trainer = OmniGRPOTrainer(
        model=model,
        reward_funcs=[form_reward, format_reward, accuracy_reward],
        args=training_args,
        train_dataset=load_daily_omni(data_args.data, tags=data_args.tags),
        processing_class=processor,
        peft_config=choose_parameters(model, processor, model_args, quiet=training_args.process_index != 0),
    )
    trainer.train()
    trainer.save_model()

    if trainer.is_world_process_zero():
        for log in trainer.state.log_history:
            if "loss" in log:
                tokens = ", ".join(
                    f"{kind} {log[f'media_tokens/{kind}']:.0f}" for kind in ("video", "audio", "subtitle")
                )
                print(
                    f"step {log['step']}: loss {log['loss']:.4f}, gradient {log['grad_norm']:.3f}, "
                    f"reward {log['reward']:.3f}, media tokens: {tokens}"
                )


if __name__ == "__main__":
    main()
