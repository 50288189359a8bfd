"""Training with prompts that are passed once is training with prompts that are passed once per completion."""

import dataclasses
import json
import logging
import re
from collections import Counter, defaultdict
from contextlib import contextmanager

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from omni_runs import DEFAULTS, one_row_per_tag, sharing_error, spread_reward
from tiny_models import FAMILIES, build_tiny, save_tiny
from trl.trainer import utils as trl_utils

from maple_trl import AvatarConfig, AvatarTrainer, MAPOConfig, MAPOTrainer, OmniGRPOConfig, OmniGRPOTrainer
from maple_trl.omni.families import family_for
from maple_trl.omni.loading import load_model, load_processor
from maple_trl.omni.lora import build_lora_config, freeze
from maple_trl.omni.media.loader import MediaLimits, MediaLoader
from maple_trl.omni.prefix import sharing
from maple_trl.omni.prefix.packed_attention import install
from maple_trl.omni.prompt import PromptBuilder
from maple_trl.omni.serving import serve_media
from maple_trl.rollout import transformers_engine
from maple_trl.trainers.common import updates
from maple_trl.trainers.common.updates import micro_batches
from maple_trl.trainers.omni_grpo import trainer as omni_grpo


pytestmark = pytest.mark.slow


BOUND = 1e-5
G = 4
# Plain gradient descent: Adam makes steps of one size out of gradients that are rounding alone.
SGD = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_steps": 2, "num_generations": G}
LOGGED = ("loss", "kl", "entropy", "grad_norm", "reward", "reward_std", "completions/mean_length")


class Watched:
    """Notes what is sampled, and what is trained on in which way."""

    def __init__(self, *args, **kwargs):
        self.sampled, self.trained, self.packed, self.plain = [], [], 0, 0
        super().__init__(*args, **kwargs)

    def _generate_single_turn(self, *args, **kwargs):
        found = super()._generate_single_turn(*args, **kwargs)
        self.sampled += [list(map(int, ids)) for ids in found[0]]
        return found

    def _forward_with_media(self, *args, **inputs):
        self.plain += 1
        return super()._forward_with_media(*args, **inputs)

    def _forward_packed(self, *args, **inputs):
        self.plain, self.packed = self.plain - 1, self.packed + 1
        return super()._forward_packed(*args, **inputs)

    def _compute_loss(self, model, inputs):
        self.trained.append([(p.key, p.tag, int(m.sum())) for p, m in zip(*self.columns(inputs), strict=True)])
        return super()._compute_loss(model, inputs)

    @staticmethod
    def columns(inputs):
        return inputs[omni_grpo.PROMPTS_KEY], inputs["completion_mask"]


class Omni(Watched, OmniGRPOTrainer):
    pass


class MAPO(Watched, MAPOTrainer):
    pass


class Avatar(Watched, AvatarTrainer):
    pass


CONFIGS = {Omni: OmniGRPOConfig, MAPO: MAPOConfig, Avatar: AvatarConfig}


def build(folder, rows, tmp_path, shared, kind=Omni, family="qwen2_5_omni", reward=spread_reward, **options):
    given = {name: options.pop(name) for name in ("model", "processing_class", "peft_config") if name in options}
    eval_dataset = options.pop("eval_dataset", None)
    if "model" not in given:
        given["model"], given["processing_class"] = build_tiny(family)
    options = {**DEFAULTS, **SGD, "output_dir": str(tmp_path / f"run-{shared}"), "media_root": str(folder), **options}
    args = CONFIGS[kind](shared_prefix=shared, **options)
    return kind(reward_funcs=reward, args=args, train_dataset=rows, eval_dataset=eval_dataset, **given)


def trained(*args, **options):
    trainer = build(*args, **options)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    after = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    assert any(not torch.equal(value, before[name]) for name, value in after.items())
    return trainer, after


def logged(trainer, names=LOGGED):
    return [{name: e[name] for name in names if name in e} for e in trainer.state.log_history if "loss" in e]


def worst(one, two):
    """The largest relative difference (L2) of two sets of weights, and where."""
    floor = 1e-3 * max(float(value.norm()) for value in one.values())
    return max((float((two[n] - v).norm()) / max(float(v.norm()), floor), n) for n, v in one.items())


def both(folder, rows, tmp_path, prepared=dict, **options):
    """The same run with and without sharing; `prepared` makes what a run needs of its own."""
    off, plain = trained(folder, rows, tmp_path, "off", **prepared(), **options)
    on, shared = trained(folder, rows, tmp_path, "on", **prepared(), **options)
    assert (off.packed, on.packed > 0) == (0, True)
    assert on.sampled == off.sampled
    assert on.trained == off.trained
    assert len(logged(on)) == len(logged(off)) >= 2
    for one, two in zip(logged(off), logged(on), strict=True):
        assert one.keys() == two.keys() and two == pytest.approx(one, rel=1e-4, abs=1e-5)
    error, where = worst(plain, shared)
    assert error <= BOUND, (error, where)
    return off, on


# The same numbers

