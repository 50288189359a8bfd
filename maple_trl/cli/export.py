"""The command `maple-trl export`: its options, and what it prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

from maple_trl.cli.failures import asks_for_help, fail, refuse


# Nothing heavier than the standard library up here: the help of every command passes through this module.

_DESCRIPTION = """\
Writes a trained model into a new folder that other programs load: adapters are merged, and of an Omni model the Thinker is
written alone, or as the full model again, with the talker and vocoder of the original. What was written is read again, and must
answer as the model did."""

_EXAMPLES = """\
examples:
  maple-trl export runs/demo exported
  maple-trl export runs/lora exported/full --parts full --original Qwen/Qwen2.5-Omni-7B
  maple-trl export runs/lora/checkpoint-100 exported/thinker --dtype bfloat16

RUN is the output folder of a training job, one of its checkpoints, or a Hub id; of a whole model or of a LoRA adapter.
OUTPUT must not be there yet. It appears whole or not at all.

Every option may be a key of a YAML file (--config FILE); the command line wins.
Exit status: 0; 1 when an error ends it; 2 when nothing can be exported so; 130 when interrupted.
"""


@dataclass
class ExportArguments:
    """How `maple-trl export` writes a model."""

    parts: Literal["thinker", "full"] = field(
        default="thinker",
        metadata={
            "help": "of an Omni model: thinker, which answers with text, or full, with the talker and vocoder of the original. "
            "Of a family without a talker the model is written whole either way it is trained"
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
    json: bool = field(default=False, metadata={"help": "print what was written as JSON"})


def run_export(words: Sequence[str]) -> int:
    """Run the command; the exit status is as the help says."""
    from maple_trl.jobs.errors import SetupError
    from maple_trl.jobs.options import OptionParser, read_options

    parser = OptionParser([ExportArguments], prog="maple-trl export", description=_DESCRIPTION, epilog=_EXAMPLES)
    parser.add_argument("run", metavar="RUN", help="folder of a run or a checkpoint, or a Hub id")
    parser.add_argument("output", metavar="OUTPUT", help="folder to make")
    if asks_for_help(words):
        parser.print_help()
        return 0
    try:
        arguments, named = read_options(parser, words)
    except SetupError as error:
        return refuse("export", error)
    from maple_trl.hub.export import export
    from maple_trl.omni.checkpoints import CheckpointError
    from maple_trl.omni.export import ExportError

    given = asdict(arguments)
    del given["json"]
    try:
        exported = export(named.run, named.output, **given)
    except (ExportError, CheckpointError) as error:
        return refuse("export", error, 2, named.output)
    except KeyboardInterrupt:
        return refuse("export", "stopped; nothing was written", 130)
    except Exception as error:
        return fail("export", error)
    if arguments.json:
        print(json.dumps(asdict(exported), indent=2))
        return 0
    what = {"thinker": "the Thinker alone", "full": "the full Omni model", "model": "the model"}[exported.parts]
    merged = f", the adapter merged (log-probabilities within {exported.difference:.1e})" if exported.merged else ""
    print(f"{what}{merged}: {exported.architecture}, {exported.dtype}, {len(exported.files)} files of weights")
    print(f"written to {exported.folder}")
    return 0
