"""No pickle, and no code, that a checkpoint brings along is run: one is planted wherever something might read it."""

import io
import json
import pickle
import re
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from datasets import Dataset
from omni_runs import DEFAULTS, spread_reward
from peft import LoraConfig, get_peft_model
from planted import Planted, plant_legacy, plant_torch, planted_bytes, twice
from tiny_models import build_tiny

from maple_trl import OmniGRPOConfig, OmniGRPOTrainer, cli
from maple_trl.chat.cache import ChatCache
from maple_trl.jobs.config_files import read_config as read_job
from maple_trl.jobs.errors import SetupError
from maple_trl.omni.adapters import load_adapter
from maple_trl.omni.checkpoints import CheckpointError
from maple_trl.omni.loading import load_model, load_processor, resolve_checkpoint
from maple_trl.trainers.common.checkpoint import ResumeError
from maple_trl.trainers.common.pickles import check_pickles, foreign_names


TINY = Path(resolve_checkpoint("builtin:tiny-omni"))
PICKLES = (
    "pytorch_model.bin",
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "rng_state.pth",
    "adapter_model.bin",
    "tokenizer.pkl",
    "random_states_0.pkl",
    "custom_checkpoint_0.pkl",
)
CODE = "from pathlib import Path\nPath({mark!r}).touch()\n\nclass Evil:\n    pass\n"


@pytest.fixture
def mark(tmp_path):
    """The file that no planted pickle may write."""
    path = tmp_path / "mark"
    yield path
    assert not path.exists(), "something that was planted was run"


@pytest.fixture
def model_folder(tmp_path):
    return shutil.copytree(TINY, tmp_path / "model")


def plant_all(folder, mark):
    for name in PICKLES:
        if not (folder / name).exists():
            plant_torch(folder / name, mark)
    np.save(folder / "state.npy", np.array([Planted(mark)], dtype=object), allow_pickle=True)


def plant_code(folder, mark, *files):
    """Has files of a folder name classes of a module that lies beside them."""
    (folder / "evil.py").write_text(CODE.format(mark=str(mark)))
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoModel", "AutoProcessor", "AutoImageProcessor")
    classes = dict.fromkeys((*names, "AutoFeatureExtractor", "AutoVideoProcessor"), "evil.Evil")
    for name in files:
        content = json.loads((folder / name).read_text())
        content["auto_map"] = classes | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
        (folder / name).write_text(json.dumps(content))


def test_the_plants_are_live(tmp_path):
    """The control of all others: read in full, each leaves its mark."""
    for number, read in enumerate(
        (
            lambda mark: torch.load(plant_torch(tmp_path / "a.pt", mark), weights_only=False),
            lambda mark: torch.load(plant_legacy(tmp_path / "b.pt", mark), weights_only=False),
            lambda mark: pickle.loads(planted_bytes(mark)),
            lambda mark: np.load(_saved(tmp_path / "c.npy", mark), allow_pickle=True),
            lambda mark: exec(CODE.format(mark=str(mark)), {}),
        )
    ):
        mark = tmp_path / f"mark-{number}"
        read(mark)
        assert mark.exists()


def _saved(path, mark):
    np.save(path, np.array([Planted(mark)], dtype=object), allow_pickle=True)
    return path


# Models and adapters


def test_a_model_is_loaded_past_pickles_and_code(model_folder, mark):
    plant_all(model_folder, mark)
    configs = [path.name for path in model_folder.glob("*config*.json")]
    plant_code(model_folder, mark, *configs)
    assert load_model(str(model_folder)).config.model_type == "qwen2_5_omni_thinker"
    load_processor(str(model_folder))


def test_pickled_weights_are_refused(model_folder, mark, tmp_path, capsys):
    (model_folder / "model.safetensors").unlink()
    plant_torch(model_folder / "pytorch_model.bin", mark)
    with pytest.raises(CheckpointError, match=r"pickled ones \(pytorch_model.bin\) are not read"):
        load_model(str(model_folder))
    assert (
        cli.main(
            ["eval", "--data", "builtin:seven-tags", "--output", str(tmp_path / "out"), "--model", str(model_folder)]
        )
        == 2
    )
    assert "pickled ones (pytorch_model.bin) are not read" in capsys.readouterr().err


