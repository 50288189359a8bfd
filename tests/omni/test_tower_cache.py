"""What frozen towers have made of clips is kept, found again, and never taken for something else."""

import errno
import json
import logging
import multiprocessing
import os
import random
import resource
from pathlib import Path

import programs
import pytest
import torch
from media_files import tone, write_audio, write_video
from omni_runs import build_trainer
from test_mixed_batches import batched, rows_of
from tiny_models import FAMILIES, build_tiny, save_tiny, towers_of
from torch.utils._python_dispatch import TorchDispatchMode

from maple_trl import OmniGRPOTrainer
from maple_trl.omni import towers
from maple_trl.omni.encoded import tensor_bytes
from maple_trl.omni.families import family_for
from maple_trl.omni.lora import build_lora_config, freeze
from maple_trl.omni.media.loader import MediaLimits, MediaLoader
from maple_trl.omni.prompt import PromptBuilder
from maple_trl.omni.serving import serve_media
from maple_trl.omni.towers import TowerCache


pytestmark = pytest.mark.slow


LIMITS = {"num_frames": 4, "min_pixels": 1024, "max_pixels": 4096}
TOWERS = ("visual", "audio_tower")
ROUNDING = 4e-5
"""Of towers that read other batches; of Gemma 4, which norms whatever it adds, 3e-5 was seen, of the others 1e-5."""
SCOPES = ("vision", "audio", "projectors")


class World:
    """A model with frozen towers, prompts, and the passes of its towers."""

    def __init__(self, name, folder, rows, seed=0):
        self.model, self.processor = build_tiny(name, seed)
        self.family = family_for(self.model, self.processor)
        freeze(self.model, self.family, *[scope for scope in SCOPES if scope in self.family.scopes])
        self.core = self.family.core(self.model)
        self.folder = folder
        self.prompts = self.encode(rows)
        self.passes = count_passes(self.core)

    def encode(self, rows, **limits):
        loader = MediaLoader(self.folder, MediaLimits(**{**LIMITS, **limits}))
        builder = PromptBuilder(self.family, loader)
        return [builder.encode(row) for row in rows]

    def logits(self, cache, prompts=None):
        rows = self.prompts if prompts is None else prompts
        completions = torch.arange(20, 23).expand(len(rows), 3)
        inputs, _ = batched(rows, completions, self.processor.tokenizer.pad_token_id)
        with torch.no_grad(), serve_media(self.family, self.model, rows, cache=cache):
            return self.model(**inputs).logits

    def passes_of(self, cache, prompts=None):
        """Tower passes of one more forward."""
        before = len(self.passes)
        self.logits(cache, prompts)
        return len(self.passes) - before


def count_passes(core):
    passes = []
    for name, tower in towers_of(core).items():
        tower.register_forward_pre_hook(lambda *a, name=name: passes.append(name), with_kwargs=True)
    return passes


def world_of(name, seven_tags, tags=None, seed=0):
    folder, dataset = seven_tags
    rows = [row for row in rows_of(name, dataset) if tags is None or row["tag"] in tags]
    return World(name, folder, rows, seed)


@pytest.fixture
def world(seven_tags):
    """One prompt that both towers read."""
    found = world_of("qwen2_5_omni", seven_tags, tags=("VAS",))
    found.prompts = found.prompts[:1]
    return found


