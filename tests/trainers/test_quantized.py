"""Training LoRA adapters beside weights of 4 and 8 bits, through `train()`."""

import gc
import json
import shutil
import weakref

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from omni_runs import DEFAULTS, one_row_per_tag, spread_reward, watch_updates
from peft import LoraConfig, PeftModel
from tiny_models import build_tiny, save_tiny
from transformers import BitsAndBytesConfig

from maple_trl import (
    AvatarConfig,
    AvatarTrainer,
    MAPOConfig,
    MAPOTrainer,
    OmniGRPOConfig,
    OmniGRPOTrainer,
    OmniSFTConfig,
    OmniSFTTrainer,
)
from maple_trl.omni import quantization
from maple_trl.omni.loading import load_model, load_processor
from maple_trl.omni.prefix import shared_prefix
from maple_trl.omni.quantization import describe, named_scales
from maple_trl.trainers.common.checkpoint import ResumeError
from maple_trl.trainers.common.quantized import check_run


pytestmark = pytest.mark.slow


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
INT8 = {"load_in_8bit": True}
KINDS = {"nf4": NF4, "int8": INT8}
G = 4
TRAINERS = {
    "grpo": (OmniGRPOTrainer, OmniGRPOConfig, {}),
    "mapo": (MAPOTrainer, MAPOConfig, {}),
    "avatar": (AvatarTrainer, AvatarConfig, {"replayed_generations": 1}),
}
SGD = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_steps": 2, "num_generations": G}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(save_tiny("qwen2_5_omni", tmp_path_factory.mktemp("model")))


def adapters():
    return LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|v_proj|down_proj)", task_type="CAUSAL_LM")


@pytest.fixture
def build(seven_tags, tmp_path, checkpoint):
    def make(kind="grpo", quantized=NF4, rows=None, **options):
        trainer_class, config, defaults = TRAINERS[kind]
        given = {"model": checkpoint, "peft_config": adapters(), "quantization_config": quantized}
        given |= {name: options.pop(name) for name in (*given, "processing_class") if name in options}
        given = {name: value for name, value in given.items() if value is not None}
        folders = {"output_dir": str(tmp_path / "run"), "media_root": str(seven_tags[0])}
        args = config(**(folders | DEFAULTS | {"num_generations": G, "max_steps": 2} | defaults | options))
        rows = one_row_per_tag(seven_tags[1]) if rows is None else rows
        return trainer_class(reward_funcs=spread_reward, args=args, train_dataset=rows, **given)

    return make


def state(model):
    """All that is trained, and all that is not, with what stands beside packed weights."""
    parts = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = {name: value for name, value in parts.items() if "lora_" in name}
    base = {name: value for name, value in parts.items() if name not in trained}
    return trained, base | {name: value.clone() for name, value in named_scales(model)}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("quantized", KINDS)
@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.matrix(cases=1)
def test_adapters_are_trained_and_nothing_else(build, kind, quantized):
    trainer = build(kind, KINDS[quantized])
    gradients, weights = [], []
    watch_updates(trainer, gradients, weights)
    adapter, base = state(trainer.model)
    assert describe(trainer.model).startswith({"nf4": "nf4, blocks of 64, nested 256", "int8": "int8"}[quantized])
    trainer.train()
    now, kept = state(trainer.model)
    assert trainer.state.global_step == 2 and trainer._sharing and same(base, kept)
    assert all(not torch.equal(value, adapter[name]) for name, value in now.items() if "lora_B" in name)
    # In the lowest layer too, which a gradient reaches through the packed weights of those above.
    lowest = [g for name, g in gradients[-1].items() if "layers.0." in name and "q_proj.lora_A" in name]
    assert len(lowest) == 1 and lowest[0].abs().max() > 0


@pytest.mark.parametrize("quantized", KINDS)
def test_supervised(seven_tags, tmp_path, checkpoint, quantized):
    rows = one_row_per_tag(seven_tags[1])
    rows = rows.add_column("completion", [[{"role": "assistant", "content": "yes"}]] * len(rows))
    options = {k: v for k, v in DEFAULTS.items() if k not in ("num_generations", "max_completion_length")}
    args = OmniSFTConfig(
        output_dir=str(tmp_path),
        media_root=str(seven_tags[0]),
        model_init_kwargs={"quantization_config": KINDS[quantized]},
        **(options | {"max_steps": 2, "learning_rate": 1e-2}),
    )
    trainer = OmniSFTTrainer(checkpoint, args, train_dataset=rows, peft_config=adapters())
    adapter, base = state(trainer.model)
    trainer.train()
    now, kept = state(trainer.model)
    assert same(base, kept) and not same(adapter, now)
    assert describe(trainer.model).startswith(quantized)