@pytest.mark.parametrize("answer", ["y\n", ""])
def test_nobody_is_asked_whether_to_run_code(tmp_path, mark, monkeypatch, answer):
    """Of a model type that only its own code knows; transformers would ask, and take what comes from the terminal."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "architectures": ["Evil"]}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Evil"}))
    plant_code(folder, mark, "config.json", "tokenizer_config.json")
    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    for load in (load_model, load_processor):
        with pytest.raises((CheckpointError, ValueError)):
            load(str(folder))
    from maple_trl.rewards.local_scorer import LocalScorer

    with pytest.raises(ValueError, match="custom code"):
        LocalScorer(str(folder))._load()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model, _ = build_tiny("qwen2_5_omni")
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2)).save_pretrained(folder)
    return folder


def edited(adapter, folder, **fields):
    shutil.copytree(adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))
    return folder


def test_an_adapter_is_loaded_past_pickles(adapter, tmp_path, mark):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    plant_all(folder, mark)
    model, _ = build_tiny("qwen2_5_omni")
    load_adapter(model, str(folder))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model.bin\) are not read"):
        load_adapter(model, str(folder))


def test_an_adapter_names_nothing_that_is_imported_or_fetched(adapter, tmp_path, mark, monkeypatch):
    (tmp_path / "evil.py").write_text(CODE.format(mark=str(mark)))
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, fields in {
        "megatron_config": {"megatron_config": {"a": 1}, "megatron_core": "evil"},
        "adapters": {"peft_type": "XLORA", "adapters": {"0": "org/other"}, "hidden_size": 8},
        "tokenizer_name_or_path": {
            "peft_type": "PROMPT_TUNING",
            "prompt_tuning_init": "TEXT",
            "prompt_tuning_init_text": "a",
            "num_virtual_tokens": 2,
            "tokenizer_name_or_path": "org/other",
        },
    }.items():
        model, _ = build_tiny("qwen2_5_omni")
        with pytest.raises(CheckpointError, match=f"has {name}, by which PEFT would .* it is not read"):
            load_adapter(model, str(edited(adapter, tmp_path / name, **fields)), trainable=True)


# Resumed runs


ROWS = Dataset.from_list(
    [
        {"prompt": [{"role": "user", "content": f"which {i}"}], "subtitle": "w", "tag": "S", "solution": "A"}
        for i in range(8)
    ]
)


def trainer_in(folder):
    given = DEFAULTS | {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "output_dir": str(folder)}
    model, processor = build_tiny("qwen2_5_omni")
    return OmniGRPOTrainer(
        model, spread_reward, args=OmniGRPOConfig(**given), processing_class=processor, train_dataset=ROWS
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer = trainer_in(folder)
    trainer.args.max_steps = 1
    trainer.train()
    return folder / "checkpoint-1"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt"])
def test_a_run_does_not_go_on_from_a_planted_state(checkpoint, tmp_path, mark, name):
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint-1")
    whole = torch.load(folder / name, weights_only=False) if (folder / name).exists() else None
    plant_torch(folder / name, mark, whole)
    with pytest.raises(ResumeError, match=rf"{name} is a pickle that would import posix\.mkdir"):
        trainer_in(tmp_path / "again").train(resume_from_checkpoint=folder)


@pytest.mark.slow
def test_a_run_goes_on_past_what_it_does_not_read(checkpoint, tmp_path, mark):
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint-1")
    plant_torch(folder / "training_args.bin", mark)
    plant_all(folder, mark)
    (folder / "scaler.pt").unlink()  # which would be read
    trainer = trainer_in(tmp_path / "again")
    trainer.train(resume_from_checkpoint=folder)
    assert trainer.state.global_step == 2


def write_sharded(folder, value=None):
    """As FSDP's sharded checkpoints: tensors, and what is none in pickles of its own."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()["state"], "lr": 0.1, "when": value}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    return folder


def test_sharded_checkpoints_are_looked_into_before_they_are_read(tmp_path, mark):
    whole = tmp_path / "whole" / "optimizer_0"
    write_sharded(whole)
    check_pickles(str(whole.parent))

    planted = tmp_path / "planted" / "optimizer_0"
    write_sharded(planted, Planted(mark))
    with pytest.raises(ResumeError, match=r"__0_0.distcp is a pickle that would import posix.mkdir"):
        check_pickles(str(planted.parent))

    (whole / ".metadata").write_bytes(planted_bytes(mark))
    with pytest.raises(ResumeError, match=r"\.metadata is a pickle that would import posix.mkdir"):
        check_pickles(str(whole.parent))