# Hits


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.matrix(cases=7)
def test_the_numbers_are_those_without_a_cache(name, place, seven_tags, tmp_path):
    """Each clip passes its tower alone, whatever else is asked for: bit for bit the same when the cache answers."""
    world = world_of(name, seven_tags)
    towers = sum(len({p.media_digest(k) for p in world.prompts if k in p.kinds}) for k in ("video", "audio"))
    without = world.logits(None)
    cache = TowerCache(1 << 30) if place == "memory" else TowerCache(0, tmp_path)
    world.passes.clear()
    filled = world.logits(cache)
    assert len(world.passes) == towers
    torch.testing.assert_close(filled, without, rtol=1e-5, atol=ROUNDING)
    assert torch.equal(world.logits(cache), filled) and len(world.passes) == towers
    part = TowerCache(1 << 30)
    world.logits(part, world.prompts[:1])
    assert torch.equal(world.logits(part), filled)
    clips = {kind: {p.media_digest(kind) for p in world.prompts if kind in p.kinds} for kind in ("video", "audio")}
    assert (cache.hits, cache.misses) == (sum(map(len, clips.values())),) * 2


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.matrix(cases=3)
def test_only_unknown_clips_pass_a_tower(name, seven_tags):
    """A batch in which some are known; the towers then see other batches, so that rounding may differ."""
    folder, dataset = seven_tags
    world = World(
        name,
        folder,
        [
            row
            for row in dataset
            if ("V" in row["tag"]) <= FAMILIES[name].has_vision and ("A" in row["tag"]) <= FAMILIES[name].has_audio
        ],
    )
    expected = world.logits(None)
    cache = TowerCache(1 << 30)
    first = next(prompt for prompt in world.prompts if prompt.kinds)
    world.logits(cache, [first])
    misses = cache.misses
    torch.testing.assert_close(world.logits(cache), expected, atol=ROUNDING, rtol=0)
    assert 0 < misses < cache.misses
    assert world.passes_of(cache) == 0


def test_a_scale_that_is_no_parameter_decides_too(seven_tags, tmp_path):
    """Gemma 4's vision tower ends with one of its checkpoint's buffers."""
    world = world_of("gemma4_both_ways", seven_tags, tags=("V",))
    cache = TowerCache(1 << 30, tmp_path)
    before = world.logits(cache)
    world.core.vision_tower.std_bias.add_(0.5)
    after = world.logits(cache)
    assert (
        cache.misses == 2 * len({p.media_digest("video") for p in world.prompts})
        and (before - after).abs().max() > 1e-3
    )
    torch.testing.assert_close(after, world.logits(None), atol=ROUNDING, rtol=0)


def test_rows_with_the_same_clip_share_an_entry(seven_tags):
    """Another question about the same clip is another prompt."""
    world = world_of("qwen2_5_omni", seven_tags, tags=("V",))
    folder, dataset = seven_tags
    row = next(row for row in dataset if row["tag"] == "V")
    first, second = world.encode([row, dict(row, prompt=[{"role": "user", "content": "And now?"}])])
    assert first.key != second.key
    cache = TowerCache(1 << 30)
    world.logits(cache, [first, second])
    assert (cache.misses, cache.hits) == (1, 0)
    assert world.passes_of(cache, [second]) == 0


def test_what_is_handed_out_is_not_what_is_kept(world):
    """A forward that writes into its input must not reach the entry."""
    cache = TowerCache(1 << 30)
    world.logits(cache)
    for features in cache.features(world.family, world.core, "video", world.prompts):
        for values in features.values():
            values.zero_()
    assert torch.equal(world.logits(cache), world.logits(None))


# Keys


OTHER_READINGS = {"frames": {"num_frames": 2}, "size": {"min_pixels": 8192, "max_pixels": 16384}}


@pytest.mark.parametrize("limits", OTHER_READINGS.values(), ids=list(OTHER_READINGS))
def test_other_frames_and_sizes_are_other_entries(limits, tmp_path):
    write_video(tmp_path / "clip.mp4", frames=48, size=(128, 128))
    row = {"prompt": [{"role": "user", "content": "What?"}], "video": "clip.mp4", "tag": "V"}
    world = World("qwen2_5_omni", tmp_path, [row])
    cache = TowerCache(1 << 30)
    world.logits(cache)
    other = world.encode([row], **limits)
    assert other[0].media_digest("video") != world.prompts[0].media_digest("video")
    assert world.passes_of(cache, other) == 1
    assert torch.equal(world.logits(cache, other), world.logits(None, other))


def test_another_rate_never_gives_other_numbers(tmp_path):
    """The rate moves positions, and the tower's input only by the frames that it picks."""
    write_video(tmp_path / "clip.mp4", frames=48, size=(64, 64))
    row = {"prompt": [{"role": "user", "content": "What?"}], "video": "clip.mp4", "tag": "V"}
    world = World("qwen2_5_omni", tmp_path, [row])
    cache = TowerCache(1 << 30)
    for rate in (1.0, 2.0, 4.0):
        prompts = world.encode([row], num_frames=None, fps=rate)
        assert torch.equal(world.logits(cache, prompts), world.logits(None, prompts))


