"""
Time of one GRPO step with media: every row by itself (naive) against once per clip and prompt (ours).

    python benchmarks/step_time.py --json step_time.json

Both sides are the same trainer with the same weights, rows, seed and number of threads, in one process, in turns: naive,
ours, naive, ours, … What else runs on the machine hits both alike on average. Where it runs much, the CPU time is the
better measure: it does not count the waiting.

- **naive** treats each of the G completions of a prompt as a sample of its own, as TRL does with images: its media are
  decoded for it, the processor runs for it, and its copy passes the towers in every forward. (It is still kind to TRL,
  which runs the processor twice per row, once for generation and once for the loss.)
- **ours** decodes a clip once, encodes a prompt once, and runs the towers once per prompt in every forward.

The cache of decoded clips is emptied before every step and nothing is decoded ahead, so ours gets no credit for clips
that it met before, nor for decoding that hides behind the step before.

A step is what one optimizer step needs up to the optimizer: the rollout of `groups` x `generations` rows, the
reference's log-probabilities, and for each micro-batch (one group's worth of rows) loss and backward. Before anything
is timed, both sides must sample the same completions and agree on loss and gradient.

A second comparison is about where clips are decoded: in threads of this process (`media_workers=0`) or in decoder processes,
which are the default. Here each batch is decoded while the step before runs, as in training; a few steps, in turns again.

The model has random weights and the shape of Qwen2.5-Omni, whose parts stand in the proportions of the 3B model: per
media token the vision tower does about as much work as the language model.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any


# Libraries read these when they are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import av
import numpy as np
import torch
import transformers
from datasets import Dataset
from transformers.utils.logging import disable_progress_bar

from maple_trl.data.daily_omni import load_daily_omni
from maple_trl.data.tiny_omni import build_model, build_processor
from maple_trl.omni.media.workers import WORKERS, close_decoders
from maple_trl.trainers.omni_grpo.config import OmniGRPOConfig
from maple_trl.trainers.omni_grpo.trainer import OmniGRPOTrainer


SIDES = ("naive", "ours")
PLACES = {"threads": 0, "processes": WORKERS}
BATCHES = 3  # of the comparison of places: the first is decoded by its own step, the others ahead
PHASES = {
    "decode_encode": "decode + encode",
    "prefill": "rollout: towers + prefill",
    "sampling": "rollout: sampling",
    "logprobs": "reference log-probs",
    "loss": "loss, forward",
    "backward": "loss, backward",
    "other": "everything else",
    "total": "whole step",
}
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "av", "numpy")
TOLERANCE = 1e-4
CLIP_RATE = 12  # frames per second
SAMPLING_RATE = 16_000


class RowByRowTrainer(OmniGRPOTrainer):
    """The naive baseline: no two rows share a decoded clip, an encoding or a pass through a tower."""

    def encode_rows(self, rows):
        # Media are served once per distinct prompt object. Here every row has its own. (The loader keeps nothing
        # either: see `media_cache_bytes` below.)
        prompts = [self.prompt_builder.encode(row) for row in rows]
        for number, prompt in enumerate(prompts):  # or equal clips would pass a tower once
            prompt._digests = dict.fromkeys(("video", "audio"), f"row {number}")
        return list(rows), prompts


def now() -> np.ndarray:
    """Wall clock and CPU time of this process, in seconds."""
    return np.array([time.perf_counter(), time.process_time()])


class Stopwatch:
    """Adds up time by phase and counts work, for one trainer."""

    def __init__(self, trainer: OmniGRPOTrainer):
        self.trainer = trainer
        self.seconds: defaultdict[str, np.ndarray] = defaultdict(lambda: np.zeros(2))  # wall and CPU time
        self.counts: Counter = Counter()
        self._rolling_out = False
        core = trainer.family.core(trainer.model)
        # Before the hook that merges media, which every forward registers anew and which runs the towers.
        core.register_forward_pre_hook(self._forward_begins, with_kwargs=True)
        core.register_forward_hook(self._forward_ends)
        for model in (core, trainer.family.core(trainer.ref_model) if trainer.ref_model is not None else None):
            if model is not None:
                model.visual.register_forward_pre_hook(self._count_patches, with_kwargs=True)
        self._wrap(trainer, "encode_rows", lambda: "decode_encode")
        self._wrap(trainer, "_generate_single_turn", lambda: "rollout")
        self._wrap(trainer, "_compute_loss", lambda: "loss")
        self._wrap(trainer.accelerator, "backward", lambda: "backward")
        self._wrap(
            trainer,
            "_get_per_token_logps_and_entropies",
            lambda: "loss_logprobs" if torch.is_grad_enabled() else "logprobs",
        )

    def _wrap(self, owner: Any, name: str, phase: Callable[[], str]) -> None:
        method = getattr(owner, name)

        def timed(*args, **kwargs):
            with self._clock(phase()):
                return method(*args, **kwargs)

        setattr(owner, name, timed)

    @contextmanager
    def _clock(self, phase: str):
        outer, self._rolling_out = self._rolling_out, phase == "rollout"
        start = now()
        try:
            yield
        finally:
            self.seconds[phase] += now() - start
            self._rolling_out = outer

    def _forward_begins(self, module, args, kwargs):
        width = kwargs["input_ids"].size(1) if kwargs.get("input_ids") is not None else 0
        self._prefill_start = now() if self._rolling_out and width > 1 else None

    def _forward_ends(self, module, args, output):
        if self._prefill_start is not None:
            self.seconds["prefill"] += now() - self._prefill_start

    def _count_patches(self, module, args, kwargs):
        patches = args[0] if args else kwargs["hidden_states"]
        self.counts["vision patches through the tower"] += patches.size(0)

    def step(self, rows: list[dict[str, Any]], seed: int) -> dict[str, Any]:
        """
        One step up to the optimizer, with an empty cache. Gradients stay in the model.

        Returns:
            `dict`: wall and CPU seconds per phase, counts, and the loss (mean over micro-batches).
        """
        trainer = self.trainer
        trainer.loader.close()  # empties the cache
        trainer.loader.decodes.clear()
        trainer.model.zero_grad(set_to_none=True)
        transformers.set_seed(seed)
        gc.collect()
        self.seconds.clear()
        self.counts.clear()
        micro_batches = trainer.args.gradient_accumulation_steps
        trainer.current_gradient_accumulation_steps = micro_batches  # the training loop sets it
        start = now()
        # The trainer makes the rollout in the first call and takes its rows by micro-batches.
        losses = [trainer.training_step(trainer.model, rows, None) for _ in range(micro_batches)]
        total = now() - start

        seconds = {name: self.seconds[name] for name in ("decode_encode", "prefill", "logprobs", "loss", "backward")}
        seconds["sampling"] = self.seconds["rollout"] - self.seconds["prefill"]
        seconds["other"] = total - sum(seconds.values())
        seconds["total"] = total
        for kind in ("video", "audio"):
            self.counts[f"{kind} decodes"] = sum(n for (k, _), n in trainer.loader.decodes.items() if k == kind)
        return {
            "wall": {name: float(seconds[name][0]) for name in PHASES},
            "cpu": {name: float(seconds[name][1]) for name in PHASES},
            "counts": dict(self.counts),
            "loss": float(torch.stack(losses).sum()),  # each is divided by the number of micro-batches already
        }


def write_clip(path: Path, seconds: float, side: int, rng: np.random.Generator) -> None:
    """An mp4 file (H.264, AAC) of drifting colours and a chord."""
    rows, columns = np.mgrid[:side, :side] / side
    pace, phase = rng.uniform(0.5, 2.0, 3), rng.uniform(0, 2 * np.pi, 3)
    times = np.arange(round(seconds * SAMPLING_RATE)) / SAMPLING_RATE
    chord = sum(np.sin(2 * np.pi * pitch * times) for pitch in rng.uniform(200, 2000, 3))
    wave = (chord * 0.2 + rng.normal(0, 0.01, len(times))).astype(np.float32)
    with av.open(str(path), "w") as container:
        # Without B-frames and with one thread the same pixels give the same file.
        options = {"preset": "veryfast", "bf": "0", "threads": "1"}
        video = container.add_stream("libx264", rate=CLIP_RATE, options=options)
        video.width = video.height = side
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("aac", rate=SAMPLING_RATE, layout="mono")
        for index in range(round(seconds * CLIP_RATE)):
            moved = 2 * np.pi * (rows[..., None] + columns[..., None] * [1, 2, 3]) + phase + pace * index / CLIP_RATE
            pixels = (127.5 + 127.5 * np.sin(moved)).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, CLIP_RATE)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        sound = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
        sound.sample_rate, sound.pts, sound.time_base = SAMPLING_RATE, 0, Fraction(1, SAMPLING_RATE)
        container.mux(audio.encode(sound))
        container.mux(audio.encode())


def make_rows(args: argparse.Namespace, folder: Path) -> tuple[Dataset, str]:
    """Prompts of up to `BATCHES` steps, all with video and audio, and their media root."""
    if args.daily_omni:
        dataset = load_daily_omni(args.daily_omni)
        if len(dataset) < args.groups:
            raise SystemExit(f"--groups {args.groups}: only {len(dataset)} questions have their clip")
        dataset = dataset.select(range(min(len(dataset), BATCHES * args.groups)))
        return dataset.select_columns(["prompt", "tag", "video", "audio"]), args.daily_omni
    rows = []
    for index in range(BATCHES * args.groups):
        write_clip(folder / f"{index}.mp4", args.seconds, args.clip_side, np.random.default_rng([args.seed, index]))
        question = f"Clip {index}: which colour moves fastest while the chord sounds? A. red B. green C. blue"
        rows.append({"prompt": [{"role": "user", "content": question}], "tag": "VA", "video": f"{index}.mp4"})
    return Dataset.from_list(rows), str(folder)


def distinct_characters(completions, **_) -> list[float]:
    """A reward that any text of a random model can get more or less of."""
    return [float(len(set(completion[0]["content"]))) for completion in completions]


def build_trainer(side: str, args: argparse.Namespace, checkpoint: Path, dataset: Dataset, media_root: str, out: Path):
    config = OmniGRPOConfig(
        str(out / side),
        media_root=media_root,
        media_cache_bytes=1 if side == "naive" else 2 << 30,
        media_workers=0,  # so that the CPU time of decoding is counted
        encoder_cache_bytes=0,  # measured is one pass per prompt, not none
        num_frames=args.frames,
        min_pixels=28 * 28,
        max_pixels=args.side**2,
        # A micro-batch holds as many rows as a group has, as on an accelerator that fits one group.
        per_device_train_batch_size=args.generations,
        gradient_accumulation_steps=args.groups,
        num_generations=args.generations,
        max_completion_length=args.completion_tokens,
        generation_kwargs={"min_new_tokens": args.completion_tokens},  # the same amount of work in every step
        beta=args.beta,
        seed=args.seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
    )
    trainer_class = RowByRowTrainer if side == "naive" else OmniGRPOTrainer
    trainer = trainer_class(
        str(checkpoint), distinct_characters, config, train_dataset=dataset, processing_class=build_processor()
    )
    # As in the midst of training: with the reference's own weights the KL term and with it the loss would be zero.
    generator = torch.Generator().manual_seed(args.seed)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.ndim > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += 0.1 * parameter.std() * noise
    return trainer


def steps_ahead(trainer: OmniGRPOTrainer, batches: list[list[dict[str, Any]]], workers: int, seed: int) -> np.ndarray:
    """Wall clock and CPU time of this process, per step, with each batch decoded during the step before."""
    loader = trainer.loader
    loader.workers = workers
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    loader.close()
    transformers.set_seed(seed)
    gc.collect()
    start = now()
    for index, rows in enumerate(batches):
        trainer.model.zero_grad(set_to_none=True)
        if index + 1 < len(batches):
            trainer._prefetch(batches[index + 1], ())
        for _ in range(trainer.args.gradient_accumulation_steps):
            trainer.training_step(trainer.model, rows, None)
    return (now() - start) / len(batches)


def compare_places(trainer: OmniGRPOTrainer, batches: list, args: argparse.Namespace) -> dict[str, Any] | None:
    """Decoding in threads against decoding in processes: both spreads, and that of the ratios of neighbours."""
    if len(batches) < 2:
        return None
    taken: dict[str, list[np.ndarray]] = {name: [] for name in PLACES}
    for repeat in range(args.repeats + 1):
        order = list(PLACES) if repeat % 2 else list(PLACES)[::-1]
        for name in order:
            seconds = steps_ahead(trainer, batches, PLACES[name], args.seed)
            if repeat:  # the first starts the processes
                taken[name].append(seconds)
    close_decoders()
    result: dict[str, Any] = {"batches": len(batches), "workers": PLACES["processes"]}
    for index, clock in enumerate(("wall", "cpu")):
        samples = {name: [float(seconds[index]) for seconds in taken[name]] for name in PLACES}
        pairs = [one / other for one, other in zip(*samples.values(), strict=True)]
        medians = {name: summary_of(values) for name, values in samples.items()}
        ratio = medians["threads"]["median"] / medians["processes"]["median"]
        result[clock] = {**medians, "ratio": ratio, "pair_ratio": summary_of(pairs), "samples": samples}
    return result


def assert_agreement(watches: dict[str, Stopwatch], rows: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """
    Runs one step on both sides and compares them.

    Raises:
        AssertionError: when the sides sample other completions, or differ in loss or gradient by more than 1e-4.
    """
    losses, gradients, completions = {}, {}, {}
    for side, watch in watches.items():
        trainer = watch.trainer
        generate = trainer._generate_and_score_completions

        def recorded(inputs, generate=generate, side=side):
            output = generate(inputs)
            completions[side] = output["completion_ids"].clone()
            return output

        trainer._generate_and_score_completions = recorded
        losses[side] = watch.step(rows, seed)["loss"]
        trainer._generate_and_score_completions = generate
        gradients[side] = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    naive, ours = (gradients[side] for side in SIDES)
    report = {
        "same_completions": torch.equal(completions["naive"], completions["ours"]),
        "loss_naive": losses["naive"],
        "loss_ours": losses["ours"],
        "loss_relative_difference": abs(losses["naive"] - losses["ours"]) / abs(losses["naive"]),
        "gradient_norm": _norm(naive.values()),
        "gradient_relative_difference": _norm(naive[n] - ours[n] for n in naive) / _norm(naive.values()),
        "gradient_norm_vision": _norm(g for n, g in ours.items() if ".visual." in f".{n}"),
        "gradient_norm_audio": _norm(g for n, g in ours.items() if ".audio_tower." in f".{n}"),
        "tolerance": TOLERANCE,
    }
    text = json.dumps(report, indent=2)
    assert naive.keys() == ours.keys(), "the sides have gradients for different parameters"
    assert report["same_completions"], f"the sides sampled different completions, so their work differs: {text}"
    assert min(report["gradient_norm_vision"], report["gradient_norm_audio"]) > 0, f"a tower has no gradient: {text}"
    assert report["loss_relative_difference"] <= TOLERANCE, f"losses differ: {text}"
    assert report["gradient_relative_difference"] <= TOLERANCE, f"gradients differ: {text}"
    return report


def _norm(tensors) -> float:
    return float(torch.stack([tensor.double().square().sum() for tensor in tensors]).sum().sqrt())


def summary_of(values: list[float]) -> dict[str, float]:
    low, median, high = np.percentile(values, [10, 50, 90])
    return {"median": float(median), "p10": float(low), "p90": float(high), "n": len(values)}


def compared(samples: dict[str, list[float]]) -> dict[str, Any]:
    """Both sides' spread, the ratio of the medians, and the spread of the ratios of neighbouring steps."""
    result: dict[str, Any] = {side: summary_of(samples[side]) for side in SIDES}
    medians = [result[side]["median"] for side in SIDES]
    result["ratio"] = medians[0] / medians[1] if medians[1] > 0 else None
    pairs = [naive / ours for naive, ours in zip(*(samples[side] for side in SIDES), strict=True) if ours > 0]
    result["pair_ratio"] = summary_of(pairs) if pairs else None
    return result


