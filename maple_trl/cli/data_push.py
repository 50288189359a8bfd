"""The command `maple-trl data push`: its options, and what it prints."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, field

from maple_trl.cli.base import Command
from maple_trl.cli.failures import FAILED, WRONG, refuse
from maple_trl.cli.servers import DRY_RUN


# Nothing heavier than the standard library up here: the help of every command passes through this module.


@dataclass
class PushArguments:
    """How `maple-trl data push` uploads."""

    private: bool = field(default=False, metadata={"help": "make a new repository private"})
    license: str | None = field(default=None, metadata={"help": "license for the card, as cc-by-4.0"})
    media_root: str | None = field(
        default=None, metadata={"help": "folder of the media, in which their files must be (only paths are checked)"}
    )
    message: str = field(default="Upload rows", metadata={"help": "message of the commit"})
    dry_run: bool = field(default=False, metadata={"help": DRY_RUN})
    json: bool = field(default=False, metadata={"help": "print what was uploaded as JSON"})


def run(arguments: PushArguments, named: argparse.Namespace) -> int:
    """Upload a folder of shards, and print what was uploaded."""
    from maple_trl.cli.data_validate import print_report
    from maple_trl.cli.dry_run import tell
    from maple_trl.data.publish import InvalidRowsError, publish
    from maple_trl.jobs.data_forecasts import forecast_upload

    given = asdict(arguments)
    del given["json"], given["dry_run"]
    try:
        if arguments.dry_run:
            return tell(forecast_upload(named.folder, named.repository, arguments.media_root), arguments.json)
        published = publish(named.folder, named.repository, **given)
    except InvalidRowsError as error:
        print_report(error.report, _LEFT_OUT)
        return refuse("data push", error, FAILED)
    if arguments.json:
        print(json.dumps(asdict(published), indent=2))
        return 0
    shards = len(published.files) - (not published.own_card)
    print(f"{published.rows} rows in {shards} shards: {published.url}")
    for path in published.left_out:
        print(f"{_LEFT_OUT}: {path}")
    if published.removed:
        print(f"removed {len(published.removed)} shards of an earlier upload")
    if published.kept:
        print(f"left as they are, of an earlier upload: {', '.join(published.kept)}")
    if published.own_card:
        print(
            "left as it is: README.md, which a person has written or changed; delete it there to have it written anew"
        )
    return 0


_LEFT_OUT = "not uploaded, as it is no shard"

COMMAND = Command(
    name="data push",
    help="upload shards to the Hub, with a card",
    run=run,
    description="""\
Validates the shards of a folder and uploads them to the Hub as a data set, with a card that says what they hold. Media are not
uploaded.""",
    examples=(
        "maple-trl data push data/rows me/rows --dry_run",
        "maple-trl data push data/rows me/rows --private",
        "maple-trl data push data/rows me/rows --license cc-by-4.0 --media_root data/clips",
    ),
    notes="""\
The key is the one of the Hub's own tools: `hf auth login`, or the variable HF_TOKEN. Shards of an earlier upload are replaced in
one commit, those of the splits in FOLDER alone. Other splits and files of the repository stay, and so does its README.md where a
person has written or changed it.""",
    statuses={
        FAILED: "a row has a problem, or the Hub failed",
        WRONG: "nothing can be uploaded, or described wrongly",
    },
    options={"options": PushArguments},
    arguments={
        "FOLDER": {"help": "folder of shards, as data convert writes it"},
        "REPO_ID": {"dest": "repository", "help": "OWNER/NAME of the data set"},
    },
    errors=dict.fromkeys(
        (
            "maple_trl.hub.errors:PublishError",
            "maple_trl.data.shards:ShardError",
            "maple_trl.data.record_files:TableError",
        ),
        WRONG,
    ),
    stopped="nothing was committed",
)
