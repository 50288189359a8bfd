"""
What `maple-trl plan` computes against figures that others have published: memory, decoding, training, whole steps.

    python benchmarks/plan_published.py --json plan_published.json

Constants that are fitted to published figures are fitted here again, to the points that the output calls `fitted`, and held
against the others. Each point names its source. What a source does not say (how long completions are, how long a prompt's
text is) is assumed as the last column says; most often it is the greatest length that the source allows, so that a time is
an upper bound. Nothing runs on a GPU here.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from _plan_tables import table, write_tables

from maple_trl.planning.catalogue import GPUS, MODELS, RATES
from maple_trl.planning.duration import decode_step
from maple_trl.planning.memory import weight_bytes
from maple_trl.planning.plan import make_plan
from maple_trl.planning.setup import GIB, Setup
from maple_trl.planning.sizes import Media, ModelSizes, Work, read_sizes


QWEN3_SPEED = "https://github.com/QwenLM/Qwen3/blob/main/docs/source/getting_started/speed_benchmark.md"
EASYR1 = "https://github.com/hiyouga/EasyR1/blob/main/assets/baselines.md"

LENGTHS, GENERATED = (1, 6144, 14_336, 30_720), 2048
# Tokens per second (prompt and answer over the time of both) and MiB at each length, of one request on an H20 in bfloat16.
SPEED = {
    "Qwen/Qwen3-0.6B": (
        (414.17, 1426.46, 2478.02, 3577.42),
        (58.57, 154.82, 168.48, 175.93),
        (1394, 2066, 2963, 4755),
    ),
    "Qwen/Qwen3-1.7B": ((227.80, 838.28, 1525.71, 2439.03), (59.83, 238.53, 352.59, 418.13), (3412, 4213, 5109, 6902)),
    "Qwen/Qwen3-4B": ((133.13, 466.19, 789.25, 1165.75), (45.94, 159.95, 195.31, 217.97), (7973, 8860, 10012, 12317)),
    "Qwen/Qwen3-8B": ((81.73, 296.25, 524.70, 832.67), (45.32, 146.12, 183.29, 208.98), (15947, 16811, 17963, 20267)),
    "Qwen/Qwen3-14B": ((47.10, 174.85, 317.56, 525.80), (40.66, 108.52, 136.36, 155.38), (28402, 29495, 30775, 33336)),
    "Qwen/Qwen3-32B": ((20.72, 77.82, 143.08, 240.75), (26.24, 51.41, 62.41, 69.16), (62751, 64583, 66632, 70728)),
    "Qwen/Qwen3-30B-A3B": (
        (137.18, 490.10, 849.62, 1283.94),
        (1.89, 7.45, 14.47, 27.03),
        (58462, 59037, 59806, 61342),
    ),
}
EXPERTS = "Qwen/Qwen3-30B-A3B"


@dataclass
class Point:
    """
    A published figure and what is computed for it.

    Attributes:
        group: what kind of figure it is.
        name: what was run.
        published: as it is published; of a span its ends.
        predicted: as it is computed.
        unit: of both.
        fitted: whether a constant was fitted to it.
        source: where it is published.
        assumed: what the source does not say.
    """

    group: str
    name: str
    published: tuple[float, float]
    predicted: float
    unit: str
    fitted: bool
    source: str
    assumed: str = ""

    @property
    def error(self) -> float:
        """The part by which the computed figure is beyond the nearer end of the published span; 0 within it."""
        low, high = self.published
        if low <= self.predicted <= high:
            return 0.0
        return self.predicted / high - 1 if self.predicted > high else self.predicted / low - 1


def sizes(name: str) -> ModelSizes:
    return read_sizes(MODELS[name], name)


def text_setup(name: str, gpu: str, prompt: int, rollout: str = "transformers", rates: dict[str, float] | None = None):
    """One request."""
    return Setup(
        sizes(name),
        GPUS[gpu],
        prompt=prompt,
        completion=GENERATED,
        num_generations=2,
        per_device_train_batch_size=2,
        rollout=rollout,
        rates=rates or {},
    )


# Memory of a model and its cache


def memory_points() -> Iterator[Point]:
    for name, (_, _, megabytes) in SPEED.items():
        for length, published in zip(LENGTHS, megabytes, strict=True):
            setup = text_setup(name, "H20", length)
            cache = setup.model.text.cache_values * (length + GENERATED) * 2
            predicted = (weight_bytes(setup) + cache) / 2**20
            label = f"{name.removeprefix('Qwen/')}, {length} + {GENERATED} tokens"
            yield Point("weights and cache", label, (published, published), predicted, "MiB", False, QWEN3_SPEED)


# Decoding


def fit_engine() -> dict[str, float]:
    """The share of the bandwidth and the time of a layer, from the smallest and the largest dense model at length 1."""
    ends = []
    for name in ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-32B"):
        setup = text_setup(name, "H20", 1, "vllm_colocate", {"engine_share": 1, "engine_layer_ms": 0})
        floor, _ = decode_step(setup, 1, 1 + GENERATED / 2)
        seconds = (1 + GENERATED) / SPEED[name][0][0] / GENERATED
        ends.append((floor, setup.model.text.layers, seconds))
    (floor_a, layers_a, time_a), (floor_b, layers_b, time_b) = ends
    share = (floor_b * layers_a - floor_a * layers_b) / (time_b * layers_a - time_a * layers_b)
    return {"engine_share": share, "engine_layer_ms": (time_a - floor_a / share) / layers_a * 1e3}


def fit_launches() -> dict[str, float]:
    """The time of a layer in transformers' `generate()`, from one model at length 1."""
    name = "Qwen/Qwen3-8B"
    seconds = (1 + GENERATED) / SPEED[name][1][0] / GENERATED
    return {"launch_layer_ms": seconds / sizes(name).text.layers * 1e3}