def test_other_sound_is_another_entry(tmp_path):
    rows = []
    for name, wave in (("a", tone(0.4, 16000)), ("b", tone(0.4, 16000, (880.0,))), ("c", tone(0.4, 16000))):
        write_audio(tmp_path / f"{name}.wav", wave)
        rows.append({"prompt": [{"role": "user", "content": "What?"}], "audio": f"{name}.wav", "tag": "A"})
    world = World("qwen2_5_omni", tmp_path, rows)
    cache = TowerCache(1 << 30)
    world.logits(cache)
    assert cache.misses == 2  # a and c hold the same samples
    torch.testing.assert_close(world.logits(cache), world.logits(None), rtol=1e-5, atol=1e-5)


# Weights


def test_weights_that_change_in_place_are_noticed(world):
    cache = TowerCache(1 << 30)
    before = world.logits(cache)
    with torch.no_grad():
        world.core.visual.patch_embed.proj.weight.mul_(1.5)
    assert world.passes_of(cache) == 1  # the audio tower is as it was
    after = world.logits(cache)
    assert torch.equal(after, world.logits(None)) and (after - before).abs().max() > 1e-3


def test_a_projector_that_changes_is_noticed(world):
    cache = TowerCache(1 << 30)
    world.logits(cache)
    with torch.no_grad():
        world.core.visual.merger.mlp[-1].weight.mul_(1.5)
    assert torch.equal(world.logits(cache), world.logits(None))


def test_weights_that_are_loaded_are_noticed(world):
    cache = TowerCache(1 << 30)
    world.logits(cache)
    world.model.load_state_dict(build_tiny("qwen2_5_omni", seed=1)[0].state_dict())
    assert world.passes_of(cache) == 2
    assert torch.equal(world.logits(cache), world.logits(None))


WRITES = {
    # as transformers' and TRL's helpers write: TRL's SyncRefModelCallback, PEFT's merging of adapters
    "in place through data": lambda weight: weight.data.mul_(1.5),
    "new data": lambda weight: setattr(weight, "data", weight.data * 1.5),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=list(WRITES))
def test_weights_that_change_behind_autograd_are_noticed(write, world):
    cache = TowerCache(1 << 30)
    world.logits(cache)
    write(world.core.visual.patch_embed.proj.weight)
    assert torch.equal(world.logits(cache), world.logits(None))


def test_a_parameter_that_is_replaced_is_noticed(world):
    cache = TowerCache(1 << 30)
    world.logits(cache)
    projection = world.core.visual.patch_embed.proj
    version = projection.weight._version
    new = torch.nn.Parameter(projection.weight.detach() * 1.5, requires_grad=False)
    with torch.no_grad():
        for _ in range(version - new._version):
            new.add_(0.0)
    assert new._version == version
    projection.weight = new
    assert torch.equal(world.logits(cache), world.logits(None))


