"""Four processes under ZeRO-2 and ZeRO-3 finish, agree, and train as one process does (`make test-deepspeed`)."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import yaml
from filelock import FileLock
from jobs.runner import Job, once, write_inputs
from programs import run
from test_mixed_images import write_pictures
from test_processes import by_tag
from test_scale import (
    CONFIGS,
    EQUAL,
    PATIENCE,
    TAGS,
    WORLD,
    assert_equal,
    assert_finished,
    assert_goes_on,
    assert_refused,
    launcher,
    runs,
)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]


WAYS = ["zero2", "zero3"]
# It compiles what it shares memory with, by ninja.
ON_CPU = {
    "DS_ACCELERATOR": "cpu",
    "ACCELERATE_USE_CPU": "false",
    "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
}
BUILD = "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder as Builder; Builder().load(verbose=False)"


def in_parts(folder: Path) -> Path:
    """`zero3.yaml` with a part of every weight on each rank, where ZeRO-3 would leave weights as small as these whole."""
    settings = {
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "zero_allow_untested_optimizer": True,
        **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto"),
        "gradient_clipping": "auto",
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    config = yaml.safe_load((CONFIGS / "zero3.yaml").read_text())
    config["deepspeed_config"] = {"deepspeed_config_file": str(folder / "settings.json"), "zero3_init_flag": True}
    (folder / "zero3.yaml").write_text(yaml.safe_dump(config))
    return folder / "zero3.yaml"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    def make(folder):
        rows = by_tag(write_inputs(folder), TAGS)
        write_pictures(folder / "media")
        Job(1, folder, "one", rows, runs(1, rows)).wait()
        with FileLock(folder / "build.lock"):  # one that a killed process leaves behind stops all others for good
            built = run(["-c", BUILD], variables=ON_CPU)
            assert built.returncode == 0, built.stderr
        for way, config in (("zero2", CONFIGS / "zero2.yaml"), ("zero3", in_parts(folder))):
            Job(
                launcher(config), folder, way, rows, runs(WORLD, rows, folder / way), variables=PATIENCE | ON_CPU
            ).wait()

    return once(tmp_path_factory, "scale-deepspeed", make)


@pytest.mark.parametrize("way", WAYS)
def test_four_processes_finish_and_agree(results, way):
    assert_finished(results, way)


@pytest.mark.parametrize("name", [*EQUAL, "sft"])
@pytest.mark.parametrize("way", WAYS)
def test_four_processes_train_as_one_does(results, way, name):
    assert_equal(results, way, name)


@pytest.mark.parametrize("way", WAYS)
def test_a_run_goes_on_from_a_checkpoint_of_whole_weights(results, way):
    assert_goes_on(results, way)


@pytest.mark.parametrize("way", WAYS)
def test_what_needs_whole_gradients_is_refused(results, way):
    assert_refused(results, way)
