"""The command `maple-trl push`: its options, and what it prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from maple_trl.cli.failures import asks_for_help, fail, refuse


# Nothing heavier than the standard library up here: the help of every command passes through this module.

_DESCRIPTION = """\
Uploads a trained model or adapter to the Hub, with a card that says what it is, how it was trained, what was measured of it, and
how it is asked. Weights, configs and processor are uploaded; data, completions, logs, paths and keys are not."""

_EXAMPLES = """\
examples:
  maple-trl push runs/demo me/demo --private
  maple-trl push runs/lora/checkpoint-100 me/lora --base_model Qwen/Qwen2.5-Omni-7B --license apache-2.0
  maple-trl push exported/full me/omni --evaluation runs/eval_after

FOLDER is the output folder of a training job, one of its checkpoints, or what `maple-trl export` wrote. Evaluations in folders
within it are in the card. A card that you have changed, or written, is uploaded as it is.

The key is the one of the Hub's own tools: `hf auth login`, or the variable HF_TOKEN. After a broken connection the same command
goes on: what arrived is not sent again.

Every option may be a key of a YAML file (--config FILE); the command line wins.
Exit status: 0; 2 when nothing can be uploaded; 130 when interrupted.
"""


@dataclass
class PushModelArguments:
    """How `maple-trl push` uploads."""

    private: bool = field(default=False, metadata={"help": "make a new repository private"})
    license: str | None = field(default=None, metadata={"help": "license for the card, as apache-2.0"})
    base_model: str | None = field(
        default=None, metadata={"help": "Hub id of the model that was trained, where the run knows it by a path alone"}
    )
    evaluation: list[str] = field(
        default_factory=list, metadata={"help": "folders of `maple-trl eval` for the card, beside those within FOLDER"}
    )
    revision: str | None = field(default=None, metadata={"help": "branch, which is made where there is none (main)"})
    message: str = field(default="Upload model", metadata={"help": "message of the commit"})
    json: bool = field(default=False, metadata={"help": "print what was uploaded as JSON"})


def run_push(words: Sequence[str]) -> int:
    """Run the command; the exit status is as the help says."""
    from maple_trl.jobs.errors import SetupError
    from maple_trl.jobs.options import OptionParser, read_options

    parser = OptionParser([PushModelArguments], prog="maple-trl push", description=_DESCRIPTION, epilog=_EXAMPLES)
    parser.add_argument("folder", metavar="FOLDER", help="folder of a run, a checkpoint or an export")
    parser.add_argument("repository", metavar="REPO_ID", help="OWNER/NAME of the model")
    if asks_for_help(words):
        parser.print_help()
        return 0
    try:
        arguments, named = read_options(parser, words)
    except SetupError as error:
        return refuse("push", error)
    from maple_trl.hub.errors import PublishError
    from maple_trl.hub.publish import push_model
    from maple_trl.hub.results import ResultsError, read_evaluation

    given = asdict(arguments)
    del given["json"]
    evaluations = given.pop("evaluation")
    try:
        measured = [table for folder in evaluations for table in read_evaluation(folder)]
        pushed = push_model(named.folder, named.repository, measured=measured, **given)
    except (PublishError, ResultsError) as error:
        return refuse("push", error)
    except KeyboardInterrupt:
        return refuse("push", "stopped; nothing was committed", 130)
    except Exception as error:
        return fail("push", error)
    if arguments.json:
        print(json.dumps(asdict(pushed), indent=2))
        return 0
    card = "with its card as it was found" if pushed.own_card else "with a card"
    print(f"{len(pushed.files)} files, {card}: {pushed.url}")
    return 0
