"""Memory that is counted against tensors of real training steps, and what must hold of any plan."""

from dataclasses import replace

import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from omni_runs import build_trainer, one_row_per_tag
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from maple_trl.omni.families import family_for
from maple_trl.omni.lora import linear_modules
from maple_trl.planning.catalogue import GPUS, MODELS
from maple_trl.planning.duration import decode_step, pass_operations
from maple_trl.planning.memory import (
    HEAD_WIDTH,
    cache_bytes,
    gradient_bytes,
    head_bytes,
    optimizer_bytes,
    saved_bytes,
    weight_bytes,
)
from maple_trl.planning.plan import advise, make_plan
from maple_trl.planning.setup import DTYPES, SHARDINGS, PlanError, Setup
from maple_trl.planning.sizes import PARTS, Media, read_sizes


OMNI_3B = read_sizes(MODELS["Qwen/Qwen2.5-Omni-3B"], "Qwen2.5-Omni-3B")


def setup_of(model, **more):
    """A tiny model in float32."""
    return Setup(read_sizes(model.config.to_dict()), GPUS["H100"], **{"dtype": "float32", "compute": "float32"} | more)


def size_of(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


# Against tensors


class Watch(TrainerCallback):
    """Bytes of gradients before an update, and of the optimizer's state after it."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients = size_of(p.grad for p in model.parameters() if p.grad is not None)

    def on_optimizer_step(self, args, state, control, optimizer, **kwargs):
        inner = getattr(optimizer, "optimizer", optimizer)
        states = [
            value for own in inner.state.values() for value in own.values() if value.dim()
        ]  # not the count of steps
        self.optimizer = size_of(states)


@pytest.mark.parametrize("rank", [0, 4])
def test_weights_gradients_optimizer_and_cache_of_a_step(seven_tags, rank):
    folder, rows = seven_tags
    model, processor = tiny_models.build_tiny("qwen2_5_omni")
    watch, caches = Watch(), []
    family = family_for(model, processor)
    names = [name for names in linear_modules(model, family).values() for name in names]
    adapters = {"peft_config": LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM")} if rank else {}
    tags = one_row_per_tag(rows)
    both = tags.filter(lambda row: row["tag"] == "VAS")  # a prompt for which every part has a gradient
    options = {"model": model, "processing_class": processor, "callbacks": [watch], **adapters}
    trainer = build_trainer(folder, both, gradient_accumulation_steps=1, shared_prefix="on", **options)

    def keep(module, args, output):
        cache = getattr(output, "past_key_values", None) or output.get("cache")
        if cache is not None:
            caches.append(
                (cache.get_seq_length(), size_of(s for layer in cache.layers for s in (layer.keys, layer.values)))
            )

    trainer._agree_on_sharing()  # on a prompt of its own
    handle = family.core(trainer.model).language_model.register_forward_hook(keep)
    trainer.train()
    handle.remove()
    trained = PARTS if not rank else ("llm", "vision", "audio", "projectors")
    setup = setup_of(model, lora_r=rank, trained=trained)
    assert weight_bytes(setup) == size_of(trainer.model.parameters())
    # A parameter that no forward uses has no gradient: the marks of Qwen2.5-Omni's talker.
    unused = 0 if rank else size_of(p for name, p in model.named_parameters() if "audio_bos_eos_token" in name)
    assert watch.gradients == gradient_bytes(setup) - unused
    assert watch.optimizer == optimizer_bytes(setup) - 2 * unused
    length, held = max(caches)
    rows_of_rollout = trainer.args.per_device_train_batch_size
    assert held == cache_bytes(setup.model.text, rows_of_rollout * length, DTYPES["float32"])


class Allocations(TorchDispatchMode):
    """Tensors that operations make anew."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.empty.memory_format, torch.ops.aten.zeros.default):
            self.made.append(output)
        return output


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_head_holds_a_tile_and_gradients_in_float32(dtype, trained):
    text = read_sizes(MODELS["Qwen/Qwen3-0.6B"]).text
    text = replace(text, vocab=1000, hidden=16)
    hidden = torch.randn(40, text.hidden, dtype=getattr(torch, dtype), requires_grad=True)
    weight = torch.randn(text.vocab, text.hidden, dtype=hidden.dtype, requires_grad=trained)
    targets = torch.randint(text.vocab, (40,))
    values, *_ = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, HEAD_WIDTH, None, 1.0, ())
    with Allocations() as found:
        values.sum().backward()
    large = [tensor for tensor in found.made if tensor.dim() == 2]
    assert size_of([*large, hidden]) == head_bytes(text, 40, DTYPES[dtype], trained)