def fit_reading() -> dict[str, float]:
    """The bandwidth that the largest model shows transformers to reach at least."""
    setup = text_setup("Qwen/Qwen3-32B", "H20", 1, rates={"decode_share": 1, "launch_layer_ms": 0})
    seconds = (1 + GENERATED) / SPEED["Qwen/Qwen3-32B"][1][0] / GENERATED
    return {"decode_share": decode_step(setup, 1, 1 + GENERATED / 2)[0] / seconds}


def prefill_seconds(setup: Setup) -> float:
    """Of one prompt."""
    operations = setup.model.text.operations(Work(setup.prompt, setup.prompt**2 / 2, 1))
    return operations / (setup.gpu.teraflops * 1e12 * setup.rate("compute_share"))


def decode_points() -> Iterator[Point]:
    for name, (engine, plain, _) in SPEED.items():
        short = name.removeprefix("Qwen/")
        for length, speed in zip(LENGTHS, engine, strict=True):
            published = (length + GENERATED) / speed / GENERATED * 1e3
            setup = text_setup(name, "H20", length, "vllm_colocate")
            step, _ = decode_step(setup, 1, length + GENERATED / 2)
            yield Point(
                "a token, engine with CUDA graphs",
                f"{short}, after {length}",
                (published, published),
                (step + prefill_seconds(setup) / GENERATED) * 1e3,
                "ms",
                length == 1 and name in ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-32B"),
                QWEN3_SPEED,
            )
        if name == EXPERTS:  # a loop over experts, which transformers has no more
            continue
        for length, speed in zip(LENGTHS, plain, strict=True):
            published = (length + GENERATED) / speed / GENERATED * 1e3
            setup = text_setup(name, "H20", length)
            step, _ = decode_step(setup, 1, length + GENERATED / 2)
            yield Point(
                "a token, transformers" if length == 1 else "a token, transformers after a long prompt",
                f"{short}, after {length}",
                (published, published),
                (step + prefill_seconds(setup) / GENERATED) * 1e3,
                "ms",
                length == 1 and name in ("Qwen/Qwen3-8B", "Qwen/Qwen3-32B"),
                QWEN3_SPEED,
                "" if length == 1 else "its own cache copies all that it holds for each token",
            )


# Training passes

IMAGE = 334  # tokens of the least image that EasyR1 feeds: 262 144 pixels
MICRO = {1: 4096, 4: 16_384}  # tokens of its micro-batches
# Model, card, micro-batch, tokens of a row (its tokens per second, seconds and 2560 rows a step), MFU.
ACTOR = (
    ("Qwen/Qwen2.5-VL-7B-Instruct", "H100", 1, 1600 * 8 * 145 / 2560, 0.160, True),
    ("Qwen/Qwen2.5-VL-7B-Instruct", "H100", 4, 2000 * 8 * 120 / 2560, 0.232, True),
    ("Qwen/Qwen2.5-VL-3B-Instruct", "H100", 1, 1800 * 8 * 120 / 2560, 0.081, False),
    ("Qwen/Qwen2.5-VL-7B-Instruct", "L20", 1, 410 * 8 * 580 / 2560, 0.265, False),
)


