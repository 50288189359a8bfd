"""Whether an engine computes what the trainer does: every kind of prompt, before and after a change of the weights."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from maple_trl.data.synthetic import FRAME_RATE, SAMPLING_RATE, write_clip
from maple_trl.omni.encoded import EncodedPrompt, batch_position_ids, forward_position_ids
from maple_trl.omni.families import family_for
from maple_trl.omni.families.base import OmniFamily
from maple_trl.omni.generation import end_tokens
from maple_trl.omni.loading import load_model, load_processor
from maple_trl.omni.media.loader import MediaLimits, MediaLoader
from maple_trl.omni.prompt import PromptBuilder
from maple_trl.omni.serving import serve_media
from maple_trl.omni.towers import run_tower
from maple_trl.rollout.engine_models import engine_model
from maple_trl.rollout.vllm_engine import generation_class
from maple_trl.rollout.vllm_generation import OmniVLLMGeneration


SECONDS = 6.0
"""Length of the clip: longer than the pieces in which families interleave pictures and sound."""

KINDS = ("V", "A", "VA", "VA interleaved", "S", "image", "image V", "image VA interleaved", "text")
_BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.5, torch.float16: 0.1}


@dataclass
class Compared:
    """
    How one kind of prompt fared.

    Attributes:
        kind: what the prompt holds.
        tokens, video_tokens, audio_tokens, image_tokens: of the prompt.
        same_ids: whether the engine read the trainer's tokens; `None` where it failed.
        features: greatest difference between the engine's tower outputs and the trainer's, in proportion to the greatest
            of them; `None` where the engine does not show them.
        logps: greatest difference between the log-probabilities with which tokens were sampled and the trainer's.
        logps_after: the same once all weights have changed.
        problem: why there are none, or what is wrong.
    """

    kind: str
    tokens: int = 0
    video_tokens: int = 0
    audio_tokens: int = 0
    same_ids: bool | None = None
    features: float | None = None
    logps: float | None = None
    logps_after: float | None = None
    problem: str | None = None
    applies: bool = True
    image_tokens: int = 0


def compare(
    name_or_path: str,
    dtype: str = "float32",
    server: str | None = None,
    completion: int = 12,
    video: str | None = None,
    engine_options: dict[str, Any] | None = None,
) -> list[Compared]:
    """
    Compare a model's forwards with an engine's.

    Args:
        name_or_path: a model of a family that vLLM is known to serve.
        dtype: of weights and computations.
        server: address of a server that `maple-trl vllm-serve` has started; `None`: an engine in this process.
        completion: tokens that are sampled of each prompt.
        video: a clip with sound; `None`: one is made.
        engine_options: further arguments of the engine.

    Raises:
        ValueError: for another family.
        EngineError: where the engine cannot be started, or does not take the weights.
    """
    model, processor = load_model(name_or_path, dtype=dtype).eval(), load_processor(name_or_path)
    family = family_for(model, processor)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    engine_model(model.config.model_type, device)
    model = model.to(device)
    with tempfile.TemporaryDirectory(prefix="maple-trl-parity-") as folder:
        results, prompts = _prompts(family, Path(folder), video)
        generation = _generation(model, processor, family, completion, server, folder, engine_options or {})
        bound = _BOUNDS[next(model.parameters()).dtype]
        generation.sync_weights()
        _read_all(generation, results, prompts, bound)
        _change(model)
        generation.sync_weights()
        for result, found in zip(_shown(results), _differences(generation, prompts), strict=True):
            result.logps_after = found
            if result.problem is None and found is not None and not found <= bound:
                result.problem = "log-probabilities differ once the weights have changed"
    return results


def _prompts(family: OmniFamily, folder: Path, video: str | None) -> tuple[list[Compared], list[EncodedPrompt]]:
    """Encode a prompt of each kind that the family reads."""
    rng = np.random.default_rng(0)
    if video is None:
        frames = rng.integers(0, 255, (int(SECONDS * FRAME_RATE), 56, 84, 3), dtype=np.uint8)
        write_clip(
            folder / "clip.mp4", frames, (rng.standard_normal(int(SECONDS * SAMPLING_RATE)) * 0.1).astype(np.float32)
        )
    else:
        shutil.copy(video, folder / "clip.mp4")
    builder = PromptBuilder(
        family, MediaLoader(folder, MediaLimits(num_frames=8, max_pixels=24 * family.frame_multiple**2))
    )
    clip = {"video": "clip.mp4", "audio": "clip.mp4"}
    pictures = {"images": ["wide.png", "high.png"]}
    for name, (height, width) in zip(pictures["images"], ((56, 112), (112, 84)), strict=True):
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / name)
    ask = {"prompt": [{"role": "user", "content": "What is there?"}]}
    rows: dict[str, dict[str, Any]] = {
        "V": {**ask, **clip, "tag": "V"},
        "A": {**ask, **clip, "tag": "A"},
        "VA": {**ask, **clip, "tag": "VA"},
        "VA interleaved": {**ask, **clip, "tag": "VA", "audio_in_video": True},
        "S": {**ask, "subtitle": "Who is there, and why?", "tag": "S"},
        "image": {**ask, **pictures, "tag": "V"},
        "image V": {**ask, **clip, **pictures, "tag": "V"},
        "image VA interleaved": {**ask, **clip, **pictures, "tag": "VA", "audio_in_video": True},
        "text": ask,
    }
    results, prompts = [], []
    for kind in KINDS:
        problem = _why_not(family, kind)
        if problem is not None:
            results.append(Compared(kind, problem=problem, applies=False))
            continue
        prompt = builder.encode(rows[kind])
        counts = {f"{name}_tokens": prompt.media_tokens.get(name, 0) for name in ("video", "audio", "image")}
        results.append(Compared(kind, len(prompt), **counts))
        prompts.append(prompt)
    return results, prompts


def _why_not(family: OmniFamily, kind: str) -> str | None:
    needed = (("V", "video"), ("A", "audio"), ("image", "image"))
    lacking = [name for word, name in needed if word in kind and name not in family.placeholders]
    if kind in ("S", "text"):
        return None
    if lacking:
        return f"the family reads no {lacking[0]}"
    return "the family does not interleave" if kind.endswith("interleaved") and not family.interleaves_audio else None


def _generation(
    model: nn.Module,
    processor: ProcessorMixin,
    family: OmniFamily,
    completion: int,
    server: str | None,
    folder: str,
    engine_options: dict[str, Any],
) -> OmniVLLMGeneration:
    own: dict[str, Any] = {"mode": "colocate", "engine_options": engine_options, "max_model_length": 4096}
    if server is not None:
        own = {
            "mode": "server",
            "server_base_url": server,
            "server_timeout": 60.0,
            "request_timeout": 600.0,
            "folder": folder,
        }
    tokenizer: PreTrainedTokenizerBase = processor.tokenizer
    generation = generation_class(own["mode"])(
        model=model,
        accelerator=Accelerator(cpu=not torch.cuda.is_available()),
        processing_class=processor,
        family=family,
        ends=end_tokens(model, tokenizer),
        run_seed=0,
        max_completion_length=completion,
        gpu_memory_utilization=0.3,
        generation_kwargs={"suppress_tokens": family.suppressed_ids},
        **own,
    )
    return generation


def _shown(results: Sequence[Compared]) -> list[Compared]:
    return [result for result in results if result.applies]


def _read_all(
    generation: OmniVLLMGeneration, results: Sequence[Compared], prompts: Sequence[EncodedPrompt], bound: float
) -> None:
    """Compare features of each prompt alone, and log-probabilities of all in one batch."""
    for result, prompt in zip(_shown(results), prompts, strict=True):
        with _watched_towers(generation) as seen:
            generation.generate([prompt], None, 1)
        result.features = _feature_difference(generation, prompt, seen)
    for result, found in zip(_shown(results), _differences(generation, prompts), strict=True):
        result.logps, result.same_ids = found, None if found is None else True  # others than the trainer's end it all
        if found is None:
            result.problem = next(iter(generation.failed.values()), "the engine gave nothing")
        elif not found <= bound:
            result.problem = f"log-probabilities differ by more than {bound:g}"


def _differences(generation: OmniVLLMGeneration, prompts: Sequence[EncodedPrompt]) -> list[float | None]:
    """Sample all prompts in one batch; return each one's greatest difference in log-probability, `None` where it failed."""
    _, completions, sampled, _ = generation.generate(list(prompts), None, 1)
    found: list[float | None] = []
    for row, (prompt, ids, logps) in enumerate(zip(prompts, completions, sampled, strict=True)):
        if row in generation.failed:
            found.append(None)
            continue
        expected = _logps(generation.plain_model, generation.family, prompt, torch.tensor(ids))
        found.append(float((expected - torch.tensor([values[0] for values in logps])).abs().max()))
    return found


