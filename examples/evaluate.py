# /// script
# requires-python = ">=3.11"
# dependencies = ["maple-trl"]
# ///
"""
Evaluation with the modality ablation: every question with exactly its tag's signals, and with each of the seven tags.

    accelerate launch examples/evaluate.py --adapter runs/mapo_qa --dataset_name data/rows --media_root data/clips

The same command goes on where it was stopped. The embedded model and data, on a CPU:

    accelerate launch examples/evaluate.py --config examples/tiny_eval.yaml

`maple-trl eval` does the same, and knows benchmarks, served models and judges too.
"""

from trl import TrlParser

from maple_trl.evaluation import EvalOptions
from maple_trl.jobs.eval_job import EvalArguments, EvalJob, EvalMedia
from maple_trl.jobs.evaluate import run_evaluation


if __name__ == "__main__":
    parser = TrlParser((EvalArguments, EvalOptions, EvalMedia))
    # What neither --config nor the command line says.
    parser.set_defaults_with_config(
        model_name_or_path="Qwen/Qwen2.5-Omni-3B",
        dtype="bfloat16",
        output_dir="runs/evaluation",
        access=["required", "V", "A", "S", "VA", "VS", "AS", "VAS"],  # what a question is asked with
        samples=5,
        temperature=1.0,
        max_new_tokens=512,
        num_frames=16,
        max_pixels=224 * 224,
        prompt_template="think",
    )
    arguments, options, media = parser.parse_args_and_config()

    # Evaluation: the processes of a launch share the questions, and the first one has the result
    result = run_evaluation(EvalJob(**vars(arguments), options=options, media=media))

    if result is not None:
        print(f"{'asked with':<10}  accuracy  95 % interval by clip")
        for access, found in result["accesses"].items():
            mean = found["accuracy"]["sample_mean"]
            print(f"{access:<10}  {mean['value']:8.3f}  [{mean['low']:.3f}, {mean['high']:.3f}]")