WAYS = {
    "one update": {},
    "several updates": {"steps_per_generation": 2, "num_iterations": 2, "max_steps": 4},
    "accumulation": {"gradient_accumulation_steps": 4, "steps_per_generation": 8},
    "no multiple of the group": {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2},
    "less than a group": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "single rows": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    "several groups": {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1},
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "top entropy": {"top_entropy_quantile": 0.5},
    "masked truncation": {"mask_truncated_completions": True, "generation_kwargs": {"forced_eos_token_id": None}},
    "sequences": {"importance_sampling_level": "sequence", "num_iterations": 2, "max_steps": 4},
}


# What differs from others in the number of rows alone.
SIZES = ("accumulation", "several groups", "single rows")


@pytest.mark.parametrize(
    "options",
    [pytest.param(way, id=name, marks=[pytest.mark.long] * (name in SIZES)) for name, way in WAYS.items()],
)
@pytest.mark.matrix(cases=3)
def test_training_is_the_same(options, seven_tags, tmp_path):
    folder, dataset = seven_tags
    if "mask_truncated_completions" in options:  # else none ends by itself, and there is nothing to train on
        options = {"mask_truncated_completions": True, "max_completion_length": 40, "temperature": 2.0, "max_steps": 3}
    both(folder, dataset, tmp_path, **options)


def from_disk(tmp_path, family="qwen2_5_omni"):
    """TRL loads a reference model from where the policy was loaded."""
    path = str(save_tiny(family, tmp_path / "model"))

    def prepared():
        return {"model": load_model(path, dtype="float32"), "processing_class": load_processor(path)}

    return prepared


@pytest.mark.long
def test_with_a_reference_model_on_mixed_batches(seven_tags, tmp_path):
    folder, dataset = seven_tags
    options = {"beta": 0.1, "steps_per_generation": 2, "num_iterations": 2, "max_steps": 4}
    rows = one_row_per_tag(dataset)
    off, on = both(folder, rows, tmp_path, from_disk(tmp_path), **options, per_device_train_batch_size=6)
    assert [entry["kl"] > 1e-6 for entry in logged(on)] == [False, True, True, True]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen2_5_omni"])
@pytest.mark.matrix(cases=3)
def test_in_every_family(family, seven_tags, tmp_path):
    folder, dataset = seven_tags
    spec = FAMILIES[family]
    fed = [tag for tag in dataset["tag"] if ("V" not in tag or spec.has_vision) and ("A" not in tag or spec.has_audio)]
    rows = dataset.filter(lambda r: r["tag"] in set(fed))
    # A load-balancing loss of experts is the reason of another test.
    options = {"router_aux_loss_coef": 0.0} if family == "qwen3_omni" else {}
    both(folder, rows, tmp_path, family=family, per_device_train_batch_size=8, **options)


def test_with_experts_the_training_pass_is_shared_where_it_can_be(seven_tags, tmp_path):
    """The load-balancing loss counts a prompt once per completion; without it nothing speaks against sharing."""
    folder, dataset = seven_tags
    rows = one_row_per_tag(dataset)
    off, on = both(folder, rows, tmp_path, family="qwen3_omni", router_aux_loss_coef=0.0)
    assert on.plain == 0


def test_of_experts_with_a_balancing_loss_it_is_said(seven_tags, tmp_path, caplog):
    """It is on by default for these models: then 'on' does not share the training pass, which a user must be told."""
    folder, dataset = seven_tags
    with caplog.at_level(logging.INFO, logger="maple_trl"):
        trainer, _ = trained(folder, one_row_per_tag(dataset), tmp_path, "on", family="qwen3_omni")
    assert trainer.plain > 0
    assert any("router" in record.message or "balanc" in record.message for record in caplog.records)


def test_with_adapters(seven_tags, tmp_path):
    folder, dataset = seven_tags

    def prepared():
        torch.manual_seed(0)
        model, processor = build_tiny("qwen2_5_omni")
        config = build_lora_config(model, family_for(model, processor), r=4, alpha=8)
        return {"model": model, "processing_class": processor, "peft_config": config}

    rows = one_row_per_tag(dataset)
    # From zero, B must first grow: larger steps than of whole weights.
    both(folder, rows, tmp_path, prepared, beta=0.05, learning_rate=1.0, gradient_checkpointing=True)


def test_with_frozen_towers_and_their_cache(seven_tags, tmp_path):
    folder, dataset = seven_tags

    def prepared():
        model, processor = build_tiny("qwen2_5_omni")
        freeze(model, family_for(model, processor), "vision", "audio", "projectors")
        return {"model": model, "processing_class": processor}

    off, on = both(folder, one_row_per_tag(dataset), tmp_path, prepared, num_iterations=2, max_steps=4)
    assert on.towers.misses > 0 and on.towers.hits > 0


def test_interleaved_rows(seven_tags, tmp_path):
    folder, dataset = seven_tags
    rows = dataset.filter(lambda r: r["tag"] in ("VA", "VAS"))
    both(folder, rows, tmp_path, audio_in_video=True, per_device_train_batch_size=8)