@torch.no_grad()
def _logps(model: nn.Module, family: OmniFamily, prompt: EncodedPrompt, completion: Tensor) -> Tensor:
    """Compute what a completion is sampled with by a forward of the row alone; shape (T,)."""
    device = model.device
    ids = torch.cat([prompt.input_ids, completion])[None].to(device)
    positions = forward_position_ids(batch_position_ids([prompt], len(prompt), len(completion))).to(device)
    with serve_media(family, model, [prompt]):
        logits = (
            model(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions).logits[0].float().cpu()
        )
    logits[:, family.suppressed_ids] -= 100.0  # as the engine does
    return logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, completion[:, None])[:, 0]


@contextmanager
def _watched_towers(generation: OmniVLLMGeneration) -> Iterator[list[Tensor]]:
    """Take down what the engine's towers give, where it is in this process."""
    seen: list[Tensor] = []
    model = generation.engine_model
    if model is None:
        yield seen
        return
    generation.empty_caches()
    embed = model.embed_multimodal

    def watch(**inputs: Any) -> Any:
        found = embed(**inputs)
        seen.extend(tensor.detach().float().cpu() for tensor in found)
        return found

    model.embed_multimodal = watch
    try:
        yield seen
    finally:
        del model.embed_multimodal


@torch.no_grad()
def _feature_difference(generation: OmniVLLMGeneration, prompt: EncodedPrompt, seen: Sequence[Tensor]) -> float | None:
    if not seen:
        return None
    core = generation.family.core(generation.plain_model)
    worst = 0.0
    for kind in prompt.kinds:
        (own,) = run_tower(generation.family, core, kind, [prompt])
        counts = generation.family.feature_counts(kind, prompt.media[kind])
        for tokens in own["tokens"].float().cpu().split(counts):
            alike = [other[:, : tokens.size(1)] for other in seen if len(other) == len(tokens)]
            differences = [float((other - tokens).abs().max() / tokens.abs().max()) for other in alike]
            worst = max(worst, min(differences, default=float("inf")))
    return worst


@torch.no_grad()
def _change(model: nn.Module) -> None:
    """Change every weight by a few percent."""
    stream = torch.Generator().manual_seed(0)
    for value in model.parameters():
        noise = torch.randn(value.shape, generator=stream).to(value)
        value.add_(noise * value.float().std(correction=0).to(value) * 0.05)
