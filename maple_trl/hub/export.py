"""Exports with their card: what a run knows of its model goes along."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from maple_trl.hub.model_card import CardFacts, render_model_card
from maple_trl.hub.results import find_results
from maple_trl.omni.adapters import adapter_folder, read_adapter_config
from maple_trl.omni.checkpoints import CheckpointError
from maple_trl.omni.export import Exported, Parts, Planned, export_model, plan_export


def export(
    source: str,
    output: str | os.PathLike[str],
    parts: Parts = "thinker",
    original: str | None = None,
    license: str | None = None,
    **options: Any,
) -> Exported:
    """
    Export a model as [`~maple_trl.omni.export.export_model`] does, with a card.

    Args:
        original: default: the model that was trained, where the run or the adapter says which.
        license: for the card, as the Hub calls it.
        options: further ones of `export_model`, whose errors apply.
    """
    original = find_original(source, parts, original, options)
    finish = _writer(CardFacts.read(source), original, license, source)
    return export_model(source, output, parts, original, finish=finish, **options)


def plan(
    source: str,
    output: str | os.PathLike[str],
    parts: Parts = "thinker",
    original: str | None = None,
    **options: Any,
) -> Planned:
    """Say what [`export`] would write, as [`~maple_trl.omni.export.plan_export`] does, whose errors apply."""
    return plan_export(source, output, parts, find_original(source, parts, original, options), **options)


def find_original(source: str, parts: Parts, original: str | None, options: Mapping[str, Any]) -> str | None:
    """Return the model whose parts that speak are taken: the one that is named, or that was trained; `None` without either."""
    if parts != "full" or original is not None:
        return original
    return options.get("base_model") or _trained_from(source, CardFacts.read(source), options.get("revision", "main"))


def _writer(facts: CardFacts, original: str | None, license: str | None, source: str) -> Any:
    def write(folder: Path, exported: Exported) -> None:
        found = CardFacts.read(folder)
        whole = replace(
            facts,
            name=Path(exported.folder).resolve().name,
            repository=None,
            trained_from=original or facts.trained_from or (source if facts.trainer is None else None),
            adapter=False,
            architecture=exported.architecture,
            model_type=found.model_type,
            license=license or facts.license,
            parts=exported.parts if exported.parts == "full" else None,
            # It was measured of these weights, or of the adapter that is merged into them.
            measured=[*facts.measured, *(asdict(table) for table in find_results(source, facts.dataset))],
        )
        plot = Path(source, "training.png")
        if plot.is_file():
            shutil.copyfile(plot, folder / plot.name)
        whole.write(folder, render_model_card(whole, folder))

    return write


def _trained_from(source: str, facts: CardFacts, revision: str) -> str | None:
    if facts.trained_from:
        return facts.trained_from
    folder = adapter_folder(source, revision)
    try:
        return None if folder is None else read_adapter_config(folder).base_model_name_or_path
    except CheckpointError:
        return None