def test_bfloat16_stays_within_its_noise(seven_tags, tmp_path):
    folder, dataset = seven_tags
    rows = one_row_per_tag(dataset)
    (off, one), (on, two) = (
        trained(folder, rows, tmp_path, shared, bf16=True, max_steps=2) for shared in ("off", "on")
    )
    assert on.packed > 0 and worst(one, two)[0] < 0.02
    # The first rollout is drawn from the same weights; rounding alone may change a token of it.
    same = sum(a == b for a, b in zip(on.sampled[:8], off.sampled[:8], strict=True))
    assert same >= 6


@pytest.mark.parametrize("batching", ["mixed", "stratified"])
@pytest.mark.matrix(cases=1)
def test_mapo(batching, seven_tags, tmp_path):
    folder, dataset = seven_tags
    # Rollouts without any media are regrouped only where sharing is asked for.
    rows = dataset.filter(lambda r: r["tag"] in ("VA", "A", "VAS"))
    options = {"batching": batching, "per_device_train_batch_size": 6}
    both(folder, rows, tmp_path, kind=MAPO, **options)


def of_all_but_text(completions, tag, **kwargs):
    """Groups of a subtitle alone are rewarded alike, and dropped."""
    return [0.5 if t == "S" else v for t, v in zip(tag, spread_reward(completions), strict=True)]


def test_mapo_with_filtering_and_a_reference_model(seven_tags, tmp_path):
    folder, dataset = seven_tags
    options = {
        "dynamic_sampling": "early",
        "beta": 0.05,
        "num_iterations": 2,
        "max_steps": 4,
        "batching": "mixed",
    }
    rows = dataset.filter(lambda r: r["tag"] in ("VA", "S", "VAS", "A"))
    prepared = from_disk(tmp_path)
    off, on = both(folder, rows, tmp_path, prepared, kind=MAPO, reward=of_all_but_text, **options)
    tags = {tag for batch in on.trained for _, tag, count in batch if count}
    assert (
        tags and "S" not in tags and len(on.sampled) > sum(len(batch) for batch in on.trained) / 2
    )  # some were dropped


@pytest.mark.parametrize("options", [{}, {"beta": 0.05, "num_iterations": 2, "steps_per_generation": 2}])
@pytest.mark.matrix(cases=1)
def test_avatar_with_replayed_rows_and_hints(options, seven_tags, tmp_path):
    folder, dataset = seven_tags
    rows = [dict(row, hint="Look closely.") for row in one_row_per_tag(dataset).select(range(4))]

    def hard(completions, **kwargs):
        return [value * 0.2 for value in spread_reward(completions)]

    options = {
        "replayed_generations": 2,
        "hints": True,
        "hint_visits": 1,
        "hint_max_kl": 10.0,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 8,
        **options,
    }
    off, on = both(folder, Dataset.from_list(rows), tmp_path, from_disk(tmp_path), kind=Avatar, reward=hard, **options)
    keys = [key for batch in on.trained for key, _, _ in batch]
    assert any(key.endswith("+hint") for key in keys) and not all(key.endswith("+hint") for key in keys)
    assert len(on.memory.buffer.sizes()) and on.state.log_history[-2].get("replay/rate", 1) != 0


# Rewards that need a pass of their own


def test_log_probabilities_for_rewards(seven_tags, tmp_path):
    folder, dataset = seven_tags
    seen = defaultdict(list)

    def reward(completions, completion_logprobs, **kwargs):
        seen[len(seen)] = completion_logprobs
        return spread_reward(completions)

    both(folder, one_row_per_tag(dataset), tmp_path, reward=reward)
    calls = list(seen.values())
    half = len(calls) // 2
    for one, two in zip(calls[:half], calls[half:], strict=True):
        for a, b in zip(one, two, strict=True):
            assert b == pytest.approx(a, abs=1e-4)


# Counts


class Counts:
    """Per call: clips that a tower reads, tokens of the language model and rows of its head."""

    def __init__(self, core, monkeypatch):
        self.clips, self.tokens, self.head = [], [], []
        core.visual.register_forward_pre_hook(
            lambda m, a, k: self.clips.append(("video", len(k["grid_thw"]))), with_kwargs=True
        )
        core.audio_tower.register_forward_pre_hook(
            lambda m, a, k: self.clips.append(("audio", len(k["feature_lens"]))), with_kwargs=True
        )
        core.language_model.register_forward_pre_hook(self._note_tokens, with_kwargs=True)
        kernel = trl_utils._ChunkedLogProbFunction
        counts = self

        class Counting:
            @staticmethod
            def apply(hidden, *args):
                counts.head.append(len(hidden))
                return kernel.apply(hidden, *args)

        monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", Counting)

    def _note_tokens(self, module, args, kwargs):
        size, mask = kwargs["inputs_embeds"].shape[:2], kwargs.get("attention_mask")
        # The padding between prompts of different lengths is no token.
        self.tokens.append(int(mask.sum()) if mask is not None and mask.shape == size else size.numel())

    def take(self):
        """What was counted since the last time."""
        found = dataclasses.make_dataclass("Counted", ("clips", "tokens", "head"))(self.clips, self.tokens, self.head)
        self.clips, self.tokens, self.head = [], [], []
        return found


