"""The command `maple-trl plan`: its options, and what it prints."""

from __future__ import annotations

import json as json_format
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from maple_trl.cli.base import Command
from maple_trl.cli.failures import FAILED, WRONG
from maple_trl.planning.catalogue import GPUS, MODELS, RATES, Gpu


# Nothing heavier than the standard library up here: the help of every command passes through this module.

if TYPE_CHECKING:
    from rich.console import Console

    from maple_trl.planning.plan import Plan
    from maple_trl.planning.setup import Setup
    from maple_trl.planning.sizes import ModelSizes


def _rate(name: str) -> Any:
    rate = RATES[name]
    return field(default=rate.value, metadata={"help": f"{rate.means} ({rate.unit}; {rate.origin})"})


@dataclass
class PlanArguments:
    """The job, by the names of its own options, and the cards."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"aliases": ["--model"], "help": "a folder, a name on the Hub, or builtin:tiny-omni (required)"},
    )
    gpus: int = field(default=1, metadata={"help": "cards, those of a vLLM server among them"})
    gpu: str = field(default="H100", metadata={"help": "kind of card"})
    prompt: int = field(
        default=4096, metadata={"aliases": ["--max_prompt_length"], "help": "tokens of a prompt, its media among them"}
    )
    completion: int = field(
        default=512, metadata={"aliases": ["--max_completion_length"], "help": "tokens of a completion"}
    )
    video_tokens: int | None = field(
        default=None, metadata={"help": "of a prompt, those of pictures too (3/4 of it, with a vision tower)"}
    )
    audio_tokens: int | None = field(default=None, metadata={"help": "of a prompt (1/8 of it, with an audio tower)"})
    frame_height: int = field(default=336, metadata={"help": "of a frame, in pixels"})
    frame_width: int = field(default=224, metadata={"help": "of a frame, in pixels"})
    num_generations: int = field(default=8, metadata={"help": "completions of a prompt"})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "completions of a micro-batch on a card"})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "micro-batches of an optimizer step"})
    steps_per_generation: int | None = field(
        default=None, metadata={"help": "micro-batches of a rollout (gradient_accumulation_steps)"}
    )
    num_iterations: int = field(default=1, metadata={"help": "times that a rollout is trained on"})
    beta: float = field(default=0.0, metadata={"help": "weight of the KL term; above 0 with a reference model"})
    shared_prefix: str = field(
        default="auto", metadata={"help": "auto, on or off: whether completions share a prompt"}
    )
    encoder_cache_bytes: int = field(default=1 << 30, metadata={"help": "0: features of frozen towers are not kept"})
    generation_batch: int | None = field(
        default=None, metadata={"help": "completions that transformers samples at a time (all of a card's)"}
    )
    gradient_checkpointing: bool = field(default=True, metadata={"help": "compute layers again in the backward pass"})
    use_peft: bool = field(default=False, metadata={"help": "train LoRA adapters"})
    lora_r: int = field(default=16, metadata={"help": "their rank"})
    lora_vision: bool = field(default=True, metadata={"help": "LoRA on the vision encoder"})
    lora_audio: bool = field(default=True, metadata={"help": "LoRA on the audio encoder"})
    lora_projectors: bool = field(default=True, metadata={"help": "LoRA on the projectors"})
    lora_llm: bool = field(default=True, metadata={"help": "LoRA on the language model"})
    freeze_vision: bool = field(default=False, metadata={"help": "do not train the vision encoder"})
    freeze_audio: bool = field(default=False, metadata={"help": "do not train the audio encoder"})
    freeze_projectors: bool = field(default=False, metadata={"help": "do not train the projectors"})
    freeze_llm: bool = field(default=False, metadata={"help": "do not train the language model"})
    load_in_4bit: bool = field(default=False, metadata={"help": "weights of 4 bits, with use_peft"})
    load_in_8bit: bool = field(default=False, metadata={"help": "weights of 8 bits, with use_peft"})
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "of 4 bits: quantize their scales too"})
    quantize_towers: bool = field(default=False, metadata={"help": "few bits for towers and projectors too"})
    dtype: str = field(default="bfloat16", metadata={"help": "of the weights: bfloat16 or float32"})
    bf16: bool = field(default=True, metadata={"help": "passes in bfloat16, also over weights in float32"})
    optim: str = field(default="adamw", metadata={"help": "adamw, adamw_8bit or sgd"})
    sharding: str = field(default="none", metadata={"help": "none, zero2, zero3 or fsdp"})
    attn_implementation: str = field(default="sdpa", metadata={"help": "sdpa, flash_attention_2 or flex_attention"})
    use_vllm: bool = field(default=False, metadata={"help": "sample with vLLM"})
    vllm_mode: str = field(default="colocate", metadata={"help": "colocate or server"})
    rollout_gpus: int = field(default=0, metadata={"help": "cards of the vLLM server"})
    vllm_gpu_memory_utilization: float | None = field(
        default=None, metadata={"help": "share of a card that vLLM takes (0.3; of a server's 0.9)"}
    )
    vllm_tensor_parallel_size: int = field(default=1, metadata={"help": "cards of an engine"})
    gpus_per_node: int = field(default=8, metadata={"help": "cards that are linked directly"})
    judge_calls: float = field(default=0, metadata={"help": "calls of a judge for each completion"})
    judge_seconds: float = field(default=2.0, metadata={"help": "time of a call"})
    judge_concurrency: int = field(default=32, metadata={"help": "calls that are open at once"})
    media_workers: int = field(default=2, metadata={"help": "processes that decode, for each card"})
    media_prefetch: bool = field(default=True, metadata={"help": "decode the next clips during a step"})
    json: bool = field(default=False, metadata={"help": "print the plan as JSON"})


@dataclass
class CardArguments:
    """The card, where it differs from its data sheet."""

    gpu_memory: float | None = field(default=None, metadata={"help": "GiB"})
    gpu_teraflops: float | None = field(default=None, metadata={"help": "of dense bfloat16 products"})
    gpu_bandwidth: float | None = field(default=None, metadata={"help": "of its memory, GB/s"})
    gpu_link: float | None = field(default=None, metadata={"help": "to the other cards of a node, GB/s"})
    gpu_network: float | None = field(default=None, metadata={"help": "to other nodes, GB/s for each card"})


@dataclass
class RateArguments:
    """What cards reach of their data sheet, and what a process can use."""

    compute_share: float = _rate("compute_share")
    sharded_layer_ms: float = _rate("sharded_layer_ms")
    launch_layer_ms: float = _rate("launch_layer_ms")
    decode_share: float = _rate("decode_share")
    engine_share: float = _rate("engine_share")
    engine_layer_ms: float = _rate("engine_layer_ms")
    link_share: float = _rate("link_share")
    usable_memory: float = _rate("usable_memory")
    counted_memory: float = _rate("counted_memory")
    counted_time: float = _rate("counted_time")
    decode_seconds: float = _rate("decode_seconds")


def run(arguments: PlanArguments, card: CardArguments, rates: RateArguments) -> int:
    """Compute a plan, and print it."""
    from maple_trl.planning.plan import advise, make_plan

    plan = make_plan(read_setup(arguments, card, rates))
    changes = [] if plan.verdict == "fits" else advise(plan)
    if arguments.json:
        print(json_format.dumps(as_json(plan, changes), indent=2))
    else:
        from rich.console import Console

        print_plan(plan, changes, Console())
    return FAILED if plan.verdict == "does not fit" else 0


def read_setup(arguments: PlanArguments, card: CardArguments, rates: RateArguments) -> Setup:
    """
    Make a setup of the options.

    Raises:
        ValueError: for an unknown model or card, and for what contradicts itself.
    """
    from maple_trl.planning.setup import PlanError, Setup
    from maple_trl.planning.sizes import Media

    own = vars(arguments)
    if arguments.vllm_mode not in ("colocate", "server"):
        raise PlanError(f"vllm_mode must be colocate or server, got {arguments.vllm_mode!r}")
    if arguments.shared_prefix not in ("auto", "on", "off"):
        raise PlanError(f"shared_prefix must be auto, on or off, got {arguments.shared_prefix!r}")
    if arguments.use_peft and arguments.lora_r < 1:
        raise PlanError(f"lora_r must be at least 1 with use_peft, got {arguments.lora_r}")
    gpu, model = _read_gpu(arguments.gpu, card), read_model(arguments.model_name_or_path or "")
    rollout = f"vllm_{arguments.vllm_mode}" if arguments.use_vllm else "transformers"
    video = (
        arguments.video_tokens
        if arguments.video_tokens is not None
        else bool(model.vision) * arguments.prompt * 3 // 4
    )
    audio = arguments.audio_tokens if arguments.audio_tokens is not None else bool(model.audio) * arguments.prompt // 8
    same = ("gpus", "prompt", "completion", "num_generations", "per_device_train_batch_size", "num_iterations", "beta")
    same += ("gradient_accumulation_steps", "gradient_checkpointing", "dtype", "optim", "sharding", "rollout_gpus")
    same += ("vllm_tensor_parallel_size", "attn_implementation", "gpus_per_node")
    same += ("load_in_4bit", "load_in_8bit", "use_bnb_nested_quant", "quantize_towers")
    same += ("judge_calls", "judge_seconds", "judge_concurrency", "media_workers", "media_prefetch")
    utilization = arguments.vllm_gpu_memory_utilization
    return Setup(
        model,
        gpu,
        media=Media(video, audio, arguments.frame_height, arguments.frame_width),
        steps_per_generation=arguments.steps_per_generation or 0,
        generation_batch=arguments.generation_batch or 0,
        shared_prefix=arguments.shared_prefix != "off",
        encoder_cache=arguments.encoder_cache_bytes > 0,
        lora_r=arguments.lora_r if arguments.use_peft else 0,
        trained=_trained_parts(arguments),
        compute="bfloat16" if arguments.bf16 else arguments.dtype,
        rollout=rollout,
        vllm_gpu_memory_utilization=(0.9 if rollout == "vllm_server" else 0.3) if utilization is None else utilization,
        rates=vars(rates),
        **{name: own[name] for name in same},
    )


def _trained_parts(arguments: PlanArguments) -> tuple[str, ...]:
    scopes = ("llm", "vision", "audio", "projectors")
    own = vars(arguments)
    if arguments.use_peft:
        return tuple(scope for scope in scopes if own[f"lora_{scope}"])
    return ("head", *(scope for scope in scopes if not own[f"freeze_{scope}"]))


def _read_gpu(name: str, card: CardArguments) -> Gpu:
    from maple_trl.messages import did_you_mean
    from maple_trl.planning.setup import PlanError

    found = next((gpu for known, gpu in GPUS.items() if known.lower() == name.lower()), None)
    if found is None:
        raise PlanError(f"gpu {name!r} is not known{did_you_mean(name, GPUS)}; known: {', '.join(GPUS)}")
    changed = {key.removeprefix("gpu_"): value for key, value in vars(card).items() if value is not None}
    wrong = next((key for key, value in changed.items() if value <= 0), None)
    if wrong:
        raise PlanError(f"gpu_{wrong} must be positive, got {changed[wrong]}")
    return replace(found, **changed)


def read_model(name: str) -> ModelSizes:
    """
    Return the sizes of a model: known ones by name, others by their configuration.

    Raises:
        ValueError: where there is none of this name, or its sizes are not known.
    """
    from maple_trl.planning.sizes import read_sizes

    known = {full.lower(): full for full in MODELS} | {full.split("/")[1].lower(): full for full in MODELS}
    full = known.get(name.lower())
    if full is not None:
        return read_sizes(MODELS[full], full)
    from maple_trl.omni.checkpoints import reach, read_config
    from maple_trl.omni.loading import resolve_checkpoint

    path = resolve_checkpoint(name)
    return read_sizes(read_config(path, reach(path, {})).to_dict(), name)


# What it prints


def as_json(plan: Plan, changes: list[tuple[str, float]]) -> dict[str, Any]:
    """Return a plan as plain data: memory in bytes, times in seconds."""
    from maple_trl.planning.duration import pass_operations

    setup = plan.setup
    return {
        "model": {
            "name": setup.model.name,
            "parameters": setup.model.parameters,
            "parts": {name: part.parameters for name, part in setup.model.parts.items()},
            "trained": setup.trainable,
        },
        "gpu": asdict(setup.gpu),
        "options": {key: value for key, value in vars(setup).items() if key not in ("model", "gpu", "rates", "media")}
        | {"media": asdict(setup.media)},
        "memory": asdict(plan.memory) | {"peak": plan.memory.peak, "usable": plan.usable, "likely": plan.likely},
        "verdict": plan.verdict,
        "changes": [{"change": name, "peak": peak} for name, peak in changes],
        "operations": {
            "train": pass_operations(setup, train=True),
            "log_probs": pass_operations(setup, train=False),
        },
        "phases": [asdict(phase) for phase in plan.phases],
        "optimizer_steps_of_a_rollout": setup.steps,
        "seconds_of_an_optimizer_step": plan.seconds,
        "likely_seconds": plan.likely_seconds,
        "notes": plan.notes,
        "constants": {
            name: asdict(rate) | {"value": setup.rate(name)} | _given(setup, name) for name, rate in RATES.items()
        },
    }


def _given(setup: Setup, name: str) -> dict[str, str]:
    """Return what to say of a constant that was given as an option."""
    return {} if setup.rate(name) == RATES[name].value else {"origin": "given", "source": "option"}


def print_plan(plan: Plan, changes: list[tuple[str, float]], console: Console) -> None:
    """Print a plan for a reader."""
    _print_model(plan, console)
    _print_memory(plan, changes, console)
    _print_time(plan, console)
    for note in plan.notes:
        console.print(note)
    _print_constants(plan, console)


def _print_model(plan: Plan, console: Console) -> None:
    setup = plan.setup
    parts = ", ".join(
        f"{name} {part.parameters / 1e9:.2f}" for name, part in setup.model.parts.items() if part.parameters
    )
    cards = f"{setup.gpus} x {setup.gpu.name}" + (
        f", {setup.rollout_gpus} of them sample" if setup.rollout_gpus else ""
    )
    console.print(f"[bold]{setup.model.name}[/]: {setup.model.parameters / 1e9:.2f} B parameters ({parts})")
    console.print(
        f"trained {setup.trainable / 1e9:.3f} B; {cards}; sharding {setup.sharding}; rollout by {setup.rollout}\n"
        f"prompt {setup.prompt} (video {setup.media.video:.0f}, audio {setup.media.audio:.0f}), completion "
        f"{setup.completion}, {setup.num_generations} of a prompt; a rollout is {setup.rows * setup.trainers} completions, "
        f"{setup.steps:g} optimizer step(s)\n"
    )


def _print_memory(plan: Plan, changes: list[tuple[str, float]], console: Console) -> None:
    from rich.table import Table

    from maple_trl.planning.setup import GIB

    columns = {"training": plan.memory.training, "rollout": plan.memory.rollout}
    if plan.memory.server:
        columns["server's card"] = plan.memory.server
    table = Table(title="Memory of a card, GiB: counted", title_justify="left")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for part in dict.fromkeys(part for column in columns.values() for part in column):
        values = [column.get(part, 0) for column in columns.values()]
        if any(values):
            table.add_row(part, *(f"{value / GIB:.2f}" if value else "" for value in values))
    table.add_section()
    table.add_row("sum", *(f"{sum(column.values()) / GIB:.2f}" for column in columns.values()))
    console.print(table)
    console.print(
        f"[bold]{plan.verdict}[/]: {plan.memory.peak / GIB:.1f} GiB are counted, of {plan.usable / GIB:.1f} that can be used "
        f"of {plan.setup.gpu.memory:g}; jobs of this size are likely to take {plan.likely / GIB:.1f}"
    )
    if not plan.engine_fits:
        console.print("the engine's share of a card does not hold the weights and one completion")
    if plan.verdict != "fits":
        for name, peak in changes:
            console.print(f"  would fit: {name}  ({peak / GIB:.1f} GiB)")
        if not changes:
            console.print("  no change of these options makes it fit: take more or larger cards, or a smaller model")


def _print_time(plan: Plan, console: Console) -> None:
    from rich.table import Table

    total = sum(phase.seconds for phase in plan.phases)
    if not total:
        return
    table = Table(title="\nTime of a rollout and its updates, s: computed", title_justify="left")
    for name, justify in (("phase", "left"), ("s", "right"), ("share", "right"), ("bound by", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for phase in plan.phases:
        table.add_row(phase.name, f"{phase.seconds:.2f}", f"{phase.seconds / total:.0%}", phase.bound)
    console.print(table)
    rows = plan.setup.rows * plan.setup.trainers
    console.print(
        f"an optimizer step takes at least [bold]{plan.seconds:.2f} s[/], likely about {plan.likely_seconds:.1f} s "
        f"({rows / total:.2f} completions a second); most of it is {plan.longest.name}, bound by {plan.longest.bound}"
    )


def _print_constants(plan: Plan, console: Console) -> None:
    setup = plan.setup
    sheet = {name: getattr(setup.gpu, name) for name in ("memory", "teraflops", "bandwidth", "link", "network")}
    given = [f"gpu_{name}" for name, value in sheet.items() if value != getattr(GPUS[setup.gpu.name], name)]
    console.print(
        f"\n{setup.gpu.name}: {sheet['memory']:g} GiB, {sheet['teraflops']:g} TFLOP/s of dense bfloat16, "
        f"{sheet['bandwidth']:g} GB/s of memory, {sheet['link']:g} GB/s within a node, {sheet['network']:g} between nodes "
        f"({'given: ' + ', '.join(given) if given else 'its data sheet'})"
    )
    console.print("Constants, each an option:")
    sources: list[str] = []
    for name, rate in RATES.items():
        origin = _given(setup, name).get("origin", rate.origin)
        if origin == rate.origin and rate.source:
            sources += [rate.source] * (rate.source not in sources)
            origin += f" \\[{sources.index(rate.source) + 1}]"
        console.print(f"  --{name} {setup.rate(name):g} {rate.unit}: {rate.means} ({origin})", soft_wrap=True)
    for number, source in enumerate(sources, 1):
        console.print(f"  \\[{number}] {source}", soft_wrap=True)


COMMAND = Command(
    name="plan",
    help="compute memory and time of a training job on given cards",
    run=run,
    description="Computes what a training job takes of memory and time on given cards, and what to change where it does not fit.",
    examples=(
        "maple-trl plan --model Qwen/Qwen2.5-Omni-3B --gpus 1 --gpu H200 --prompt 4096 --completion 256",
        "maple-trl plan --model Qwen/Qwen2.5-Omni-7B --gpus 8 --sharding zero2 --use_peft true --prompt 8192 --completion 1024",
        "maple-trl plan --model Qwen/Qwen2.5-Omni-3B --gpus 16 --use_vllm true --vllm_mode server --rollout_gpus 8 "
        "--sharding zero3",
        "maple-trl plan --model Qwen/Qwen2.5-Omni-7B --gpu RTX-4090 --use_peft true --load_in_4bit true --prompt 2048",
        "maple-trl plan --model runs/first --gpus 1 --json",
    ),
    notes=f"""\
Models whose sizes are known without their files: {", ".join(MODELS)}. Any other is a folder or a name on the Hub, of which
the configuration alone is read. Cards: {", ".join(GPUS)}.

Nothing is measured here. Memory is counted tensor by tensor; time is operations and bytes over what others have published
that cards reach, and a lower bound. `benchmarks/plan_published.py` holds both against published figures,
`benchmarks/plan_points.py` against what this machine measures.""",
    statuses={FAILED: "it does not fit"},
    options={"options": PlanArguments, "card": CardArguments, "constants": RateArguments},
    required=("model_name_or_path",),
    errors={"builtins:ValueError": WRONG},
)
