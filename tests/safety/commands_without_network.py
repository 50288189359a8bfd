"""Runs the commands one after the other in a process in which nobody has said that it is offline; prints their statuses."""

import json
import sys
from pathlib import Path

import media_files
import pyarrow.parquet as pq

from maple_trl import cli


folder = Path(sys.argv[1])
rows = media_files.copy_small_set(folder / "data")
pq.write_table(rows.select(range(8)).data.table.combine_chunks(), folder / "data" / "rows.parquet")
TABLE, RUN = str(folder / "data" / "rows.parquet"), str(folder / "run")
JOB = {
    "trainer": "mapo",
    "model_name_or_path": "builtin:tiny-omni",
    "dtype": "float32",
    "dataset_name": TABLE,
    "num_frames": 4,
    "max_pixels": 3136,
    "max_completion_length": 4,
    "max_prompt_length": 128,
    "reward_funcs": ["format_reward", "accuracy_reward"],
    "num_generations": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_steps": 1,
    "save_steps": 1,
    "bf16": False,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "output_dir": RUN,
}
(folder / "job.yaml").write_text(json.dumps(JOB))
SMALL = ["--num-frames", "4", "--max-pixels", "3136", "--max-new-tokens", "4", "--samples", "1", "--quiet"]
COMMANDS = [
    ["env", "--imports"],
    ["data", "validate", TABLE, "--media_root", str(folder / "data")],
    ["plan", "--model", "builtin:tiny-omni", "--gpus", "1"],
    ["train", "--config", str(folder / "job.yaml")],
    ["train", "--config", str(folder / "job.yaml"), "--max_steps", "2", "--resume_from_checkpoint", "true"],
    ["eval", "--model", f"{RUN}/checkpoint-1", "--data", TABLE, *SMALL, "--output", str(folder / "eval")],
    ["report", RUN],
]
print("STATUSES", json.dumps([cli.main(words) for words in COMMANDS]))
# The control: only where a name of the Hub is given is it asked for.
print("NAMED", cli.main(["plan", "--model", "org/a-model-that-is-named"]))