class Counted(Omni):
    """Keeps what passes in each rollout and in each training pass; whatever passes elsewhere is in `elsewhere`."""

    counts: Counts

    def __init__(self, *args, **kwargs):
        self.rollouts, self.passes, self.elsewhere = [], [], []
        super().__init__(*args, **kwargs)

    def _try_sharing(self, prompt):
        fits = super()._try_sharing(prompt)
        self.compared = prompt
        self.counts.take()
        return fits

    def _generate_single_turn(self, *args, **kwargs):
        self.elsewhere.append(self.counts.take())
        found = super()._generate_single_turn(*args, **kwargs)
        self.rollouts.append((self.counts.take(), list(self._serving), found[0]))
        return found

    def _compute_loss(self, model, inputs):
        self.elsewhere.append(self.counts.take())
        loss = super()._compute_loss(model, inputs)
        prompts, mask = self.columns(inputs)
        self.passes.append((self.counts.take(), list(prompts), int(mask.sum())))
        return loss


CONFIGS[Counted] = OmniGRPOConfig


def counted(folder, rows, tmp_path, monkeypatch, frozen=False, **options):
    """A run with sharing, watched."""
    model, processor = build_tiny("qwen2_5_omni")
    if frozen:
        freeze(model, family_for(model, processor), "vision", "audio", "projectors")
    trainer = build(folder, rows, tmp_path, "on", kind=Counted, model=model, processing_class=processor, **options)
    trainer.counts = Counts(trainer.family.core(trainer.model), monkeypatch)
    trainer.train()
    return trainer


def unique(prompts):
    return list({prompt.key: prompt for prompt in prompts}.values())


def clips_of(prompts):
    return {(kind, prompt.media_digest(kind)) for prompt in prompts for kind in prompt.kinds}


def about_different_clips(dataset):
    """One row per clip."""
    first = {}
    for i, clip in enumerate(dataset["video"]):
        first.setdefault(clip, i)
    return dataset.select([i for clip, i in first.items() if clip])


def read(counts):
    """How many clips the towers read."""
    return sum(number for found in counts for _, number in found.clips)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.matrix(cases=2)
def test_each_prompt_and_clip_is_read_once(size, frozen, seven_tags, tmp_path, monkeypatch):
    """
    In a rollout and in an optimizer step on it; of frozen towers, in the whole run. Nothing else passes through the model.
    """
    folder, dataset = seven_tags
    rows = about_different_clips(dataset)
    options = {"per_device_train_batch_size": size, "max_steps": 4}
    trainer = counted(folder, rows, tmp_path, monkeypatch, frozen, **options)
    slots = trainer.args.gradient_accumulation_steps
    assert len(trainer.rollouts) == 4 and len(trainer.passes) == 4 * slots
    assert not any(found.clips or found.tokens or found.head for found in trainer.elsewhere)
    known = set()  # also after the comparison, which is on a clip that no row has
    for counts, prompts, completions in trainer.rollouts:
        clips, once = clips_of(prompts), unique(prompts)
        assert len(prompts) == size * slots == G * len(once)
        assert read([counts]) == len(clips - known)
        assert counts.tokens[0] == sum(map(len, once))
        steps = max(map(len, completions)) - 1  # the first token comes with the prompt
        assert counts.tokens[1:] == [len(prompts)] * steps
        known |= clips if frozen else set()
    for start in range(0, len(trainer.passes), slots):  # an optimizer step
        step = trainer.passes[start : start + slots]
        clips = clips_of(prompt for _, prompts, _ in step for prompt in prompts)
        assert read(counts for counts, *_ in step) == (0 if frozen else len(clips))
        for counts, prompts, completion in step:
            once = unique(prompts)
            assert len(once) == size // G
            # A completion's first token is read off the prompt's last, which stands before each completion.
            assert sum(counts.tokens) == sum(map(len, once)) - len(once) + completion
            assert sum(counts.head) == completion
    assert len(clips_of(prompt for _, prompts, _ in trainer.passes for prompt in prompts)) >= 4


def test_without_sharing_the_counts_say_so(seven_tags, tmp_path, monkeypatch):
    """The control of the counts."""
    folder, dataset = seven_tags
    rows = one_row_per_tag(dataset)
    trainer = build(folder, rows, tmp_path, "off", kind=Counted, max_steps=1)
    trainer.counts = Counts(trainer.family.core(trainer.model), monkeypatch)
    trainer.train()
    [(counts, prompts, _)] = trainer.rollouts
    assert counts.tokens[0] == sum(map(len, prompts)) == G * sum(map(len, unique(prompts)))
    for counts, prompts, completion in trainer.passes:
        assert sum(counts.tokens) == sum(map(len, prompts)) + completion


def test_two_prompts_about_one_clip_read_it_once(seven_tags, tmp_path, monkeypatch):
    """A tower pass per unique clip, not per unique prompt, where towers are trained."""
    folder, dataset = seven_tags
    row = next(r for r in dataset if r["tag"] == "VA")
    rows = Dataset.from_list([row, dict(row, prompt=[{"role": "user", "content": "And what else?"}])])
    options = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 1}
    trainer = counted(folder, rows, tmp_path, monkeypatch, **options)
    assert len(trainer.rollouts) == len(trainer.passes) == 1
    for counts, prompts, _ in trainer.rollouts + trainer.passes:
        assert len(unique(prompts)) == 2 and len(clips_of(prompts)) == 2
        assert counts.clips == [("video", 1), ("audio", 1)]


