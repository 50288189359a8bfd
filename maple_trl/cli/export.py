"""The command `maple-trl export`: its options, and what it prints."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, field
from typing import Literal

from maple_trl.cli.base import Command
from maple_trl.cli.failures import WRONG
from maple_trl.cli.servers import DRY_RUN


# Nothing heavier than the standard library up here: the help of every command passes through this module.


@dataclass
class ExportArguments:
    """How `maple-trl export` writes a model."""

    parts: Literal["thinker", "full"] = field(
        default="thinker",
        metadata={
            "help": "of an Omni model: thinker, which answers with text, or full, with the talker and vocoder of the original. "
            "A family without a talker is always written whole"
        },
    )
    original: str | None = field(
        default=None,
        metadata={
            "help": "full Omni model, a folder or Hub id, whose talker, vocoder, config and processor are taken (the model that "
            "was trained, where the run says it)"
        },
    )
    original_revision: str = field(default="main", metadata={"help": "revision of it on the Hub"})
    base_model: str | None = field(
        default=None, metadata={"help": "model that an adapter was trained on, where the adapter does not say it"}
    )
    revision: str = field(default="main", metadata={"help": "revision of RUN on the Hub"})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto",
        metadata={"help": "precision of the trained weights (that of RUN; for full that of the original)"},
    )
    max_shard_size: str = field(default="5GB", metadata={"help": "most bytes of a file of weights, as 5GB"})
    license: str | None = field(default=None, metadata={"help": "license for the card, as apache-2.0"})
    dry_run: bool = field(default=False, metadata={"help": DRY_RUN})
    json: bool = field(default=False, metadata={"help": "print what was written as JSON"})


def run(arguments: ExportArguments, named: argparse.Namespace) -> int:
    """Export a model, and print what was written."""
    from maple_trl.cli.dry_run import tell
    from maple_trl.hub.export import export
    from maple_trl.jobs.export_forecast import PARTS, forecast_export

    given = asdict(arguments)
    del given["json"], given["dry_run"]
    if arguments.dry_run:
        del given["license"]
        return tell(forecast_export(named.run, named.output, **given), arguments.json)
    exported = export(named.run, named.output, **given)
    if arguments.json:
        print(json.dumps(asdict(exported), indent=2))
        return 0
    merged = f", the adapter merged (log-probabilities within {exported.difference:.1e})" if exported.merged else ""
    print(
        f"{PARTS[exported.parts]}{merged}: {exported.architecture}, {exported.dtype}, {len(exported.files)} files of weights"
    )
    print(f"written to {exported.folder}")
    return 0


COMMAND = Command(
    name="export",
    help="write a trained model for other programs, with its adapters merged",
    run=run,
    description="""\
Writes a trained model into a new folder that other programs load: adapters are merged, and of an Omni model the Thinker is
written alone, or as the full model again, with the talker and vocoder of the original. What was written is read again, and must
answer as the model did.""",
    examples=(
        "maple-trl export runs/demo exported",
        "maple-trl export runs/lora exported/full --parts full --original Qwen/Qwen2.5-Omni-7B",
        "maple-trl export runs/lora exported/full --parts full --dry_run",
        "maple-trl export runs/lora/checkpoint-100 exported/thinker --dtype bfloat16",
    ),
    notes="OUTPUT must not be there yet. It appears whole or not at all.",
    statuses={WRONG: "nothing can be exported so"},
    options={"options": ExportArguments},
    arguments={
        "RUN": {
            "help": "output folder of a training job, one of its checkpoints, or a Hub id; of a whole model or of a LoRA adapter"
        },
        "OUTPUT": {"help": "folder to make"},
    },
    errors=dict.fromkeys(("maple_trl.omni.export:ExportError", "maple_trl.omni.checkpoints:CheckpointError"), WRONG),
    writes=lambda arguments, named: named.output,
    stopped="nothing was written",
)