def print_table(clocks: dict[str, dict[str, Any]]) -> None:
    """Both clocks; a phase of a few milliseconds has no ratio worth a look."""
    for clock, title in (("wall", "wall time, s"), ("cpu", "CPU time, s")):
        print(
            f"\n{title:26}" + "".join(f"{f'{side}: median (p10 - p90)':>32}" for side in SIDES) + f"{'naive/ours':>12}"
        )
        for name, label in PHASES.items():
            phase = clocks[clock][name]
            cells = [phase[side] for side in SIDES]
            texts = [f"{cell['median']:.3f} ({cell['p10']:.3f} - {cell['p90']:.3f})" for cell in cells]
            ratio = f"{phase['ratio']:.2f}" if min(cell["median"] for cell in cells) >= 0.005 else "-"
            print(f"{label:26}{texts[0]:>32}{texts[1]:>32}{ratio:>12}")


def machine() -> dict[str, Any]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--groups", type=int, default=3, help="prompts in a step")
    parser.add_argument("--generations", type=int, default=8, help="completions per prompt (G)")
    parser.add_argument("--frames", type=int, default=16, help="frames sampled from a clip")
    parser.add_argument("--side", type=int, default=112, help="a frame has at most SIDE x SIDE pixels (28, 56, 84, …)")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a synthetic clip")
    parser.add_argument("--clip-side", type=int, default=224, help="height and width of a synthetic clip, in pixels")
    parser.add_argument("--completion-tokens", type=int, default=16, help="tokens of every completion")
    parser.add_argument("--beta", type=float, default=0.04, help="weight of the KL term, > 0: with a reference model")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size of the language model")
    parser.add_argument("--layers", type=int, default=6, help="layers of the language model")
    parser.add_argument("--tower", type=int, default=192, help="hidden size of both towers")
    parser.add_argument("--tower-layers", type=int, default=4, help="layers of both towers")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps per side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=int(os.environ["OMP_NUM_THREADS"]), help="of torch")
    parser.add_argument("--daily-omni", metavar="DIR", help="use real clips and questions of Daily-Omni")
    parser.add_argument("--json", metavar="FILE", help="write the results here as well")
    args = parser.parse_args(argv)
    for name in ("groups", "frames", "completion_tokens", "repeats", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.generations < 2:
        parser.error(f"--generations must be at least 2, got {args.generations}: GRPO compares completions")
    if args.side < 28 or args.side % 28:
        parser.error(f"--side must be a multiple of 28, got {args.side}")
    if args.beta <= 0:
        parser.error(f"--beta must be positive, got {args.beta}: without the KL term the loss of a first step is zero")
    return args


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(args.threads)
    dataset, media_root = make_rows(args, folder)
    model = build_model(
        build_processor().tokenizer,
        seed=args.seed,
        hidden_size=args.hidden,
        layers=args.layers,
        heads=max(2, args.hidden // 64),
        tower_size=args.tower,
        tower_layers=args.tower_layers,
    )
    model.save_pretrained(folder / "model")
    watches = {
        side: Stopwatch(build_trainer(side, args, folder / "model", dataset, media_root, folder)) for side in SIDES
    }
    # A rollout's rows as the trainer's own sampler yields them.
    groups = [[row] * args.generations for row in dataset]
    starts = range(0, len(groups) - args.groups + 1, args.groups)
    batches = [[row for group in groups[start : start + args.groups] for row in group] for start in starts]
    rows, dataset = batches[0], dataset.select(range(args.groups))
    prompts = [watches["ours"].trainer.prompt_builder.encode(row) for row in dataset]

    result: dict[str, Any] = {
        "benchmark": "step_time",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "machine": machine(),
        "seed": args.seed,
        "options": {name: value for name, value in vars(args).items() if name not in ("json", "daily_omni")},
        "clips": "daily-omni" if args.daily_omni else "synthetic",
        "sizes": {
            "rows": len(rows),
            "prompts": len(prompts),
            "clips": len(set(dataset["video"])),
            "prompt_tokens": [len(prompt) for prompt in prompts],
            "media_tokens": [prompt.media_tokens for prompt in prompts],
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "parameters_vision": sum(parameter.numel() for parameter in model.base_model.visual.parameters()),
            "parameters_audio": sum(parameter.numel() for parameter in model.base_model.audio_tower.parameters()),
        },
    }
    print(json.dumps({name: result[name] for name in ("versions", "machine", "options", "sizes")}))
    result["agreement"] = agreement = assert_agreement(watches, rows, args.seed)
    print(
        f"Both sides agree: same completions, loss {agreement['loss_ours']:.6g} (relative difference "
        f"{agreement['loss_relative_difference']:.1e}), gradient (relative difference "
        f"{agreement['gradient_relative_difference']:.1e})"
    )
    # That was the warm-up as well. Now in turns.
    samples: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for repeat in range(args.repeats):
        for side in SIDES:
            samples[side].append(watches[side].step(rows, args.seed))
        last = {side: samples[side][-1] for side in SIDES}
        totals = (f"{side} {x['wall']['total']:.2f} s (CPU {x['cpu']['total']:.2f} s)" for side, x in last.items())
        print(f"{repeat + 1}/{args.repeats}: {', '.join(totals)}", flush=True)
    result["seconds"] = {
        clock: {name: compared({side: [x[clock][name] for x in samples[side]] for side in SIDES}) for name in PHASES}
        for clock in ("wall", "cpu")
    }
    result["ratio"] = {clock: phases["total"]["ratio"] for clock, phases in result["seconds"].items()}
    result["counts"] = {side: samples[side][-1]["counts"] for side in SIDES}
    result["samples"] = {side: [{c: x[c] for c in ("wall", "cpu")} for x in samples[side]] for side in SIDES}
    result["places"] = compare_places(watches["ours"].trainer, batches, args)
    result["load_average_at_end"] = list(os.getloadavg()) if hasattr(os, "getloadavg") else None
    return result


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="maple-bench-") as folder:
        result = run(args, Path(folder))
    print_table(result["seconds"])
    print("\nin one step" + "".join(f"\n  {side}: {result['counts'][side]}" for side in SIDES))
    print(f"\nnaive / ours for {args.groups} prompts x {args.generations} completions:")
    for clock, ratio in result["ratio"].items():
        pairs = result["seconds"][clock]["total"]["pair_ratio"]
        print(
            f"  {clock} {ratio:.2f} (of neighbouring steps: {pairs['p10']:.2f} - {pairs['p90']:.2f}, n = {pairs['n']})"
        )
    if result["places"]:
        print("\ndecoding in threads / in processes, a step with the next batch decoded ahead:")
        for clock, title in (("wall", "wall"), ("cpu", "CPU of the training process")):
            found = result["places"][clock]
            one, other = (found[name]["median"] for name in PLACES)
            pairs = found["pair_ratio"]
            print(
                f"  {title} {one:.2f} s / {other:.2f} s = {found['ratio']:.2f} (of neighbours: {pairs['p10']:.2f} - "
                f"{pairs['p90']:.2f}, n = {pairs['n']})"
            )
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
