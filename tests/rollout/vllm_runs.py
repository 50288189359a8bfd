"""Runs whose completions vLLM samples, and an independent reference of what it must have sampled them with."""

import os

import pytest
import tiny_models
import torch
from datasets import Dataset
from media_files import copy_small_set, picture, tone, write_video
from omni_runs import DEFAULTS, spread_reward
from PIL import Image

from maple_trl import AvatarConfig, AvatarTrainer, MAPOConfig, MAPOTrainer, OmniGRPOConfig, OmniGRPOTrainer
from maple_trl.omni.encoded import forward_position_ids
from maple_trl.omni.loading import load_model, load_processor
from maple_trl.omni.serving import serve_media


os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")  # or it asks which address leads to the internet

BOUND = 1e-4
OPTIONS = DEFAULTS | {
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "max_completion_length": 8,
    "learning_rate": 1e-2,
    "max_steps": 3,
    "use_vllm": True,
    "vllm_mode": "colocate",
    "vllm_max_model_length": 1024,
    "vllm_gpu_memory_utilization": 0.2,
    "lr_scheduler_type": "constant",
}
KINDS = {
    "grpo": (OmniGRPOTrainer, OmniGRPOConfig),
    "mapo": (MAPOTrainer, MAPOConfig),
    "avatar": (AvatarTrainer, AvatarConfig),
}


@torch.no_grad()
def reference_logits(model, family, prompt, completion):
    """Logits for each token of a row's completion and for the next one: one plain forward of the row alone."""
    ids = torch.cat([prompt.input_ids, completion])[None]
    later = prompt.position_ids[:, -1:] + torch.arange(1, len(completion) + 1)
    positions = torch.cat([prompt.position_ids, later], dim=1)[:, None]
    was_training = model.training
    model.eval()
    with serve_media(family, model, [prompt]):
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        logits = model(**inputs, position_ids=forward_position_ids(positions)).logits[0].float()
    model.train(was_training)
    return logits[len(prompt) - 1 :]


def reference_logps(model, family, prompt, completion, suppressed):
    """What a row's tokens are sampled with, suppressed tokens left out."""
    logits = reference_logits(model, family, prompt, completion)[:-1]
    logits[:, suppressed] -= 100.0
    return logits.log_softmax(-1).gather(1, completion[:, None])[:, 0]


def compared(trainer_class):
    """The trainer, with the greatest difference from the reference noted for each rollout, by tag."""

    class Compared(trainer_class):
        def __init__(self, *args, **kwargs):
            self.worst, self.media = [], []
            super().__init__(*args, **kwargs)

        def _log_ratios(self, batch, flight):
            super()._log_ratios(batch, flight)
            model = self.accelerator.unwrap_model(self.model)
            worst = {}
            for i, prompt in enumerate(flight.prompts):
                if i in flight.failed:
                    continue
                length = int(batch["completion_mask"][i].sum())
                tokens = batch["completion_ids"][i, :length]
                expected = reference_logps(model, self.family, prompt, tokens, self.family.suppressed_ids)
                error = (expected - batch["sampling_per_token_logps"][i, :length]).abs().max()
                name = f"{prompt.tag}{'+' if self.is_interleaved(prompt) else ''}"
                worst[name] = max(worst.get(name, 0.0), float(error))
            self.worst.append(worst)

        def is_interleaved(self, prompt):
            if not {"video", "audio"} <= set(prompt.kinds):
                return False
            ids = [self.family.placeholder_ids[kind] for kind in ("video", "audio")]
            places = torch.isin(prompt.input_ids, torch.tensor(ids))
            kinds = prompt.input_ids[places]
            return int((kinds[1:] != kinds[:-1]).sum()) > 1

    return Compared


def build(kind, folder, dataset, model="builtin:tiny-omni", trainer=None, reward=spread_reward, **options):
    """
    A trainer whose clips are in `folder`, of a named model or of one that was made of the default; vLLM's kernels for a CPU
    take heads of 32 and more, as that one has.
    """
    trainer_class, config_class = KINDS[kind]
    given = {"peft_config": options.pop("peft_config")} if "peft_config" in options else {}
    options = OPTIONS | {"output_dir": str(folder / "run"), "media_root": str(folder), **options}
    return (trainer or compared(trainer_class))(
        model=load_model(model, dtype="float32") if isinstance(model, str) else model,
        processing_class=load_processor(model if isinstance(model, str) else "builtin:tiny-omni"),
        reward_funcs=reward,
        args=config_class(**options),
        train_dataset=dataset,
        **given,
    )


def one_of_each(folder):
    """
    A row of each tag, and their clips. That of VA has its sound among the pictures of a longer clip, and as that of VAS a
    picture beside it; that of VS has two pictures and no clip.
    """
    rows = {row["tag"]: row for row in copy_small_set(folder)}
    write_video(folder / "long.mp4", frames=48, fps=8, audio=tone(6.0, 16000))
    for i, size in enumerate(((56, 56), (56, 84))):
        Image.fromarray(picture(i + 1, *size)).save(folder / f"{i}.png")
    rows["VA"] |= {"video": "long.mp4", "audio": "long.mp4", "images": ["1.png"]}
    rows["VAS"] |= {"images": ["0.png"]}
    rows["VS"] |= {"video": None, "images": ["0.png", "1.png"]}
    return Dataset.from_list([{"images": [], **row, "audio_in_video": tag == "VA"} for tag, row in rows.items()])


def save_wide(family, folder, full=False):
    """A tiny random model of a family, `full` with its talker, with heads of 32, which vLLM's kernels for a CPU take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_models, "HIDDEN", 128)
        patch.setattr(tiny_models, "_MROPE", {**tiny_models._MROPE, "mrope_section": [8, 4, 4]})
        tiny_models._built.cache_clear()
        saved = (tiny_models.save_tiny_full if full else tiny_models.save_tiny)(family, folder, seed=1)
        tiny_models._built.cache_clear()
    return str(saved)
