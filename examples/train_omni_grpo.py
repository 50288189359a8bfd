"""
The job of `maple-trl train`, written out: any trainer, on the embedded model and data or on your own.

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

from maple_trl.evaluation import sampled_accuracy
from maple_trl.jobs.options import parse_args, trainer_class
from maple_trl.rewards import accuracy_reward
from maple_trl.train import (
    checkpoint_to_resume,
    choose_parameters,
    load_datasets,
    load_model_and_processor,
    load_rewards,
)


def main() -> None:
    script_args, training_args, model_args = parse_args(sys.argv[1:])
    checkpoint = checkpoint_to_resume(training_args)

    # Rows hold a conversational prompt, a tag, a solution, and paths of media below media_root.
    data, training_args.media_root = load_datasets(script_args, training_args.media_root)
    questions = data[script_args.dataset_test_split]
    model, processor = load_model_and_processor(model_args, training_args)

    trainer = trainer_class(script_args.trainer)(
        model=model,
        reward_funcs=load_rewards(script_args.rewards),
        args=training_args,
        train_dataset=data[script_args.dataset_train_split],
        processing_class=processor,
        peft_config=choose_parameters(model, processor, model_args, quiet=training_args.process_index != 0),
    )

    def accuracy() -> dict[str, float]:
        """What the policy answers now, sampled as in training: accuracy by tag, and over all under `all`."""
        settings = {"questions_per_tag": script_args.eval_questions_per_tag, "seed": training_args.seed}
        return sampled_accuracy(trainer.generate_completions, questions, accuracy_reward, **settings).accuracy

    before = accuracy()
    trainer.train(resume_from_checkpoint=checkpoint)
    after = accuracy()

    trainer.save_model()
    if trainer.is_world_process_zero():
        summary = json.dumps({"before": before, "after": after, "left_out": trainer.left_out()}, indent=2)
        Path(training_args.output_dir, "summary.json").write_text(summary + "\n", encoding="utf-8")
        print(summary)


if __name__ == "__main__":
    main()
