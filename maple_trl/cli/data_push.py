"""The command `maple-trl data push`: its options, and what it prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from maple_trl.cli.failures import asks_for_help, fail, refuse


# Nothing heavier than the standard library up here: the help of every command passes through this module.

_DESCRIPTION = """\
Validates the shards of a folder and uploads them to the Hub as a data set, with a card that says what they hold. Media are not
uploaded."""

_EXAMPLES = """\
examples:
  maple-trl data push data/rows me/rows --private
  maple-trl data push data/rows me/rows --license cc-by-4.0 --media_root data/clips

The key is the one of the Hub's own tools: `hf auth login`, or the variable HF_TOKEN. Shards of an earlier upload are replaced in one
commit; other files of the repository stay.

Every option may be a key of a YAML file (--config FILE); the command line wins.
Exit status: 0; 1 when a row has a problem; 2 when nothing can be uploaded; 130 when interrupted.
"""


@dataclass
class PushArguments:
    """How `maple-trl data push` uploads."""

    private: bool = field(default=False, metadata={"help": "make a new repository private"})
    license: str | None = field(default=None, metadata={"help": "license for the card, as cc-by-4.0"})
    media_root: str | None = field(
        default=None, metadata={"help": "folder of the media, in which their files must be (only paths are checked)"}
    )
    message: str = field(default="Upload rows", metadata={"help": "message of the commit"})
    json: bool = field(default=False, metadata={"help": "print what was uploaded as JSON"})


def run_push(words: Sequence[str]) -> int:
    """Run the command; the exit status is as the help says."""
    from maple_trl.jobs.errors import SetupError
    from maple_trl.jobs.options import OptionParser, read_options

    parser = OptionParser([PushArguments], prog="maple-trl data push", description=_DESCRIPTION, epilog=_EXAMPLES)
    parser.add_argument("folder", metavar="FOLDER", help="folder of shards, as data convert writes it")
    parser.add_argument("repository", metavar="REPO_ID", help="OWNER/NAME of the data set")
    if asks_for_help(words):
        parser.print_help()
        return 0
    try:
        arguments, named = read_options(parser, words)
    except SetupError as error:
        return refuse("data push", error)
    from maple_trl.cli.data_validate import print_report
    from maple_trl.data.publish import InvalidRowsError, PublishError, publish
    from maple_trl.data.record_files import TableError
    from maple_trl.data.shards import ShardError

    given = asdict(arguments)
    del given["json"]
    try:
        published = publish(named.folder, named.repository, **given)
    except InvalidRowsError as error:
        print_report(error.report)
        return refuse("data push", error, 1)
    except (PublishError, ShardError, TableError) as error:
        return refuse("data push", error)
    except KeyboardInterrupt:
        return refuse("data push", "stopped; nothing was committed", 130)
    except Exception as error:
        return fail("data push", error)
    if arguments.json:
        print(json.dumps(asdict(published), indent=2))
        return 0
    print(f"{published.rows} rows in {len(published.files) - 1} shards: {published.url}")
    if published.removed:
        print(f"removed {len(published.removed)} shards of an earlier upload")
    return 0