class Operations(TorchDispatchMode):
    """Counts what is run, and what is asked for by the host."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_within_a_step_a_hit_looks_at_no_weight(world):
    """The control is a cache without a clock, which looks at each call."""
    now = [0]
    cache, watchful = TowerCache(1 << 30, clock=lambda: now[0]), TowerCache(1 << 30)
    counted = {}
    for name, each in (("clock", cache), ("none", watchful)):
        each.features(world.family, world.core, "video", world.prompts)
        with Operations() as ran:
            each.features(world.family, world.core, "video", world.prompts)
        counted[name] = ran.names
    assert counted["clock"] == ["aten::_to_copy"]
    assert len(counted["none"]) > len(list(world.core.visual.parameters()))
    now[0] += 1
    with Operations() as ran:
        cache.features(world.family, world.core, "video", world.prompts)
    assert len(ran.names) == len(counted["none"]) and (cache.hits, cache.misses) == (2, 1)


UNSEEN = {
    "through data": lambda projection: projection.weight.data.mul_(1.5),
    "replaced": lambda projection: setattr(
        projection, "weight", torch.nn.Parameter(projection.weight.detach() * 1.5, requires_grad=False)
    ),
}


@pytest.mark.parametrize("write", UNSEEN.values(), ids=list(UNSEEN))
def test_what_autograd_does_not_count_is_noticed_at_the_next_step(write, world):
    now = [0]
    cache = TowerCache(1 << 30, clock=lambda: now[0])
    before = world.logits(cache)
    write(world.core.visual.patch_embed.proj)
    assert torch.equal(world.logits(cache), before)
    now[0] += 1
    assert torch.equal(world.logits(cache), world.logits(None))


def test_what_autograd_counts_is_noticed_within_a_step(world):
    cache = TowerCache(1 << 30, clock=int)
    before = world.logits(cache)
    with torch.no_grad():
        world.core.visual.patch_embed.proj.weight.mul_(1.5)
    after = world.logits(cache)
    assert torch.equal(after, world.logits(None)) and not torch.equal(after, before)
    world.core.visual.patch_embed.requires_grad_(True)
    assert [world.passes_of(cache) for _ in range(2)] == [1, 1]
    world.core.visual.patch_embed.requires_grad_(False)
    assert world.passes_of(cache) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_features_wait_for_a_gpu_in_pinned_memory(world):
    world.model.cuda()
    cache = TowerCache(1 << 30)
    first, again = (cache.features(world.family, world.core, "video", world.prompts)[0] for _ in range(2))
    assert all(value.is_pinned() for kept in cache._memory.values() for value in kept.values())
    assert all(torch.equal(value, again[name]) and value.is_cuda for name, value in first.items())


@pytest.mark.parametrize("scope", SCOPES)
def test_what_is_trained_is_never_kept(scope, world):
    """Neither a tower nor its projector."""
    for name, parameter in world.core.named_parameters():
        if world.family.scope_of(name) == scope:
            parameter.requires_grad_(True)
            break
    cache = TowerCache(1 << 30)
    trained = {"vision": ["visual"], "audio": ["audio_tower"], "projectors": list(TOWERS)}[scope]
    world.logits(cache)
    world.passes.clear()
    world.logits(cache)
    assert world.passes == trained


def test_a_tower_that_is_trained_after_it_was_frozen_is_read_again(world):
    cache = TowerCache(1 << 30)
    world.logits(cache)
    world.core.visual.requires_grad_(True)
    rows = world.prompts
    inputs, _ = batched(rows, torch.arange(20, 23)[None], world.processor.tokenizer.pad_token_id)
    with serve_media(world.family, world.model, rows, cache=cache):
        world.model(**inputs).logits.square().mean().backward()
    assert world.core.visual.patch_embed.proj.weight.grad.any()


def test_a_model_with_other_weights_finds_nothing(world, seven_tags):
    """Policy and reference share the cache."""
    other = world_of("qwen2_5_omni", seven_tags, tags=("VAS",), seed=1)
    cache = TowerCache(1 << 30)
    world.logits(cache)
    assert other.passes_of(cache, world.prompts) == 2
    assert torch.equal(other.logits(cache, world.prompts), other.logits(None, world.prompts))
    same = world_of("qwen2_5_omni", seven_tags, tags=("VAS",))
    assert same.passes_of(cache, world.prompts) == 0
    assert torch.equal(world.logits(cache), world.logits(None))


def test_a_model_in_the_place_of_one_that_is_gone(seven_tags):
    """Python gives a new model the address of an old one; its weights must be looked at all the same."""
    cache = TowerCache(1 << 30)
    world = world_of("qwen2_5_omni", seven_tags, tags=("VAS",))

    class Core(torch.nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.visual = torch.nn.ParameterList([torch.tensor([scale])]).requires_grad_(False)

    digests, addresses = [], []
    for scale in range(1, 20):
        core = Core(float(scale))
        addresses.append(id(core))
        digests.append(cache._weights_digest(world.family, core, "video"))
        del core
    assert len(set(addresses)) < len(addresses)  # the case did occur
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("scope", ["vision", "audio", "projectors"])
def test_adapters_in_towers_are_never_kept(scope, seven_tags):
    from peft import get_peft_model

    world = world_of("qwen2_5_omni", seven_tags, tags=("VAS",))
    world.prompts = world.prompts[:1]
    chosen = {name: name == scope for name in ("vision", "audio", "projectors", "llm")}
    config = build_lora_config(world.model, world.family, **chosen, r=2)
    world.model = get_peft_model(world.model, config)
    cache = TowerCache(1 << 30)
    adapted = {"vision": ["visual"], "audio": ["audio_tower"], "projectors": list(TOWERS)}[scope]
    world.logits(cache)
    with torch.no_grad():
        for name, parameter in world.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    world.passes.clear()
    found = world.logits(cache)
    assert world.passes == adapted and torch.equal(found, world.logits(None))
    with world.model.disable_adapter():
        base = world.logits(cache)
        assert torch.equal(base, world.logits(None)) and not torch.equal(base, found)
    assert torch.equal(world.logits(cache), found)


def test_adapters_in_the_language_model_leave_the_cache(seven_tags):
    from peft import get_peft_model

    world = world_of("qwen2_5_omni", seven_tags, tags=("VAS",))
    config = build_lora_config(world.model, world.family, vision=False, audio=False, projectors=False, r=2)
    world.model = get_peft_model(world.model, config)
    cache = TowerCache(1 << 30)
    assert [world.passes_of(cache) for _ in range(2)] == [2, 0]
    with world.model.disable_adapter():
        assert world.passes_of(cache) == 0


def test_another_precision_is_another_entry(world, tmp_path):
    """Mixed precision leaves the weights in float32, and rounds what the towers make of a clip."""
    half = TowerCache(1 << 30, tmp_path)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        world.logits(half)
    for cache in (half, TowerCache(1 << 30, tmp_path)):  # in the same run, and in a later one
        assert torch.equal(world.logits(cache), world.logits(None))


# Bounds


def test_memory_is_bounded_and_the_oldest_go_first(seven_tags):
    world = world_of("qwen2_5_omni", seven_tags, tags=("V",))
    folder, dataset = seven_tags
    videos = sorted({row["video"] for row in dataset})
    rows = [{"prompt": [{"role": "user", "content": "?"}], "video": video, "tag": "V"} for video in videos]
    prompts = list({p.media_digest("video"): p for p in world.encode(rows)}.values())
    assert len(prompts) >= 3
    size = prompts[0].media_tokens["video"] * 64 * 4
    assert all(p.media_tokens["video"] * 64 * 4 == size for p in prompts)
    cache = TowerCache(2 * size)
    first, second, third = prompts[:3]
    world.logits(cache, [first])
    world.logits(cache, [second])
    world.logits(cache, [first])  # used again
    world.logits(cache, [third])  # the second must go
    assert cache._memory.currsize <= 2 * size
    assert [world.passes_of(cache, [p]) for p in (first, third, second)] == [0, 0, 1]


def test_an_entry_over_the_bound_is_not_kept(world):
    cache = TowerCache(16)
    expected = world.logits(None)
    for _ in range(2):
        assert world.passes_of(cache) == 2 and torch.equal(world.logits(cache), expected)
    assert cache._memory.currsize == 0


def entries(folder):
    return {path.name: path.stat().st_size for path in Path(folder).glob("*.safetensors")}


def test_the_disk_is_bounded_and_the_oldest_go_first(seven_tags, tmp_path):
    world = world_of("qwen2_5_omni", seven_tags, tags=("V",))
    folder, dataset = seven_tags
    videos = sorted({row["video"] for row in dataset})
    rows = [{"prompt": [{"role": "user", "content": "?"}], "video": video, "tag": "V"} for video in videos]
    prompts = list({p.media_digest("video"): p for p in world.encode(rows)}.values())[:3]
    probe = TowerCache(0, tmp_path / "probe")
    world.logits(probe, prompts[:1])
    [size] = entries(tmp_path / "probe").values()
    cache = TowerCache(0, tmp_path / "bounded", max_disk_bytes=2 * size)
    for age, prompt in enumerate(prompts[:2]):
        world.logits(cache, [prompt])
        for path in (tmp_path / "bounded").glob("*.safetensors"):
            if path.stat().st_mtime > 1e9 + 10:
                os.utime(path, (1e9 + age, 1e9 + age))
    assert world.passes_of(cache, prompts[:1]) == 0  # used again: now the youngest
    world.logits(cache, prompts[2:])
    assert sum(entries(tmp_path / "bounded").values()) <= 2 * size
    assert [world.passes_of(cache, [p]) for p in (prompts[0], prompts[2], prompts[1])] == [0, 0, 1]


def test_the_bound_of_the_disk_counts_what_a_killed_run_left(world, tmp_path):
    """A file half written, under a name of its own, goes as soon as nobody can be at it any more."""
    cache = TowerCache(0, tmp_path, max_disk_bytes=1 << 19)
    killed, writing = tmp_path / "killed.partial", tmp_path / "writing.partial"
    for path in (killed, writing):
        path.write_bytes(bytes(1 << 20))
    os.utime(killed, (1e9, 1e9))
    world.logits(cache)
    assert not killed.exists() and writing.exists()  # another process is still at it
    assert len(entries(tmp_path)) == 2
    killed.touch()
    os.utime(killed, (1e9, 1e9))
    TowerCache(0, tmp_path)
    assert not killed.exists() and writing.exists()


# The folder


SECOND_PROCESS = """
import json, sys
sys.path.insert(0, sys.argv[1])
from tiny_models import build_tiny
from maple_trl.omni.encoded import tensor_bytes
from maple_trl.omni.families import family_for
from maple_trl.omni.lora import freeze
from maple_trl.omni.media.loader import MediaLimits, MediaLoader
from maple_trl.omni.prompt import PromptBuilder
from maple_trl.omni.towers import TowerCache
folder, features, row, limits = json.loads(sys.argv[2])
model, processor = build_tiny("qwen2_5_omni")
family = family_for(model, processor)
freeze(model, family, "vision", "audio", "projectors")
prompt = PromptBuilder(family, MediaLoader(folder, MediaLimits(**limits))).encode(row)
cache = TowerCache(0, features)
found = [cache.features(family, family.core(model), kind, [prompt])[0]["tokens"] for kind in prompt.kinds]
print(json.dumps([cache.hits, cache.misses, [bytes(tensor_bytes(values)).hex() for values in found]]))
"""


def test_a_second_process_finds_the_entries(seven_tags, tmp_path):
    folder, dataset = seven_tags
    row = next(row for row in dataset if row["tag"] == "VAS")
    world = World("qwen2_5_omni", folder, [row])
    cache = TowerCache(0, tmp_path)
    own = [cache.features(world.family, world.core, kind, world.prompts)[0]["tokens"] for kind in ("video", "audio")]
    facts = json.dumps([str(folder), str(tmp_path), row, LIMITS])
    done = programs.run(["-c", SECOND_PROCESS, Path(__file__).parents[1], facts])
    assert done.returncode == 0, done.stderr[-3000:]
    hits, misses, found = json.loads(done.stdout.splitlines()[-1])
    assert (hits, misses) == (2, 0)
    assert found == [bytes(tensor_bytes(values)).hex() for values in own]


def _use(folder, seed, told):
    """Reads and writes entries in a folder that holds a third of them."""
    draw, cache = random.Random(seed), TowerCache(0, folder, max_disk_bytes=10 * 13_000)
    found = wrong = 0
    try:
        for number in draw.choices(range(30), k=400):
            features = cache._read(str(number))
            if features is None:
                cache._keep(str(number), {"tokens": torch.full((50, 64), float(number))})
            else:
                found += 1
                wrong += not torch.equal(features["tokens"], torch.full((50, 64), float(number)))
        told.put((found > 0, wrong, cache._disk_fails))
    except BaseException as error:
        told.put(repr(error))


def test_processes_write_and_remove_entries_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    told = context.Queue()
    processes = [context.Process(target=_use, args=(tmp_path, seed, told)) for seed in range(3)]
    for process in processes:
        process.start()
    found = [told.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert found == [(True, 0, False)] * 3
    assert sum(entries(tmp_path).values()) <= 10 * 13_000 and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_computed_again(part, world, tmp_path):
    expected = world.logits(TowerCache(0, tmp_path))
    assert len(entries(tmp_path)) == 2
    whole = entries(tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    cache = TowerCache(0, tmp_path)
    assert torch.equal(world.logits(cache), expected) and cache.misses == 2
    assert entries(tmp_path) == whole
    assert world.passes_of(cache) == 0


def test_entries_are_safetensors_and_nothing_else(world, tmp_path):
    from safetensors.torch import load_file

    world.logits(TowerCache(0, tmp_path))
    for path in tmp_path.iterdir():
        assert path.suffix == ".safetensors"
        values = load_file(path)
        assert all(torch.isfinite(value).all() for value in values.values()) and "tokens" in values
        assert b"pickle" not in path.read_bytes()[:16] and path.read_bytes()[:2] != b"PK"


def test_a_folder_that_is_gone_stops_nothing(world, tmp_path):
    expected = world.logits(None)
    cache = TowerCache(1 << 30, tmp_path / "features")
    (tmp_path / "features").rmdir()
    assert torch.equal(world.logits(cache), expected)


def test_a_full_disk_costs_the_entries_not_the_run(world, tmp_path, caplog):
    """Said once, and what was half written goes. A limit of the process stands for the disk's."""
    expected = world.logits(None)
    cache = TowerCache(1 << 30, tmp_path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256, limit[1]))
    try:
        with caplog.at_level(logging.WARNING, logger="maple_trl"):
            assert torch.equal(world.logits(cache), expected)
            left = list(tmp_path.iterdir())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    told = [record.getMessage() for record in caplog.records if "encoder cache" in record.getMessage()]
    assert len(told) == 1 and f"cannot write into {tmp_path}; going on without it" in told[0]
    assert not left and world.passes_of(cache) == 0