def their_operations(model: ModelSizes, tokens: float, row: float) -> float:
    """What EasyR1 counts (verl/utils/flops_counter.py): forward and backward of the language model, embedding and head."""
    text = model.text
    weights = text.active + 2 * text.vocab * text.hidden
    return 6 * weights * tokens + 12 * tokens * row * text.queries * text.layers


def our_operations(model: ModelSizes, tokens: float, row: float) -> float:
    """What is computed: the forward once more, and the vision tower."""
    work = Work(tokens, tokens * row / 2, tokens)
    return 4 * (model.text.operations(work) + model.vision.operations(Media(tokens / row * IMAGE, 0, 504, 504)))


def fit_training() -> dict[str, float]:
    """What cards reach of their peak, and what a sharded layer costs, from two sizes of micro-batch."""
    points = []
    for name, gpu, micro, row, share, fitted in ACTOR:
        if fitted:
            model, peak = sizes(name), GPUS[gpu].teraflops * 1e12
            tokens = MICRO[micro]
            seconds = their_operations(model, tokens, row) / (share * peak)
            points.append((our_operations(model, tokens, row), seconds, model.text.layers + model.vision.layers, peak))
    (work_a, time_a, layers, peak), (work_b, time_b, *_) = points
    share = (work_b - work_a) / (time_b - time_a) / peak
    return {"compute_share": share, "sharded_layer_ms": (time_a - work_a / (share * peak)) / layers / 4 * 1e3}


def training_points() -> Iterator[Point]:
    for name, gpu, micro, row, share, fitted in ACTOR:
        model, peak, tokens = sizes(name), GPUS[gpu].teraflops * 1e12, MICRO[micro]
        seconds = our_operations(model, tokens, row) / (RATES["compute_share"].value * peak)
        seconds += 4 * (model.text.layers + model.vision.layers) * RATES["sharded_layer_ms"].value / 1e3
        predicted = their_operations(model, tokens, row) / seconds / peak * 100
        yield Point(
            "share of the peak in training",
            f"{name.removeprefix('Qwen/')}, 8 {gpu}, micro-batch {micro}",
            (share * 100, share * 100),
            predicted,
            "%",
            fitted,
            EASYR1,
            "micro-batches are full; images of the least size",
        )


# Whole jobs

ALL = ("llm", "head", "vision", "projectors")


