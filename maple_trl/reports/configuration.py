"""What a run was told to do: its options, those that are looked at first in groups."""

from __future__ import annotations

import json
from typing import Any

from maple_trl.reports.folders import RunData
from maple_trl.reports.sections import Section, decided_by, missing


GROUPS = {
    "Model and data": "trainer model_name_or_path dtype use_peft lora_r lora_alpha dataset_name dataset_filter media_root "
    "modality_access prompt_template system_prompt seed",
    "Rewards": "reward_funcs reward_weights scale_rewards multi_objective_aggregation task_reward",
    "Sampling": "num_generations temperature top_p top_k max_prompt_length max_completion_length use_vllm vllm_mode "
    "generation_batch_size steps_per_generation num_iterations",
    "Optimization": "learning_rate lr_scheduler_type warmup_steps max_steps num_train_epochs per_device_train_batch_size "
    "gradient_accumulation_steps max_grad_norm beta epsilon epsilon_high loss_type importance_sampling_level bf16",
    "Media": "num_frames video_fps max_frames max_pixels audio_in_video max_media_tokens shared_prefix",
    "MAPO": "method batching advantage_scope loss_strata loss_aggregation difficulty tag_weights curriculum "
    "curriculum_granularity dynamic_sampling",
    "AVATAR": "replayed_generations replay_scope replay_draw replay_capacity advantage_group tas_lambda tas_shape hints "
    "hint_visits hint_max_kl",
}
QUARANTINE_SHOWN = 100
"""Prompts in quarantine that a page names, at most."""


def configuration_section(run: RunData) -> Section:
    """Return all options of a run as names and values, and by group the names of those that are looked at first."""
    if run.kind == "evaluation":
        options = decided_by(run.result or {})
        if not options:
            return missing("No question has been answered yet.")
        return {"options": options, "groups": {}}
    if run.options is None:
        return missing("The folder holds no args.json, which a training job writes; a trainer alone does not.")
    options = [(str(name), _text(value)) for name, value in run.options.items()]
    groups = {title: [name for name in names.split() if name in run.options] for title, names in GROUPS.items()}
    return {"options": options, "groups": {title: names for title, names in groups.items() if names}}


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def left_out_section(run: RunData) -> Section:
    """Return what a run says that it left out, failed at or never fired, and its quarantine by reason."""
    if run.kind == "evaluation":
        return missing("Questions of an evaluation with errors stand below its accuracies.")
    notes = [str(note.get("text")) for note in run.left_out]
    if not notes and not run.quarantine:
        text = "The run has left nothing out so far." if run.finished is False else "The run left nothing out."
        return missing(text)
    reasons: dict[str, list[int]] = {}
    for entry in run.quarantine:
        counts = reasons.setdefault(entry["reason"], [0, 0])
        counts[0] += 1
        counts[1] += len(entry.get("rows") or ())
    shown = [
        {
            "dataset": str(entry.get("dataset") or ""),
            "rows": ", ".join(map(str, (entry.get("rows") or ())[:5]))
            + (" …" if len(entry.get("rows") or ()) > 5 else ""),
            "reason": entry["reason"],
            "path": str(entry["path"] or ""),
            "detail": str(entry.get("detail") or "")[:500],
        }
        for entry in run.quarantine[:QUARANTINE_SHOWN]
    ]
    ordered = sorted(reasons.items(), key=lambda item: -item[1][0])
    return {
        "notes": notes,
        "quarantine": {
            "total": len(run.quarantine),
            "reasons": [[name, *counts] for name, counts in ordered],
            "shown": shown,
        },
    }