def test_a_folder_that_may_only_be_read_is_read(world, tmp_path, monkeypatch):
    """As one on a file system that was mounted so: it refuses to note that an entry was used."""
    expected = world.logits(TowerCache(0, tmp_path))

    def refused(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "utime", refused)
    cache = TowerCache(0, tmp_path)
    assert world.passes_of(cache) == 0 and cache.hits == 2
    assert torch.equal(world.logits(cache), expected)


def test_entries_can_be_read_by_whom_the_folder_is_shared_with(world, tmp_path):
    """As the folder's other files."""
    world.logits(TowerCache(0, tmp_path))
    (tmp_path / "other").touch()
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


# In training


def frozen_trainer(folder, dataset, scopes=SCOPES, path=None, trainer_class=OmniGRPOTrainer, **options):
    from maple_trl.omni.loading import load_model, load_processor

    if path is None:
        model, processor = build_tiny("qwen2_5_omni")
    else:
        model, processor = load_model(str(path), dtype="float32"), load_processor(str(path))
    freeze(model, family_for(model, processor), *scopes)
    trainer = build_trainer(
        folder, dataset, model=model, processing_class=processor, trainer_class=trainer_class, **options
    )
    return trainer, count_passes(trainer.family.core(trainer.model))


@pytest.mark.parametrize("shared", ["on", "off"])
def test_towers_run_once_per_clip_in_the_whole_run(shared, seven_tags):
    """Rollouts, old log-probabilities, iterations and later epochs; the audio tower once per batch of new clips."""
    folder, dataset = seven_tags
    rows = dataset.filter(lambda r: r["tag"] == "VA")
    trainer, passes = frozen_trainer(folder, rows, shared_prefix=shared, max_steps=6, num_iterations=2)
    trainer._agree_on_sharing()  # compares on a clip that no row has
    passes.clear()
    trainer.train()
    _, prompts = trainer.encode_rows(rows)
    clips = sum(len({p.media_digest(kind) for p in prompts}) for kind in ("video", "audio"))
    assert trainer.towers.misses == clips and len(passes) <= clips
    assert trainer.towers.hits > clips


