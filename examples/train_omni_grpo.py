"""
The job of `maple-trl train`, written out: omni-modal GRPO on the embedded model and data, or on your own.

    python examples/train_omni_grpo.py --config recipes/demo.yaml
    accelerate launch --num_processes 2 examples/train_omni_grpo.py --config recipes/demo.yaml

On a machine without a GPU, two processes need

    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no \
        --dynamo_backend no examples/train_omni_grpo.py --config recipes/demo.yaml

(`--cpu` starts a single one). The batch size in the recipe is per process.
"""

import json
import sys
from pathlib import Path

from maple_trl import OmniGRPOTrainer
from maple_trl.evaluation import sampled_accuracy
from maple_trl.omni.loading import load_model, load_processor
from maple_trl.rewards import accuracy_reward, format_reward
from maple_trl.train import choose_parameters, load_datasets, parse_args


def main() -> None:
    script_args, training_args, model_args = parse_args(sys.argv[1:])

    # Rows hold a conversational prompt, a tag, a solution, and paths of media below media_root.
    data, training_args.media_root = load_datasets(script_args, training_args.media_root)
    model = load_model(model_args.model_name_or_path, dtype=model_args.dtype)
    processor = load_processor(model_args.model_name_or_path)

    trainer = OmniGRPOTrainer(
        model=model,
        reward_funcs=[format_reward, accuracy_reward],
        args=training_args,
        train_dataset=data["train"],
        processing_class=processor,
        peft_config=choose_parameters(model, processor, model_args),
    )

    def accuracy() -> dict[str, float]:
        """What the policy answers now, sampled as in training: accuracy by tag, and over all under `all`."""
        questions = {"questions_per_tag": script_args.eval_questions_per_tag, "seed": training_args.seed}
        return sampled_accuracy(trainer.generate_completions, data["test"], accuracy_reward, **questions).accuracy

    before = accuracy()
    trainer.train()
    after = accuracy()

    trainer.save_model()
    if trainer.is_world_process_zero():
        summary = json.dumps({"before": before, "after": after}, indent=2)
        Path(training_args.output_dir, "summary.json").write_text(summary + "\n", encoding="utf-8")
        print(summary)


if __name__ == "__main__":
    main()