@pytest.mark.parametrize("quantized", KINDS)
@pytest.mark.parametrize("kind", ["mapo", "avatar"])
@pytest.mark.matrix(cases=1)
def test_sharing_prompts_is_training_as_without(build, kind, quantized, monkeypatch):
    """Of 4 bits in float32 as exactly as of whole weights; training with 8 bits on a CPU computes with what they stand for."""

    def run(shared):
        trainer, gradients = build(kind, KINDS[quantized], shared_prefix=shared, **SGD), []
        watch_updates(trainer, gradients, [])
        trainer.train()
        assert bool(trainer._sharing) == (shared == "on")
        return (
            trainer,
            losses(trainer),
            [{n: g.float() for n, g in step.items() if "lora_" in n} for step in gradients],
        )

    apart, expected, gradients = run("off")
    together, found, others = run("on")
    assert len(found) == 2 and found == pytest.approx(expected, abs=1e-6, rel=1e-4)
    for step, other in zip(gradients, others, strict=True):  # rounded to bfloat16, as adapters are
        most = max(gradient.norm() for gradient in step.values())
        assert most > 0 and all((g - other[n]).norm() <= 0.01 * g.norm() + 1e-3 * most for n, g in step.items())
    for name, value in state(apart.model)[0].items():
        assert (value.float() - state(together.model)[0][name].float()).abs().max() <= 2e-3  # adapters are bfloat16
    pack = shared_prefix.pack

    def too_far(*args, **kwargs):
        batch = pack(*args, **kwargs)
        positions = batch.position_ids.clone()
        positions[:, :, batch.suffix] += 1
        return type(batch)(**{**vars(batch), "position_ids": positions})

    monkeypatch.setattr("maple_trl.omni.prefix.sharing.pack", too_far)
    with pytest.raises(ValueError, match="prompts cannot be shared"):
        run("on")


def test_the_reference_is_the_model_without_its_adapter(build):
    trainer = build("grpo", NF4, beta=0.1, learning_rate=1e-2, gradient_accumulation_steps=1, max_steps=3)
    trainer.train()
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert trainer.ref_model is None and kl[0] == pytest.approx(0, abs=1e-6) and kl[-1] > 1e-6


class Kept(OmniGRPOTrainer):
    """Counts inputs of layers of few bits that are still there once a loss has been computed."""

    def _compute_loss(self, model, inputs):
        seen = []
        layers = [module for module in model.modules() if isinstance(module, Linear4bit | Linear8bitLt)]
        # Not those that the residual stream keeps anyway.
        layers = [layer for layer in layers if layer.in_features == self.watched]
        handles = [
            layer.register_forward_pre_hook(lambda _, args: seen.append(weakref.ref(args[0]))) for layer in layers
        ]
        loss = super()._compute_loss(model, inputs)
        for handle in handles:
            handle.remove()
        gc.collect()
        self.kept = sum(ref() is not None for ref in seen), len(seen)
        return loss


@pytest.mark.parametrize("quantized", KINDS)
@pytest.mark.matrix(cases=1)
def test_no_input_is_kept_for_weights_that_have_no_gradient(build, quantized, monkeypatch):
    """Layers of 8 bits would keep theirs, also with gradient checkpointing."""
    monkeypatch.setitem(TRAINERS, "kept", (Kept, OmniGRPOConfig, {}))

    def run(**more):
        trainer = build("kept", KINDS[quantized], **SGD, **more)
        trainer.watched = trainer.model.config.get_text_config().intermediate_size
        trainer.train()
        assert trainer.kept[1] > 0
        return trainer, losses(trainer), trainer.kept[0]

    plain, expected, kept = run()
    recomputed, found, kept_too = run(gradient_checkpointing=True)
    assert kept == kept_too == 0 and found == pytest.approx(expected, abs=1e-6)
    for name, value in state(plain.model)[0].items():
        assert (value.float() - state(recomputed.model)[0][name].float()).abs().max() <= 2e-3
    monkeypatch.setattr(quantization, "_let_go", lambda *args: None)
    *_, kept = run(gradient_checkpointing=True)
    assert (kept > 0) == (quantized == "int8")