@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.matrix(cases=1)
def test_training_is_the_same_with_and_without(disk, seven_tags, tmp_path):
    """Plain gradient descent: Adam makes steps of one size out of gradients that are rounding alone."""
    folder, dataset = seven_tags
    rows = dataset.filter(lambda r: r["tag"] in ("VA", "VAS", "A"))
    with_cache = {"encoder_cache_dir": str(tmp_path), "encoder_cache_bytes": 0} if disk else {}
    runs = []
    for options in (with_cache, {"encoder_cache_bytes": 0}):
        trainer, passes = frozen_trainer(folder, rows, max_steps=3, optim="sgd", learning_rate=0.05, **options)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        after = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        runs.append((len(passes), trainer.towers is None, before, after))
    (few, _, before, cached), (many, without, _, plain) = runs
    assert few < many and without
    assert any(not torch.equal(value, before[name]) for name, value in cached.items())
    for name, value in plain.items():
        assert (cached[name] - value).norm() <= 1e-5 * value.norm() or value.norm() < 1e-4, name


def test_weights_are_looked_at_once_per_optimizer_step(seven_tags, monkeypatch):
    """Those of each tower, however many rollouts and passes there are."""
    folder, dataset = seven_tags
    looks = []
    monkeypatch.setattr(towers, "_probe", lambda parameters, probe=towers._probe: looks.append(1) or probe(parameters))
    rows = dataset.filter(lambda r: r["tag"] == "VA")
    trainer, _ = frozen_trainer(folder, rows, max_steps=4, num_iterations=2)
    trainer.train()
    assert len(looks) == 2 * 4 and trainer.towers.hits > 2 * 4