# Groups stay together


@pytest.mark.parametrize("tag", ["VA", "S"])
def test_groups_stay_together(tag, seven_tags, tmp_path):
    """Also of prompts without media: their text is shared as well."""
    folder, dataset = seven_tags
    rows = dataset.filter(lambda r: r["tag"] == tag)
    trainer, _ = trained(folder, rows, tmp_path, "on", gradient_accumulation_steps=4, generation_batch_size=16)
    assert [len({key for key, *_ in batch}) for batch in trainer.trained] == [1] * len(trainer.trained)


@pytest.mark.parametrize("whole", [True, False])
def test_groups_stay_together_when_others_were_dropped(whole, seven_tags, tmp_path, monkeypatch):
    """Three of four groups, two to a micro-batch; and rows as even as they can be, as the control."""
    folder, dataset = seven_tags
    if not whole:
        monkeypatch.setattr(updates, "micro_batches", lambda *args, group, **kwargs: micro_batches(*args, **kwargs))
    rows = one_row_per_tag(dataset).filter(lambda r: r["tag"] in ("VA", "S", "VAS", "A"))
    options = {"dynamic_sampling": "early", "batching": "mixed", "per_device_train_batch_size": 2 * G, "max_steps": 2}
    trainer, _ = trained(folder, rows, tmp_path, "on", kind=MAPO, reward=of_all_but_text, **options)
    sizes = [Counter(key for key, *_ in batch) for batch in trainer.trained]
    assert [sum(size.values()) for size in sizes] == ([8, 4] if whole else [6, 6]) * 2
    assert all(count == G for size in sizes for count in size.values()) == whole


def test_a_size_that_splits_groups_is_told_once(seven_tags, tmp_path, caplog):
    folder, dataset = seven_tags
    with caplog.at_level(logging.INFO, logger="maple_trl"):
        trained(folder, one_row_per_tag(dataset), tmp_path, "on", per_device_train_batch_size=6)
    told = [r for r in caplog.records if "not a multiple of num_generations" in r.message]
    assert len(told) == 1 and "(6)" in told[0].message and "(4)" in told[0].message


# Falling back


def late_positions(original, steps=3):
    def pack(rows, completions, lengths):
        batch = original(rows, completions, lengths)
        positions = batch.position_ids.clone()
        positions[..., batch.suffix] += steps
        return dataclasses.replace(batch, position_ids=positions)

    return pack


def swapped_prefill(original):
    @contextmanager
    def share_prefill(core, rows):
        def last_but_one(module, args, kwargs, output):
            if output.last_hidden_state.size(1) > 1:
                output.last_hidden_state = output.last_hidden_state[:, :-1]
            return output

        handle = core.register_forward_hook(last_but_one, with_kwargs=True)
        try:
            with original(core, rows):
                yield
        finally:
            handle.remove()

    return share_prefill


def no_numbers(original):
    def spoil(module, args, output):
        output.last_hidden_state.fill_(torch.nan)

    @contextmanager
    def share_prefill(core, rows):
        with original(core, rows):
            handle = core.register_forward_hook(spoil)
            try:
                yield
            finally:
                handle.remove()

    return share_prefill


FAULTS = {
    "late positions": (omni_grpo, "pack", late_positions),
    "another position": (transformers_engine, "share_prefill", swapped_prefill),
    "no numbers": (transformers_engine, "share_prefill", no_numbers),
}


def test_a_fault_in_training_moves_the_weights(seven_tags, tmp_path, monkeypatch):
    """The control of the comparisons above: a fault that only training meets, one position late."""
    folder, dataset = seven_tags
    _, plain = trained(folder, dataset, tmp_path, "off")
    monkeypatch.setattr(omni_grpo, "pack", late_positions(omni_grpo.pack, 1))
    on, shared = trained(folder, dataset, tmp_path, "on")
    assert on.packed > 0 and worst(plain, shared)[0] > 100 * BOUND


@pytest.mark.parametrize(("used_by", "name", "fault"), FAULTS.values(), ids=list(FAULTS))
@pytest.mark.matrix(cases=1)
def test_auto_falls_back_where_both_ways_differ(used_by, name, fault, seven_tags, tmp_path, monkeypatch, caplog):
    folder, dataset = seven_tags
    rows = one_row_per_tag(dataset)
    off, plain = trained(folder, rows, tmp_path, "off")
    for module in (sharing, used_by):
        monkeypatch.setattr(module, name, fault(getattr(module, name)))
    with caplog.at_level(logging.WARNING, logger="maple_trl"):
        auto, weights = trained(folder, rows, tmp_path, "auto")
    [warning] = [r for r in caplog.records if "shared_prefix='auto'" in r.getMessage()]
    assert "times as much as rounding explains" in warning.getMessage()
    assert auto.packed == 0 and auto.sampled == off.sampled
    assert all(torch.equal(value, weights[name]) for name, value in plain.items())
    with pytest.raises(ValueError, match="shared_prefix='on', but prompts cannot be shared: log-probabilities differ"):
        trained(folder, rows, tmp_path, "on")