def kept_by(model, ids) -> int:
    """Bytes that a forward keeps for its backward, but for weights."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    sizes, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model(input_ids=ids, use_cache=False)
    return sum(sizes.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", tiny_models.QWEN)
def test_what_a_forward_keeps(name, dtype, checkpointing):
    """Within 3 %, of experts 10 %: tokens that chose the same one share what is kept of its products."""
    model, _ = tiny_models.build_tiny(name)
    model = model.to(getattr(torch, dtype)).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    rows, length = 2, 48
    setup = setup_of(
        model,
        prompt=length - 8,
        completion=8,
        num_generations=rows,
        per_device_train_batch_size=rows,
        shared_prefix=False,
        gradient_checkpointing=checkpointing,
        dtype=dtype,
        compute=dtype,
    )
    kept = kept_by(model, torch.randint(20, 60, (rows, length)))
    assert saved_bytes(setup) == pytest.approx(kept, rel=0.1 if name == "qwen3_omni" else 0.03)
    # Negative control: a row more is seen.
    more = replace(setup, per_device_train_batch_size=rows + 1, num_generations=rows + 1)
    assert saved_bytes(more) > kept * 1.3


# What must hold of any plan


@st.composite
def setups(draw):
    group = draw(st.sampled_from([2, 4, 8]))
    return Setup(
        OMNI_3B,
        GPUS[draw(st.sampled_from(sorted(GPUS)))],
        gpus=draw(st.sampled_from([1, 2, 8, 16])),
        prompt=draw(st.integers(256, 8192)),
        completion=draw(st.integers(8, 2048)),
        media=Media(draw(st.integers(0, 192)), draw(st.integers(0, 64))),
        num_generations=group,
        per_device_train_batch_size=group * draw(st.integers(1, 3)),
        gradient_accumulation_steps=draw(st.integers(1, 4)),
        beta=draw(st.sampled_from([0.0, 0.04])),
        shared_prefix=draw(st.booleans()),
        encoder_cache=draw(st.booleans()),
        gradient_checkpointing=draw(st.booleans()),
        lora_r=draw(st.sampled_from([0, 16])),
        trained=draw(st.sampled_from([PARTS, ("llm", "head")])),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        sharding=draw(st.sampled_from(SHARDINGS)),
        rollout=draw(st.sampled_from(["transformers", "vllm_colocate"])),
    )


def seconds(setup) -> float:
    return sum(phase.seconds for phase in make_plan(setup).phases)


@given(setups())
def test_more_of_anything_takes_more(setup):
    memory, time = make_plan(setup).memory.peak, seconds(setup)
    for more in (
        replace(setup, prompt=setup.prompt + 128),
        replace(setup, completion=setup.completion + 64),
        replace(setup, per_device_train_batch_size=setup.per_device_train_batch_size + setup.num_generations),
    ):
        assert make_plan(more).memory.peak >= memory
        # An engine whose cache holds fewer completions at once samples them in more turns, each of them smaller.
        if setup.rollout == "transformers":
            assert seconds(more) >= time * (1 - 1e-9)
    assert make_plan(replace(setup, beta=0.1)).memory.peak >= memory
    if setup.dtype == "bfloat16":
        assert make_plan(replace(setup, dtype="float32")).memory.peak >= memory


@given(setups())
def test_what_saves_does_save(setup):
    rows = replace(setup, shared_prefix=False)
    assert pass_operations(replace(setup, shared_prefix=True), True) <= pass_operations(rows, True)
    assert weight_bytes(replace(setup, sharding="zero3")) <= weight_bytes(replace(setup, sharding="zero2"))
    states = [optimizer_bytes(replace(setup, sharding="zero2", gpus=gpus)) for gpus in (2, 4, 8)]
    assert states == sorted(states, reverse=True)
    assert optimizer_bytes(replace(setup, lora_r=16)) < optimizer_bytes(replace(setup, lora_r=0))
    checkpointed, plain = (replace(setup, gradient_checkpointing=on) for on in (True, False))
    assert saved_bytes(checkpointed) < saved_bytes(plain)
    assert pass_operations(checkpointed, True) > pass_operations(plain, True)
    plan = make_plan(setup)
    assert (seconds(setup) > 0) == plan.engine_fits


@given(setups())
def test_advice_is_true(setup):
    plan = make_plan(setup)
    if plan.verdict == "fits":
        return
    for _, peak in advise(plan):
        assert peak / setup.rate("counted_memory") <= plan.usable


def test_a_step_of_decoding_is_bound_by_what_takes_longest():
    one = Setup(OMNI_3B, GPUS["H200"], media=Media(3072, 512))
    assert decode_step(one, 8, 4096)[1] == "kernel launches"
    free = replace(one, rates={"launch_layer_ms": 0, "decode_share": 1}, gpu=replace(GPUS["H200"], bandwidth=4300))
    step, bound = decode_step(free, 8, 4096)
    assert bound == "memory bandwidth" and step == pytest.approx(1.73e-3, rel=0.01)
    assert decode_step(free, 8, 8192)[0] == pytest.approx(2.01e-3, rel=0.01)


def test_an_engine_that_holds_no_completion_does_not_fit():
    small = Setup(OMNI_3B, GPUS["RTX-4090"], rollout="vllm_colocate", vllm_gpu_memory_utilization=0.1, lora_r=16)
    plan = make_plan(small)
    assert not plan.engine_fits and plan.verdict == "does not fit" and plan.phases == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"gpus": 0}, "gpus must be at least 1, got 0"),
        ({"completion": 0}, "completion must be at least 1"),
        ({"num_generations": 1}, "num_generations must be at least 2"),
        ({"num_generations": 3}, "a rollout of 8 completions .* num_generations 3: make it a multiple"),
        ({"sharding": "zero4"}, "sharding must be one of none, zero2, zero3, fsdp, got 'zero4'"),
        ({"optim": "lion"}, "optim must be one of adamw, adamw_8bit, sgd"),
        ({"media": Media(4000, 200)}, "a prompt of 4096 tokens cannot hold 4000 of video and 200 of audio"),
        ({"media": Media(-1, 0)}, "video_tokens must be at least 0, got -1"),
        ({"media": Media(8, 0, 0, 224)}, "a frame must have pixels, got frame_height 0"),
        ({"trained": ()}, "nothing would be trained"),
        ({"rates": {"compute_share": 0}}, r"compute_share must be in \(0, 1\], got 0"),
        ({"rates": {"launch_layer_ms": -1}}, "launch_layer_ms must be 0 or more, got -1"),
        ({"rollout_gpus": 1, "gpus": 2}, "rollout_gpus .* goes with vllm_mode server alone"),
        ({"rollout": "vllm_server", "rollout_gpus": 2, "gpus": 2}, "leave at least one to train on"),
        ({"rollout": "vllm_colocate", "vllm_tensor_parallel_size": 2}, "1 cards cannot be divided into engines"),
        ({"rollout": "vllm_colocate", "vllm_gpu_memory_utilization": 1.5}, r"must be in \(0, 1\]"),
    ],
)
def test_what_no_trainer_could_run_is_refused(options, told):
    with pytest.raises(PlanError, match=told):
        Setup(OMNI_3B, GPUS["H100"], **options)


def test_media_without_a_tower_are_refused():
    text = read_sizes(MODELS["Qwen/Qwen3-8B"], "Qwen/Qwen3-8B")
    with pytest.raises(PlanError, match="Qwen/Qwen3-8B has no tower for video: video_tokens must be 0"):
        Setup(text, GPUS["H100"], media=Media(8, 0))


@pytest.mark.parametrize(("batch", "group"), [(8, 8), (4, 8), (3, 8), (12, 8), (6, 4), (16, 4), (5, 3)])
def test_prompts_of_a_micro_batch(batch, group):
    rows = [row // group for row in range(batch * group)]
    counts = [len(set(rows[start : start + batch])) for start in range(0, len(rows), batch)]
    options = {"num_generations": group, "per_device_train_batch_size": batch, "gradient_accumulation_steps": group}
    assert Setup(OMNI_3B, GPUS["H100"], **options).micro_prompts == max(counts)