def test_the_reference_model_uses_the_cache_too(seven_tags, tmp_path):
    """Its towers are frozen as much as the policy's, and hold the same weights."""
    folder, dataset = seven_tags
    rows = dataset.filter(lambda r: r["tag"] == "VA")
    path = save_tiny("qwen2_5_omni", tmp_path)
    trainer, passes = frozen_trainer(folder, rows, path=path, beta=0.05, max_steps=4, model_init_kwargs=None)
    reference = count_passes(trainer.family.core(trainer.ref_model))
    trainer._agree_on_sharing()
    passes.clear()
    trainer.train()
    assert len(passes) <= trainer.towers.misses
    assert not reference


def test_a_reference_that_follows_the_policy_is_read_again(seven_tags, tmp_path):
    """`sync_ref_model` writes the policy's weights into a reference whose parameters ask for no gradient."""
    folder, dataset = seven_tags
    rows = dataset.filter(lambda r: r["tag"] == "VA")
    path = save_tiny("qwen2_5_omni", tmp_path)
    model_options = {"model": str(path), "processing_class": None}
    runs = []
    for cached in (1 << 30, 0):
        trainer = build_trainer(
            folder,
            rows,
            **model_options,
            beta=0.05,
            max_steps=4,
            learning_rate=1e-2,
            sync_ref_model=True,
            ref_model_sync_steps=1,
            ref_model_mixup_alpha=0.5,
            encoder_cache_bytes=cached,
        )
        trainer.ref_model.requires_grad_(False)
        trainer.train()
        runs.append([entry["kl"] for entry in trainer.state.log_history if "kl" in entry])
    assert runs[0] == pytest.approx(runs[1], rel=1e-5) and runs[1][-1] > 0


def test_numbers_of_bytes_must_not_be_negative(seven_tags):
    folder, dataset = seven_tags
    for name in ("encoder_cache_bytes", "encoder_cache_disk_bytes"):
        with pytest.raises(ValueError, match=f"{name} must be at least 0, got -1"):
            build_trainer(folder, dataset, **{name: -1})


def test_no_cache_where_none_is_wanted(seven_tags):
    folder, dataset = seven_tags
    assert build_trainer(folder, dataset, encoder_cache_bytes=0).towers is None
    assert build_trainer(folder, dataset).towers is not None