@pytest.mark.long
@pytest.mark.parametrize("quantized", KINDS)
@pytest.mark.matrix(cases=1)
def test_a_resumed_run_is_the_whole_run(build, tmp_path, quantized):
    own = KINDS[quantized]
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "beta": 0.05}
    whole = build("grpo", own, **options)
    whole.train()
    expected = state(whole.model)[0]
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    first = str(tmp_path / "run" / "checkpoint-2")
    again = build("grpo", own, **options)
    again.train(resume_from_checkpoint=first)
    assert same(expected, state(again.model)[0])
    assert losses(again)[2:] == losses(whole)[2:]
    told = {"nf4": "nf4, blocks of 64", "int8": "int8, threshold 6"}[quantized]
    for other in (KINDS["int8" if quantized == "nf4" else "nf4"], {**NF4, "bnb_4bit_quant_type": "fp4"}, None):
        with pytest.raises(ResumeError, match=f"other settings: quantization {told}"):
            build("grpo", other, **options).train(resume_from_checkpoint=first)


def test_an_adapter_merges_into_the_whole_model(build, checkpoint, tmp_path):
    trainer = build("grpo", NF4, learning_rate=1e-2)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    ids = torch.arange(50, 80)[None]

    def logits(model):
        with torch.no_grad():
            return model.eval()(input_ids=ids).logits

    few = logits(trainer.model)
    again = load_model(checkpoint, quantization_config={**NF4, "bnb_4bit_compute_dtype": "float32"})
    read = PeftModel.from_pretrained(again, str(tmp_path / "adapter"))  # in float32, where the run's is bfloat16
    assert (logits(read) - few).abs().max() < 0.02
    for parameter in (p for name, p in read.named_parameters() if "lora_" in name):
        parameter.data = parameter.data.bfloat16()
    assert torch.equal(logits(read), few)
    adapted = PeftModel.from_pretrained(load_model(checkpoint), str(tmp_path / "adapter"))
    beside = logits(adapted)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert (logits(load_model(str(tmp_path / "merged"))) - beside).abs().max() < 1e-4
    plain = logits(load_model(checkpoint))
    moved, rounded = (beside - plain).norm(), (few - beside).norm()
    assert moved > 0 and 0 < rounded < 0.5 * plain.norm()  # what 4 bits round is not in it


def test_a_model_that_is_loaded_already(build, checkpoint):
    model = load_model(checkpoint, quantization_config=BitsAndBytesConfig(**INT8))
    processor = load_processor(checkpoint)
    trainer = build(model=model, processing_class=processor, quantized=None)
    trainer.train()
    assert describe(trainer.model).startswith("int8")
    with pytest.raises(ValueError, match="cannot be trained, only LoRA"):
        build(
            model=load_model(checkpoint, quantization_config=NF4),
            processing_class=processor,
            quantized=None,
            peft_config=None,
        )
    with pytest.raises(ValueError, match="no effect on a model that is loaded already"):
        build(model=build_tiny("qwen2_5_omni")[0], processing_class=processor, quantized=NF4)


NOWHERE = "/there/is/no/model"  # so nothing has been loaded


@pytest.mark.parametrize(
    "options, message",
    [
        ({"peft_config": None}, "use_peft: true"),
        ({"use_vllm": True, "vllm_mode": "server"}, "use_vllm does not go with weights of 4 or 8 bits"),
        ({"quantized": {"load_in_4bit": True, "load_in_8bit": True}}, "only one can be used"),
        ({"quantized": {"load_in_4bits": True}}, "no option 'load_in_4bits'"),
        ({"quantized": {"llm_int8_threshold": 3.0}}, "with load_in_4bit or load_in_8bit"),
        ({"quantized": {**INT8, "llm_int8_has_fp16_weight": True}}, "keeps weights in 16 bits"),
        ({"model_init_kwargs": {"quantization_config": INT8}}, "as an argument and in model_init_kwargs"),
    ],
)
def test_refusals_before_anything_is_loaded(build, options, message):
    with pytest.raises(ValueError, match=message):
        build(model=NOWHERE, **options)


def test_sharded_training_is_refused(build, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP does not go with"):
        build(model=NOWHERE)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    args = OmniGRPOConfig(use_cpu=True, bf16=False)
    check_run(args, adapted=True)
    args.deepspeed_plugin = object()
    with pytest.raises(ValueError, match="DeepSpeed does not go with"):
        check_run(args, adapted=True)


def test_without_bitsandbytes_the_extra_is_named(build, monkeypatch):
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'maple-trl\[quantization\]'"):
        build(model=NOWHERE)


def test_a_config_file_holds_it_too(build, checkpoint):
    """As a mapping in `model_init_kwargs`, and as JSON keeps it."""
    kept = json.loads(json.dumps(BitsAndBytesConfig(**NF4).to_dict()))
    trainer = build(quantized=None, model_init_kwargs={"quantization_config": kept})
    assert describe(trainer.model).startswith("nf4, blocks of 64, nested 256")