def late_after_media(original):
    late = late_positions(original)

    def pack(rows, completions, lengths):
        return (late if any(row.kinds for row in rows) else original)(rows, completions, lengths)

    return pack


def test_the_comparison_is_on_a_prompt_with_media(seven_tags, tmp_path, monkeypatch, caplog):
    """Where a batch begins with text: of that, positions are easy."""
    folder, dataset = seven_tags
    rows = [next(row for row in dataset if row["tag"] == tag) for tag in ("S", "VA")]
    for module in (sharing, omni_grpo):
        monkeypatch.setattr(module, "pack", late_after_media(module.pack))
    with caplog.at_level(logging.WARNING, logger="maple_trl"):
        auto, _ = trained(folder, Dataset.from_list(rows), tmp_path, "auto", max_steps=1, shuffle_dataset=False)
    assert auto.packed == 0 and "times as much as rounding explains" in caplog.text


def test_the_comparison_needs_no_logits_of_the_prompt(seven_tags, tmp_path):
    """Which after 8192 tokens take gigabytes, where training itself never has them."""
    folder, dataset = seven_tags
    rows = one_row_per_tag(dataset)
    trainer = build(folder, rows, tmp_path, "on")
    _, prompts = trainer.encode_rows(rows)
    sizes = []
    trainer.model.get_output_embeddings().register_forward_pre_hook(lambda m, args: sizes.append(args[0].shape[:2]))
    assert trainer._try_sharing(prompts[0])
    assert sizes == [(3, 1)]  # of two rows that share it, and of the one that both are compared with


def compared(folder, rows, tmp_path, **options):
    """The trainer of a run of one step, and the tokens and rows that each pass of its comparison has."""
    options = {"max_steps": 1, "gradient_accumulation_steps": 1, **options}
    trainer = build(folder, rows, tmp_path, "auto", **options)
    passes, original = [], trainer._try_sharing
    core = trainer.family.core(trainer.model)

    def watched(prompt):
        note = lambda m, args, kwargs: passes.append(tuple(kwargs["inputs_embeds"].shape[:2]))  # noqa: E731
        handle = core.language_model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            return original(prompt)
        finally:
            handle.remove()

    trainer._try_sharing = watched
    trainer.train()
    return trainer, passes


@pytest.mark.parametrize("bf16", [False, True])
def test_the_comparison_is_short_whatever_the_prompts_are(bf16, seven_tags, tmp_path, caplog):
    """Three passes, on all kinds of media where a batch holds text alone; and it is said how long they took."""
    folder, dataset = seven_tags
    row = next(row for row in dataset if row["tag"] == "S")
    long = Dataset.from_list([dict(row, subtitle="many words " * 200)])
    with caplog.at_level(logging.INFO, logger="maple_trl"):
        trainer, passes = compared(folder, long, tmp_path, bf16=bf16)
    probe = trainer.prompt_builder.probe()
    assert probe.kinds == ("image", "video", "audio") and len(probe) < len(trainer.encode_rows(long)[1][0]) / 5
    assert passes == [(2, len(probe) + 8), (1, len(probe) - 1 + 8 + 7), (1, len(probe))]
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    begun, ended = [text for text in told if "no pass of the model reads it" not in text]
    assert begun == (
        f"shared_prefix='auto': comparing a prompt of {len(probe)} tokens (image, video, audio, text) passed once for two "
        "completions, and once for each"
    )
    assert re.fullmatch(r"Both ways agree, which took \d+\.\d s to find: completions share their prompt", ended)
    assert trainer.packed > 0


def test_two_more_passes_find_out_what_rounding_explains(seven_tags, tmp_path, monkeypatch):
    folder, dataset = seven_tags
    monkeypatch.setattr(sharing, "pack", late_positions(sharing.pack))
    trainer, passes = compared(folder, one_row_per_tag(dataset), tmp_path)
    assert len(passes) == 5 and trainer.packed == 0


def test_a_template_without_media_is_compared_on_text(seven_tags, tmp_path):
    folder, dataset = seven_tags
    model, processor = build_tiny("qwen2_5_omni")
    processor.chat_template = processor.tokenizer.chat_template = TEXT_ALONE
    rows = dataset.filter(lambda r: r["tag"] == "S")
    trainer, passes = compared(folder, rows, tmp_path, model=model, processing_class=processor)
    assert trainer.prompt_builder.probe().kinds == () and len(passes) == 3 and trainer._sharing
    processor.chat_template = "{{ raise_exception('no such conversation') }}"
    assert trainer.prompt_builder.probe().kinds == ()


TEXT_ALONE = """\
{%- for message in messages -%}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}{%- for block in message['content'] -%}{{ block['text'] }}{%- endfor -%}{%- endif -%}
{%- endfor -%}"""


# Rounding is what can tell the two ways apart: in float32 two families stand for all, and `make test-long` tries the rest.
IN_FLOAT32 = ("qwen2_5_omni", "gemma4")


