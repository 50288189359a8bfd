"""The files of `examples/` that start jobs on several processes and machines, read and run as their users do."""

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate import DistributedType
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from jobs.runner import write_inputs
from programs import LIMIT, ON_CPU, write_launchers, write_tool


EXAMPLES = Path(__file__).parents[1] / "examples"
CONFIGS = sorted((EXAMPLES / "accelerate_configs").glob("*.yaml"))


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


# What a file asks for


def test_the_files_are_those_that_the_documentation_names():
    assert [path.stem for path in CONFIGS] == ["ddp", "fsdp2", "multi_node", "zero2", "zero3"]
    told = (EXAMPLES.parent / "docs" / "distributed.md").read_text()
    assert all(f"`{path.name}`" in told for path in CONFIGS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_the_file(path, tmp_path):
    config = ClusterConfig.from_yaml_file(path)  # it refuses unknown keys
    sections = {"MULTI_GPU": None, "FSDP": "fsdp_config", "DEEPSPEED": "deepspeed_config"}
    section = sections[config.distributed_type.value]
    known = {option for action in launch_command_parser()._actions for option in action.option_strings}
    for name in getattr(config, section) if section else ():
        assert f"--{name}" in known, name
    assert config.num_processes % config.num_machines == 0 and config.mixed_precision == "bf16"
    odd = tmp_path / path.name
    odd.write_text(path.read_text() + "num_machine: 2\n")
    with pytest.raises(ValueError, match="unknown keys"):
        ClusterConfig.from_yaml_file(odd)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "fsdp2",
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"},
        ),
        (
            "multi_node",
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"},
        ),
        ("zero2", {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}),
        ("zero3", {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"}),
        ("ddp", {"ACCELERATE_MIXED_PRECISION": "bf16"}),
    ],
)
def test_processes_are_told_what_the_file_says(name, expected):
    words = [
        "--config_file",
        str(EXAMPLES / "accelerate_configs" / f"{name}.yaml"),
        "--main_process_port",
        str(free_port()),
    ]
    args, defaults, _ = _validate_launch_command(
        launch_command_parser().parse_args([*words, "--main_process_ip", "127.0.0.1", "train.py"])
    )
    if defaults.distributed_type == DistributedType.DEEPSPEED:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        variables = prepare_deepspeed_cmd_env(args)[1]
    else:
        variables = prepare_multi_gpu_env(args)
    assert {key: variables.get(key) for key in expected} == expected


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_deepspeed_is_started_by_accelerate_on_several_machines_too(name):
    """Not by DeepSpeed's own launcher, which reaches the others by ssh."""
    words = ["--config_file", str(EXAMPLES / "accelerate_configs" / f"{name}.yaml"), "--num_machines", "2"]
    words += ["--machine_rank", "1", "--main_process_ip", "main", "--main_process_port", "29500", "train.py"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    command, _ = prepare_deepspeed_cmd_env(args)
    assert command is None and (args.rdzv_endpoint, args.nnodes, args.node_rank) == ("main:29500", "2", 1)


# Several machines


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A folder with a job of one step, and with what starts programs in the place of an interpreter and of accelerate."""
    folder = tmp_path_factory.mktemp("job")
    rows = write_inputs(folder)[:8]
    (folder / "media" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "trainer": "omni_grpo",
        "model_name_or_path": str(folder / "model"),
        "dtype": "float32",
        "dataset_name": str(folder / "media"),
        "num_frames": 4,
        "min_pixels": 1024,
        "max_pixels": 4096,
        "reward_funcs": ["accuracy_reward"],
        "per_device_train_batch_size": 2,
        "num_generations": 2,
        "max_completion_length": 4,
        "max_steps": 1,
        "save_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "evaluate_before_after": False,
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(settings))
    tools = write_launchers(folder / "bin")
    write_tool(tools / "scontrol", "echo 127.0.0.1; echo elsewhere")
    # Two nodes, one after the other; the first word is an option of its own.
    nodes = 'shift; SLURM_NODEID=1 "$@" & SLURM_NODEID=0 "$@"; first=$?; wait $! && exit $first'
    write_tool(tools / "srun", nodes)
    return folder


def run_on_two(job, command, **variables):
    """Run a command of a shell; two machines have one process each. Returns its log."""
    log = job / "log"
    environment = (
        os.environ
        | ON_CPU
        | {"PATH": f"{job / 'bin'}:{os.environ['PATH']}", "PYTHON_EXEC": str(job / "bin" / "python")}
    )
    with log.open("w") as output:
        done = subprocess.run(
            ["bash", "-c", command],
            env=environment | variables,
            stdout=output,
            stderr=output,
            cwd=EXAMPLES.parent,
            timeout=LIMIT,
        )
    assert done.returncode == 0, log.read_text()[-6000:]
    return log.read_text()


def assert_two_processes(out):
    assert sorted(path.name for path in (out / "checkpoint-1").glob("rollout_*.json")) == [
        "rollout_0.json",
        "rollout_1.json",
    ]
    assert json.loads((out / "checkpoint-1" / "trainer_state.json").read_text())["global_step"] == 1


@pytest.mark.long
@pytest.mark.slow
def test_the_slurm_script_starts_a_launcher_on_each_machine(job):
    port = next(port for port in iter(free_port, None) if 20000 <= port < 40000)
    slurm = {
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "a,b",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_JOB_ID": str(port - 20000),
    }
    command = f"bash examples/slurm/train.sbatch {job}/job.yaml --output_dir {job}/slurm"
    run_on_two(job, command, **slurm)
    assert_two_processes(job / "slurm")
    # It goes on from its checkpoint, where no step is left.
    assert "no step was left to make" in run_on_two(job, command, **slurm, SLURM_RESTART_COUNT="1")


@pytest.mark.slow
@pytest.mark.long
def test_torchrun_on_two_machines(job):
    line = (
        f"torchrun --nnodes 2 --nproc_per_node 1 --rdzv_backend c10d --rdzv_endpoint 127.0.0.1:{free_port()} "
        f"-m maple_trl.cli train --config {job}/job.yaml --output_dir {job}/torchrun"
    )
    run_on_two(job, f"{line} & {line}; first=$?; wait $! && exit $first")
    assert_two_processes(job / "torchrun")