def easyr1(name: str, gpu: str, micro: int, dtype: str, row: float) -> Setup:
    """Qwen2.5-VL on Geometry3k: 512 prompts, 5 answers each, four updates; everything is offloaded while vLLM samples."""
    rows = max(int(MICRO[micro] // row), 1)
    rows = next(n for n in range(rows, 0, -1) if 320 % n == 0)
    return Setup(
        sizes(name),
        GPUS[gpu],
        gpus=8,
        prompt=450,
        completion=round(row) - 450,
        media=Media(IMAGE, 0, 504, 504),
        num_generations=5,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=80 // rows,
        steps_per_generation=320 // rows,
        beta=0.01,
        shared_prefix=False,
        trained=ALL,
        dtype=dtype,
        sharding="fsdp",
        rollout="vllm_colocate",
        vllm_gpu_memory_utilization=0.6,
        vllm_tensor_parallel_size=2,
        vllm_enable_sleep_mode=True,
    )


def r1v(name: str, gpu: str, gpus: int, rows: int, **more: Any) -> Setup:
    """A job in the manner of R1-V: a prompt and its answers on each card, sampled by transformers, ZeRO-3."""
    return Setup(
        sizes(name),
        GPUS[gpu],
        gpus=gpus,
        num_generations=rows,
        per_device_train_batch_size=rows,
        steps_per_generation=1,
        beta=0.04,
        shared_prefix=False,
        encoder_cache=False,
        sharding="zero3",
        attn_implementation="flash_attention_2",
        **more,
    )


def swift_sft(language: bool, tower: bool) -> float:
    """GiB of ms-swift's supervised example of Qwen2.5-VL-7B: 4 clips of 12 frames, a head without logits (Liger)."""
    text = Setup(
        sizes("Qwen/Qwen2.5-VL-7B-Instruct"),
        GPUS["A100-80GB"],
        gpus=4,
        prompt=384 + 150,
        completion=1,
        media=Media(384, 0, 224, 224),
        num_generations=2,
        per_device_train_batch_size=4,
        shared_prefix=False,
        encoder_cache=False,
        trained=ALL,
        sharding="zero3",
        attn_implementation="flash_attention_2",
    )
    both = {on: make_plan(replace(text, gradient_checkpointing=on)).memory.training for on in (True, False)}
    frozen = replace(text, trained=("llm", "head"), encoder_cache=True)
    alone = {on: make_plan(replace(frozen, gradient_checkpointing=on)).memory.training for on in (True, False)}
    towers = both[tower]["activations"] - alone[tower]["activations"]
    rest = sum(value for part, value in both[True].items() if part not in ("activations", "LM head"))
    return (rest + alone[language]["activations"] + towers) / GIB


def job_points() -> Iterator[Point]:
    vl7, vl3 = "Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct"
    split = "450 tokens of prompt; answers are the rest of the published tokens"
    for name, gpu, micro, dtype, row, seconds, memory in (
        (vl3, "H100", 1, "float32", 1800 * 8 * 120 / 2560, 120, 54),
        (vl7, "H100", 1, "float32", 1600 * 8 * 145 / 2560, 145, 68),
        (vl7, "H100", 4, "float32", 2000 * 8 * 120 / 2560, 120, 72),
        (vl7, "L20", 1, "float32", 410 * 8 * 580 / 2560, 580, 42),
        (vl7, "H100", 1, "bfloat16", 1600 * 8 * 145 / 2560, 145, 58),
    ):
        plan = make_plan(easyr1(name, gpu, micro, dtype, row))
        label = f"EasyR1: {name.removeprefix('Qwen/')}, 8 {gpu}, {dtype}, micro-batch {micro}"
        total = sum(phase.seconds for phase in plan.phases)
        yield Point("a rollout and its updates", label, (seconds, seconds), total, "s", False, EASYR1, split)
        # Optimizer and weights are in the host's memory while vLLM samples, so the engine alone is there.
        engine = plan.memory.rollout["rollout engine"]
        peak = max(sum(plan.memory.training.values()) - plan.memory.training["reference model"], engine) / GIB
        note = "offloading as its config has it; buffers of the collectives are not counted"
        yield Point("memory of a card", label, (memory, memory), peak, "GiB", False, EASYR1, note)
    yield from _time_of_r1v_jobs(vl7, vl3)
    yield from _memory_of_jobs(vl7)


def _time_of_r1v_jobs(vl7: str, vl3: str) -> Iterator[Point]:
    longest = "answers as long as allowed"
    clip = Media(1024, 0, 336, 299)
    video = r1v(vl7, "A100-80GB", 4, 8, prompt=1174, completion=768, media=clip, trained=ALL)
    yield Point(
        "an optimizer step",
        "Video-R1: Qwen2.5-VL-7B, 4 A100, 16 frames",
        (54, 54),
        make_plan(video).seconds,
        "s",
        False,
        "https://github.com/tulerfeng/Video-R1/issues/80 (1000 steps, about 15 hours)",
        longest + ", 150 tokens of text; its second rollout on shuffled frames is left out",
    )
    image = Media(391, 0, 476, 644)
    boxes = r1v(
        vl3,
        "A100-80GB",
        8,
        7,
        prompt=491,
        completion=256,
        media=image,
        trained=ALL,
        gradient_accumulation_steps=2,
        gradient_checkpointing=False,
    )
    yield Point(
        "an optimizer step",
        "VLM-R1: Qwen2.5-VL-3B, 8 A100, 7 answers",
        (25, 30),
        make_plan(boxes).seconds,
        "s",
        False,
        "https://github.com/om-ai-lab/VLM-R1/issues/30",
        longest + " (TRL's 256), images of 640 x 480, 100 tokens of text",
    )
    sound = r1v(
        "Qwen/Qwen2-Audio-7B-Instruct",
        "H800",
        8,
        8,
        prompt=850,
        completion=256,
        media=Media(0, 750),
        trained=("llm", "head", "audio", "projectors"),
        gradient_accumulation_steps=2,
        gradient_checkpointing=False,
    )
    yield Point(
        "an optimizer step",
        "R1-AQA: Qwen2-Audio-7B, 8 H800, 8 answers",
        (14.4, 18.0),
        make_plan(sound).seconds,
        "s",
        False,
        "https://github.com/xiaomi-research/r1-aqa/issues/34 (4 to 5 hours for 1000 steps)",
        longest + " (TRL's 256); offloading to the host is left out",
    )


def _memory_of_jobs(vl7: str) -> Iterator[Point]:
    source = "https://github.com/modelscope/ms-swift/blob/main/examples/train/multimodal/vit_gradient_checkpointing.sh"
    for language, tower, memory in ((True, True, 48), (True, False, 62), (False, True, 56), (False, False, 77)):
        label = f"ms-swift: {vl7.removeprefix('Qwen/')}, 4 cards, checkpointing of language model {language}, tower {tower}"
        note = "150 tokens of text beside 384 of video; cards of 80 GB"
        yield Point(
            "memory of a card", label, (memory, memory), swift_sft(language, tower), "GiB", False, source, note
        )
    omni = r1v(
        "Qwen/Qwen2.5-Omni-7B",
        "A100-80GB",
        4,
        16,
        prompt=900,
        completion=768,
        media=Media(512, 250, 644, 616),
        trained=("llm", "head", "vision", "audio", "projectors"),
    )
    counted = RATES["counted_memory"].value
    yield Point(
        "likely memory of a card, within bounds",
        "EchoInk-R1: Qwen2.5-Omni-7B, 4 A100, 16 answers: fits",
        (0, 80),
        make_plan(omni).memory.peak / GIB / counted,
        "GiB",
        False,
        "https://github.com/HarryHsing/EchoInk (README: supported on 4 A100 of 80 GB)",
        "prompts of 900 tokens: an image, 10 s of sound, text",
    )
    video = r1v(vl7, "H20", 4, 8, prompt=1174, completion=768, media=Media(1024, 0, 336, 299), trained=ALL)
    yield Point(
        "likely memory of a card, within bounds",
        "Video-R1: Qwen2.5-VL-7B, 4 cards: fits in 96 GB, not always in 80",
        (70, 96),
        make_plan(video).memory.peak / GIB / counted,
        "GiB",
        False,
        "https://github.com/tulerfeng/Video-R1 (README, issue 80)",
        "150 tokens of text",
    )


JOBS = {"counted_memory": ("memory of a card",), "counted_time": ("a rollout and its updates", "an optimizer step")}


def fit_jobs() -> dict[str, float]:
    """Which part of what jobs are published to take is counted: the median."""
    points = list(job_points())
    shares = {}
    for name, groups in JOBS.items():
        own = [point for point in points if point.group in groups]
        shares[name] = statistics.median(1 + point.error for point in own)
    return shares


def fits() -> dict[str, float]:
    """All constants that are fitted to published figures."""
    return fit_engine() | fit_launches() | fit_reading() | fit_training() | fit_jobs()


def collect() -> list[Point]:
    return [*memory_points(), *decode_points(), *training_points(), *job_points()]


def summary(points: list[Point]) -> list[dict[str, Any]]:
    """By kind of figure: how many nothing was fitted to, and how far they are from what is computed."""
    rows = []
    for group in dict.fromkeys(point.group for point in points):
        errors = [point.error for point in points if point.group == group and not point.fitted]
        rows.append(
            {
                "published": group,
                "figures": len(errors),
                "error, median": f"{statistics.median(errors):+.1%}",
                "from": f"{min(errors):+.1%}",
                "to": f"{max(errors):+.1%}",
            }
        )
    return rows


def print_group(points: list[Point]) -> None:
    for point in points:
        low, high = point.published
        published = f"{low:.4g}" if low == high else f"{low:.4g}-{high:.4g}"
        mark = "fitted" if point.fitted else f"{point.error:+.1%}"
        print(f"  {point.name:<78}{published:>9}{point.predicted:>9.4g} {point.unit:<4}{mark:>8}  {point.assumed}")
    held = [abs(point.error) for point in points if not point.fitted]
    print(f"  held out: {len(held)}, error at most {max(held):.1%}, median {statistics.median(held):.1%}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--write", metavar="FILE", help="put the table of errors into this page")
    parser.add_argument("--json", metavar="FILE", help="write the results here as well")
    args = parser.parse_args(argv)
    constants = fits()
    print("constants, fitted to published figures / as the plan has them")
    for name, value in constants.items():
        print(f"  {name:<20}{value:>8.3f}{RATES[name].value:>8.3f} {RATES[name].unit}")
    points = collect()
    for group in dict.fromkeys(point.group for point in points):
        own = [point for point in points if point.group == group]
        print(f"\n{group}: published, computed, error")
        print_group(own)
        for source in dict.fromkeys(point.source for point in own):
            print(f"  from {source}")
    print(f"\n{table(summary(points))}")
    if args.write:
        write_tables(Path(args.write), {"published": summary(points)})
    if args.json:
        result = {"constants": constants, "points": [asdict(p) | {"error": p.error} for p in points]}
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
