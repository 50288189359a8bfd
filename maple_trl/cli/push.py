"""The command `maple-trl push`: its options, and what it prints."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, field

from maple_trl.cli.base import Command
from maple_trl.cli.failures import WRONG
from maple_trl.cli.servers import DRY_RUN


# Nothing heavier than the standard library up here: the help of every command passes through this module.


@dataclass
class PushModelArguments:
    """How `maple-trl push` uploads."""

    private: bool = field(default=False, metadata={"help": "make a new repository private"})
    license: str | None = field(default=None, metadata={"help": "license for the card, as apache-2.0"})
    base_model: str | None = field(
        default=None, metadata={"help": "Hub id of the model that was trained, where the run knows it by a path alone"}
    )
    evaluations: list[str] = field(
        default_factory=list, metadata={"help": "folders of `maple-trl eval` for the card, beside those within FOLDER"}
    )
    revision: str | None = field(default=None, metadata={"help": "branch, which is made where there is none (main)"})
    message: str = field(default="Upload model", metadata={"help": "message of the commit"})
    dry_run: bool = field(default=False, metadata={"help": DRY_RUN})
    json: bool = field(default=False, metadata={"help": "print what was uploaded as JSON"})


def run(arguments: PushModelArguments, named: argparse.Namespace) -> int:
    """Upload a model, and print what was uploaded."""
    from maple_trl.cli.dry_run import tell
    from maple_trl.hub.publish import push_model
    from maple_trl.hub.results import read_evaluation
    from maple_trl.jobs.data_forecasts import forecast_model_upload

    given = asdict(arguments)
    del given["json"], given["dry_run"]
    evaluations = given.pop("evaluations")
    measured = [table for folder in evaluations for table in read_evaluation(folder)]
    if arguments.dry_run:
        return tell(forecast_model_upload(named.folder, named.repository), arguments.json)
    pushed = push_model(named.folder, named.repository, measured=measured, **given)
    if arguments.json:
        print(json.dumps(asdict(pushed), indent=2))
        return 0
    card = "with its card as it was found" if pushed.own_card else "with a card"
    print(f"{len(pushed.files)} files, {card}: {pushed.url}")
    return 0


COMMAND = Command(
    name="push",
    help="upload a trained model or adapter to the Hub, with a card",
    run=run,
    description="""\
Uploads a trained model or adapter to the Hub, with a card that says what it is, how it was trained, what was measured of it, and
how it is asked. Weights, configs and processor are uploaded; data, completions, logs, paths and keys are not.""",
    examples=(
        "maple-trl push runs/demo me/demo --private",
        "maple-trl push runs/lora/checkpoint-100 me/lora --base_model Qwen/Qwen2.5-Omni-7B --license apache-2.0",
        "maple-trl push exported/full me/omni --evaluations runs/eval_after",
    ),
    notes="""\
Evaluations in folders within FOLDER are in the card. A card that you have changed, or written, is uploaded as it is.

The key is the one of the Hub's own tools: `hf auth login`, or the variable HF_TOKEN. After a broken connection the same command
goes on: what arrived is not sent again.""",
    statuses={WRONG: "nothing can be uploaded"},
    options={"options": PushModelArguments},
    arguments={
        "FOLDER": {"help": "output folder of a training job, one of its checkpoints, or what export wrote"},
        "REPO_ID": {"dest": "repository", "help": "OWNER/NAME of the model"},
    },
    errors=dict.fromkeys(("maple_trl.hub.errors:PublishError", "maple_trl.hub.results:ResultsError"), WRONG),
    stopped="nothing was committed",
)
