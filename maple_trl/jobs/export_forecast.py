"""What an export would read and write: told without a network, without writing, and of weights by their files' headers alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maple_trl.jobs.forecasts import Forecast, many, size_of


if TYPE_CHECKING:
    from maple_trl.omni.export import Parts


PARTS = {"thinker": "the Thinker alone", "full": "the full Omni model", "model": "the model"}
"""What an export holds, in words."""


def forecast_export(
    source: str, output: str, parts: Parts = "thinker", original: str | None = None, **options: Any
) -> Forecast:
    """
    Say what [`~maple_trl.hub.export.export`] would do. Of models that are not in a folder here it is told that they are fetched.

    Args:
        options: further ones of [`~maple_trl.omni.export.export_model`].

    Raises:
        ExportError, CheckpointError: for what the export itself would refuse before it reads weights.
    """
    from maple_trl.hub.export import find_original, plan
    from maple_trl.omni.adapters import find_whole
    from maple_trl.omni.checkpoints import check_hub_id
    from maple_trl.omni.export import check_output

    check_output(Path(output))
    whole, adapter = source, None
    if _is_here(source):
        whole, adapter = find_whole(source, options.get("base_model"))
        original = find_original(source, parts, original, options)
    reads = [f"the adapter in {source}"] if adapter else []
    names = {whole: f"the model {whole}"}
    if parts == "full" and original:
        names[original] = f"{names.get(original, f'the model {original}')}, with the parts that speak"
    found = Forecast(
        reads=[*reads, *(told + ("" if _is_here(name) else " of the Hub") for name, told in names.items())]
    )
    fetched = [name for name in names if not _is_here(name)]
    if fetched:
        for name in fetched:
            check_hub_id(name, "model")
        found.asks = [f"the Hub, for the model {name}" for name in fetched]
        found.writes = [f"{output}: {PARTS[parts]}; how large it is is known when its model is here"]
        found.numbers = {"files": None, "bytes": None}
        return found
    planned = plan(source, output, parts, original, **options)
    found.computes = ["the adapter, merged into the model"] if planned.merged else []
    found.computes.append("what is written, read again: its answer to a prompt against that of the model")
    copied = f", {size_of(planned.copied)} of it copied from {original}" if planned.copied else ""
    found.writes = [
        f"{output}: {PARTS[planned.parts]}, {planned.architecture}, {planned.dtype}: {many(planned.files, 'file')} of weights "
        f"({size_of(planned.size)}{copied}), config, processor and card"
    ]
    found.numbers = {"files": planned.files, "bytes": planned.size}
    return found


def _is_here(name: str) -> bool:
    from maple_trl.omni.loading import BUILTIN_PREFIX

    return name.startswith(BUILTIN_PREFIX) or os.path.exists(name)