@pytest.mark.parametrize(
    ("family", "bf16"),
    [
        pytest.param(name, bf16, marks=[pytest.mark.long] * (not bf16 and name not in IN_FLOAT32))
        for name in FAMILIES
        for bf16 in (False, True)
    ],
)
@pytest.mark.matrix(cases=2)
def test_auto_shares_where_both_ways_agree(family, bf16, seven_tags, tmp_path, caplog):
    """Also under autocast to bfloat16, which TRL switches on unless told otherwise."""
    folder, dataset = seven_tags
    spec = FAMILIES[family]
    tag = spec.has_vision * "V" + spec.has_audio * "A" + "S"
    rows = dataset.filter(lambda r: r["tag"] == tag)
    options = {"bf16": bf16} | ({"router_aux_loss_coef": 0.0} if family == "qwen3_omni" else {})
    with caplog.at_level(logging.WARNING, logger="maple_trl"):
        auto, _ = trained(folder, rows, tmp_path, "auto", family=family, max_steps=1, **options)
    assert auto.packed > 0 and auto.plain == 0
    assert not [r for r in caplog.records if "shared_prefix" in r.getMessage()]


def measured(family_name, folder, rows, precision, monkeypatch):
    """What the comparison finds for sharing that is right, and for positions that are one too late."""
    right, wrong = [], []
    for seed in range(2 if precision == "bfloat16" else 1):
        model, processor = build_tiny(family_name, seed)
        family = family_for(model, processor)
        if precision == "bfloat16":
            model.bfloat16()
        trl_utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        assert install(model)
        core = family.core(model)
        if precision == "mixed":
            AcceleratorState._reset_state()
            model = Accelerator(mixed_precision="bf16").prepare_model(model)
            AcceleratorState._reset_state()
        builder = PromptBuilder(
            family, MediaLoader(folder, MediaLimits(num_frames=4, min_pixels=1024, max_pixels=4096))
        )

        def serve(model, prompts, packed=False, family=family):
            return serve_media(family, model, prompts, packed=packed)

        for prompt in (builder.probe(), *map(builder.encode, rows)):
            right.append(sharing_error(model, core, prompt, serve))
            with monkeypatch.context() as patch:
                patch.setattr(sharing, "pack", late_positions(sharing.pack, 1))
                wrong.append(sharing_error(model, core, prompt, serve))
    return right, wrong


@pytest.mark.parametrize(
    ("family", "precision"),
    [
        pytest.param(name, precision, marks=[pytest.mark.long] * (precision != "bfloat16" and name not in IN_FLOAT32))
        for name in FAMILIES
        for precision in ("float32", "mixed", "bfloat16")
    ],
)
@pytest.mark.matrix(cases=2)
def test_the_comparison_tells_rounding_from_faults(family, precision, seven_tags, monkeypatch):
    folder, dataset = seven_tags
    spec = FAMILIES[family]
    rows = [r for r in one_row_per_tag(dataset) if set(r["tag"]) <= {"S", spec.has_vision * "V", spec.has_audio * "A"}]
    right, wrong = measured(family, folder, rows, precision, monkeypatch)
    # Rounding sends some token of this one to another expert: then prompts are not shared, which is never wrong.
    assert max(right) <= (3 if (family, precision) == ("gemma4_moe", "bfloat16") else 1), (max(right), min(wrong))
    assert min(wrong) > 1, (max(right), min(wrong))


def test_other_attention_falls_back(seven_tags, tmp_path, caplog):
    folder, dataset = seven_tags
    path = str(save_tiny("qwen2_5_omni", tmp_path / "model"))

    def prepared():
        model = load_model(path, dtype="float32", attn_implementation="eager")
        return {"model": model, "processing_class": load_processor(path)}

    rows = one_row_per_tag(dataset)
    with caplog.at_level(logging.WARNING, logger="maple_trl"):
        auto, weights = trained(folder, rows, tmp_path, "auto", **prepared())
    assert auto.packed == 0 and "attention is not sdpa, flex_attention or FlashAttention" in caplog.text
    _, plain = trained(folder, rows, tmp_path, "off", **prepared())
    assert all(torch.equal(value, weights[name]) for name, value in plain.items())
    with pytest.raises(
        ValueError, match="shared_prefix='on', but prompts cannot be shared: the language model's attention"
    ):
        trained(folder, rows, tmp_path, "on", **prepared())


@pytest.mark.long
def test_towers_may_have_an_attention_of_their_own(seven_tags, tmp_path):
    """Their own kernels, beside prompts that are shared: the same numbers."""
    folder, dataset = seven_tags
    path, found = str(save_tiny("qwen2_5_omni", tmp_path / "model")), {}
    towers = {"vision_config": "eager", "audio_config": "eager"}
    for attention in ("sdpa", towers):
        options = {"model_init_kwargs": {"dtype": "float32", "attn_implementation": attention}, "beta": 0.1}
        parts = {"model": path, "processing_class": None}
        trainer, weights = trained(folder, one_row_per_tag(dataset), tmp_path, "on", **parts, **options)
        kind = "sdpa" if attention == "sdpa" else "eager"
        found[kind] = trainer.sampled, weights
        for core in map(trainer.family.core, (trainer.model, trainer.ref_model)):
            parts = [core.visual.config, core.audio_tower.config, core.language_model.config]
            assert [part._attn_implementation for part in parts] == [kind, kind, "sdpa"]
    assert found["sdpa"][0] == found["eager"][0]
    assert worst(found["sdpa"][1], found["eager"][1])[0] <= BOUND


