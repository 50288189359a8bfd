"""
MAPO from Python, without a config file: adaptive tag weights and the adaptive curriculum of MAPLE (arXiv 2602.11596) on the
embedded model and data, much like recipes/tiny/best.yaml.

    python examples/train_mapo.py --steps 56
    accelerate launch --num_processes 2 examples/train_mapo.py --output_dir runs/mapo

(The first lines of train_omni_grpo.py say what two processes need on a machine without a GPU.)
"""

import argparse

from maple_trl import MAPOConfig, MAPOTrainer
from maple_trl.data import default_folder, load_seven_tags
from maple_trl.evaluation import sampled_accuracy
from maple_trl.omni.loading import load_model, load_processor
from maple_trl.rewards import accuracy_reward, format_reward


def main() -> None:
    parser = argparse.ArgumentParser(description="MAPO on the embedded model and data.")
    parser.add_argument("--steps", type=int, default=168, help="optimizer steps; 56 are an epoch of one process")
    parser.add_argument("--output_dir", default="runs/mapo", help="for checkpoints and the model")
    parser.add_argument("--questions", type=int, default=32, help="of each tag, for the accuracies")
    options = parser.parse_args()

    # Rows hold a prompt, the paths of a clip and its subtitles, and a tag: the signals that the question needs.
    data = load_seven_tags()

    args = MAPOConfig(
        output_dir=options.output_dir,
        max_steps=options.steps,
        # What MAPLE varies. method="mupo" alone would be the baseline that knows nothing of tags.
        method="mapo",
        tag_weights="adaptive",  # a tag weighs more while its rewards are far from perfect
        curriculum="adaptive",  # the hardest tag first; before they are trained on, the one with the lowest accuracy
        zero_shot_questions=options.questions,  # of each tag, for that accuracy
        difficulty="binary",  # accuracy_reward is 0 or 1
        task_reward="accuracy_reward",
        loss_aggregation="token",
        # Media
        media_root=str(default_folder()),
        num_frames=4,
        max_pixels=56 * 56,
        # A step takes 8 prompts x 8 completions of each process, a rollout twice as many.
        num_generations=8,
        per_device_train_batch_size=64,
        steps_per_generation=2,
        max_completion_length=14,
        reward_weights=[0.1, 1.0],
        learning_rate=2e-4,
        warmup_steps=5,
        lr_scheduler_type="constant_with_warmup",
        logging_steps=4,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        seed=7,
    )
    trainer = MAPOTrainer(
        model=load_model("builtin:tiny-omni"),
        processing_class=load_processor("builtin:tiny-omni"),
        reward_funcs=[format_reward, accuracy_reward],
        args=args,
        train_dataset=data["train"],
    )

    def accuracy() -> dict[str, float]:
        """Of answers sampled as in training; by tag, and over all under `all`. Every process takes part."""
        questions = {"questions_per_tag": options.questions, "seed": args.seed}
        return sampled_accuracy(trainer.generate_completions, data["test"], accuracy_reward, **questions).accuracy

    before = accuracy()
    trainer.train()
    after = accuracy()

    trainer.save_model()
    if trainer.is_world_process_zero():
        print("tag    before  after")
        for tag in after:
            print(f"{tag:<5}  {before[tag]:6.3f}  {after[tag]:5.3f}")


if __name__ == "__main__":
    main()