def test_sharded_checkpoints_would_run_what_is_planted(tmp_path):
    """The control: torch's own reader calls it, in the metadata and in a value."""
    folder, mark = write_sharded(tmp_path / "a", Planted(tmp_path / "mark")), tmp_path / "mark"
    dcp.load({"when": None}, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    assert mark.exists()
    mark.rmdir()
    (folder / ".metadata").write_bytes(planted_bytes(mark))
    with pytest.raises(dcp.api.CheckpointException):  # it is no metadata
        dcp.load({"when": None}, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    assert mark.exists()


def test_files_of_deepspeed_are_looked_into_before_they_are_read(tmp_path, mark):
    step = tmp_path / "global_step1"
    plain = {"module": {"w": torch.ones(2, dtype=torch.bfloat16)}, "lr_scheduler": {"n": 1}, "ds_version": "0.19"}
    step.mkdir()
    torch.save(plain, step / "mp_rank_00_model_states.pt")
    check_pickles(str(tmp_path))
    for plant in (plant_torch, plant_legacy):
        plant(step / "zero_pp_rank_0_mp_rank_00_optim_states.pt", mark)
        with pytest.raises(ResumeError, match="zero_pp_rank_0.*(would import posix.mkdir|cannot be looked into)"):
            check_pickles(str(tmp_path))
    # Of two records of one name, the one counts that torch reads.
    file = step / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    for one, other in ((plain, {"more": Planted(mark)}), ({"more": Planted(mark)}, plain)):
        torch.save(one, file)
        file.write_bytes(twice(file.read_bytes(), pickle.dumps(other)))
        try:
            check_pickles(str(tmp_path))
        except ResumeError:
            continue
        torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (pickle.dumps({"a": [1, 2.0, "x", None, {3}, (4,), b"y"]}), []),
        (pickle.dumps([torch.float32, torch.Size([1]), Path("a"), np.float64(1)]), []),
        (b"cposix\nsystem\n(S'true'\ntR.", ["posix.system"]),
        (b"(S'true'\niposix\nsystem\n.", ["posix.system"]),
        (b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.", ["posix.system"]),
        # A plain module, and on from it to what it has imported.
        (b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93\x8c\x04true\x85R.", ["torch.os.system"]),
        (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.", ["builtins.eval"]),
        (
            b"\x80\x04\x8c\x0dtorch.storage\x8c\x10_load_from_bytes\x93B\0\0\0\0\x85R.",
            ["torch.storage._load_from_bytes"],
        ),
    ],
)
def test_names_in_pickles(data, expected):
    assert foreign_names(io.BytesIO(data)) == expected


def test_a_name_that_is_made_up_while_it_is_read_is_no_way_round(tmp_path):
    """The module's name is the result of a call, which a stub gives."""
    data = b"\x80\x04cbuiltins\nstr\n\x8c\x05posix\x85R\x8c\x06system\x93\x8c\x04true\x85R."
    with pytest.raises(ValueError, match="STACK_GLOBAL requires str"):
        foreign_names(io.BytesIO(data))


# What else is read


def test_job_files_build_plain_data_only(tmp_path, mark):
    for text in (
        f"a: !!python/object/apply:os.mkdir ['{mark}']",
        f"a: !!python/object/new:os.mkdir ['{mark}']",
        "a: !!python/name:os.system",
    ):
        (tmp_path / "job.yaml").write_text(text)
        with pytest.raises(SetupError, match=re.escape(str(tmp_path / "job.yaml"))):
            read_job(str(tmp_path / "job.yaml"))


def test_a_cache_of_answers_is_not_unpickled(tmp_path, mark):
    ChatCache(tmp_path / "cache.db").put("k", {"text": "x"})
    with sqlite3.connect(tmp_path / "cache.db") as database:
        database.execute("UPDATE answers SET value = ?", (planted_bytes(mark),))
    assert ChatCache(tmp_path / "cache.db").get("k") is None


def test_reports_read_past_pickles(tmp_path, mark):
    plant_all(tmp_path, mark)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    assert cli.main(["report", str(tmp_path)]) in (0, 2)
