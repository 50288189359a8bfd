# /// script
# requires-python = ">=3.11"
# dependencies = ["maple-trl[judge]"]
# ///
"""
MAPO on captions that a judge grades (MAPLE, arXiv 2602.11596, 5.4 and C.2): what is missing, what is made up, how signals are fused.

    vllm serve Qwen/Qwen3-30B-A3B-Instruct-2507 --port 8001
    accelerate launch examples/mapo_captions.py --dataset_name data/captions --media_root data/clips \
        --judge_model Qwen/Qwen3-30B-A3B-Instruct-2507 --judge_url http://127.0.0.1:8001/v1

The judge is any OpenAI-compatible endpoint; a key is read from OPENAI_API_KEY. Rows have a column `reference`, and may have
`reference_v`, `reference_a` and `reference_s`. The embedded model and data, on a CPU, with a judge of yours:

    accelerate launch examples/mapo_captions.py --config examples/tiny.yaml \
        --judge_model NAME --judge_url http://127.0.0.1:8001/v1
"""

from dataclasses import dataclass, field

import trl
from trl import TrlParser

from maple_trl import MAPOConfig, MAPOTrainer
from maple_trl.chat import ChatOptions
from maple_trl.rewards import CaptionJudge
from maple_trl.train import OmniModelConfig, load_datasets, load_for_training


@dataclass
class ScriptArguments(trl.ScriptArguments):
    judge_model: str = field(default="gpt-4o", metadata={"help": "The judge, as its server knows it."})
    judge_url: str | None = field(default=None, metadata={"help": "Root of its API. Default: OpenAI's."})


def shown(row):
    """The embedded set has no captions: what the signals of a row's tag show stands in for one."""
    return {"reference": ", ".join(row[f"truth_{signal}"] for signal in row["tag"])}


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, MAPOConfig, OmniModelConfig))
    # What neither --config nor the command line says.
    parser.set_defaults_with_config(
        model_name_or_path="Qwen/Qwen2.5-Omni-3B",
        dtype="bfloat16",
        use_peft=True,
        lora_vision=False,  # frozen towers read each clip once
        lora_audio=False,
        output_dir="runs/mapo_captions",
        method="mapo",
        tag_weights="adaptive",
        difficulty="continuous",  # grades are not 0 or 1
        num_frames=16,
        max_pixels=224 * 224,
        prompt_template="maple-caption",
        max_completion_length=256,
        num_generations=8,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=8,
        temperature=0.7,
        top_p=0.9,
        learning_rate=1e-5,
    )
    script_args, training_args, model_args = parser.parse_args_and_config()

    # Dataset: a reference caption of each row, and of its signals alone
    splits, training_args.media_root = load_datasets(script_args, training_args.media_root)
    dataset = splits[script_args.dataset_train_split]
    if "reference" not in dataset.column_names:
        dataset = dataset.map(shown)

    # Reward: a call that fails is missing and never 0, and no caption is paid for twice
    judge = CaptionJudge(
        ChatOptions(
            model=script_args.judge_model,
            base_url=script_args.judge_url,
            concurrency=32,
            sampling={"temperature": 0, "max_tokens": 200},
            cache_file=f"{training_args.output_dir}/judge.sqlite",
        )
    )

    # Model
    model, processor, peft_config = load_for_training(model_args, training_args)

    # Training
    trainer = MAPOTrainer(
        model=model,
        reward_funcs=[judge],
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