def test_a_reference_model_with_other_attention_falls_back(seven_tags, tmp_path, caplog):
    folder, dataset = seven_tags
    prepared = from_disk(tmp_path)
    trainer = build(folder, one_row_per_tag(dataset), tmp_path, "auto", beta=0.1, **prepared())
    trainer.ref_model.config.get_text_config()._attn_implementation = "eager"
    with caplog.at_level(logging.WARNING, logger="maple_trl"):
        trainer.train()
    assert trainer.packed == 0 and "attention is not sdpa, flex_attention or FlashAttention" in caplog.text


def test_the_comparison_draws_no_random_numbers(seven_tags, tmp_path):
    folder, dataset = seven_tags
    rows = one_row_per_tag(dataset)
    trainer = build(folder, rows, tmp_path, "on")
    _, prompts = trainer.encode_rows(rows)
    state = torch.get_rng_state()
    trainer.model.train()
    modes = [module.training for module in trainer.model.modules()]
    assert trainer._try_sharing(prompts[0]) is True
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in trainer.model.modules()] == modes


def test_other_values_are_refused(seven_tags, tmp_path):
    folder, dataset = seven_tags
    with pytest.raises(ValueError, match="shared_prefix must be one of 'auto', 'on', 'off', got 'yes'"):
        build(folder, dataset, tmp_path, "yes")


# Around the training


def test_evaluation_and_completions(seven_tags, tmp_path):
    folder, dataset = seven_tags
    rows = one_row_per_tag(dataset)
    found = []
    for shared in ("off", "on"):
        options = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8}
        trainer = build(folder, rows, tmp_path, shared, eval_dataset=rows.select(range(4)), **options)
        torch.manual_seed(0)
        first = trainer.evaluate()
        torch.manual_seed(0)
        texts = trainer.generate_completions(rows.to_list(), batch_size=3)
        trainer.train()
        entries = [e for e in trainer.state.log_history if "eval_reward" in e]
        found.append((first, texts, entries, trainer))
    (first, texts, entries, off), (shared_first, shared_texts, shared_entries, on) = found
    assert shared_texts == texts and len(texts) == 7
    assert len(entries) == len(shared_entries) >= 2 and on.packed > 0
    for one, two in [(first, shared_first), *zip(entries, shared_entries, strict=True)]:
        names = [name for name in one if "loss" in name or "reward" in name or "entropy" in name]
        assert names and {n: two[n] for n in names} == pytest.approx({n: one[n] for n in names}, rel=1e-4, abs=1e-5)


def test_checkpoints_are_those_of_plain_transformers(seven_tags, tmp_path):
    folder, dataset = seven_tags
    for family in ("qwen2_5_omni", "qwen3_vl", "qwen2_audio"):
        tags = {"qwen3_vl": ("VS",), "qwen2_audio": ("AS",)}.get(family, ("VAS",))
        rows = dataset.filter(lambda r, tags=tags: r["tag"] in tags)
        options = {"family": family, "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
        trainer, weights = trained(folder, rows, tmp_path / family, "on", **options)
        trainer.save_model(str(tmp_path / family / "final"))
        assert trainer.packed
        for saved in (tmp_path / family / "final", *(tmp_path / family).glob("run-on/checkpoint-1")):
            for file in saved.glob("*.json"):
                assert file.name == "model_card.json" or "maple" not in file.read_text().lower(), file
            assert "attn_implementation" not in json.loads((saved / "config.json").read_text())
            loaded = type(trainer.model).from_pretrained(saved)
            assert loaded.config.get_text_config()._attn_implementation == "sdpa"
            assert all(torch.equal(p, weights[name]) for name, p in loaded.named_parameters())


@pytest.mark.parametrize("kind", [Omni, MAPO])
@pytest.mark.matrix(cases=1)
def test_a_run_that_is_resumed_goes_on_bit_for_bit(kind, seven_tags, tmp_path):
    """Also in the middle of a rollout, where nothing is generated before the next update."""
    folder, dataset = seven_tags
    rows = dataset.filter(lambda r: r["tag"] in ("VA", "VAS"))
    options = {"kind": kind, "num_iterations": 2, "steps_per_generation": 4, "max_steps": 4}
    options |= {"save_strategy": "steps", "save_steps": 2}
    whole, weights = trained(folder, rows, tmp_path, "on", **options)
    half = build(folder, rows, tmp_path / "half", "on", **options)
    half.train(resume_from_checkpoint=str(tmp_path / "run-on" / "checkpoint-2"))
    assert not half.sampled  # it goes on with the saved rollout
    assert half.packed > 0 and half.plain == 0
    different = [name for name, p in half.model.named_parameters() if not torch.equal(p, weights[name])]
    assert not different
