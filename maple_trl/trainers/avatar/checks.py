"""What AVATAR's options ask of the data and of the batch, looked at before training."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from datasets import Dataset
from torch import nn

from maple_trl.algorithms import replayed_slots
from maple_trl.data.hint_leaks import LEAKS, leaks_answer
from maple_trl.omni.content import read_content
from maple_trl.omni.prompt import PromptBuilder, RowError
from maple_trl.trainers.avatar.config import AvatarConfig
from maple_trl.trainers.common.hinted_rows import HINT_COLUMN, has_hint, row_digest, with_hint
from maple_trl.trainers.common.learning_checks import dropout_layers
from maple_trl.trainers.common.rows import check_row_tags


logger = logging.getLogger(__name__)


def check_tags(args: AvatarConfig, dataset: Any) -> None:
    """
    Check that each row has a tag, where rows are batched or scaled by tag.

    Raises:
        RowError: for the first row without a tag, where an option needs one.
        ValueError: for a streamed data set, where rows are batched or scaled by tag.
    """
    by_tag = args.advantage_scope not in ("group", "batch")
    if args.tag_aware or args.batching != "stratified" and not by_tag:  # the schedule has looked at them
        return
    name = "advantage_scope" if by_tag else "batching"
    option = f"{name}={getattr(args, name)!r}"
    if not isinstance(dataset, Dataset):
        raise ValueError(f"{option} needs a map-style Dataset, got {type(dataset).__name__}")
    check_row_tags(dataset["tag"] if "tag" in dataset.column_names else [None], f"{option} needs a field 'tag'")


def check_hints(args: AvatarConfig, dataset: Any, builder: PromptBuilder | None) -> None:
    """
    Check the column `hint`, and that each row that has one can be shown with it.

    Raises:
        RowError: for the first row that cannot be a prompt with its hint.
        ValueError: when no row has a hint.
    """
    hinted = check_hint_column(args, dataset)
    for i in hinted:
        try:
            row = with_hint(dataset[i], args.hint_template)
            if builder is not None:
                builder.spec(row)
        except RowError as error:
            raise RowError(f"train_dataset, row {i}, with its field {HINT_COLUMN!r}: {error}") from error
    if hinted and args.process_index == 0:
        _tell_of_leaks(dataset, hinted)


def check_hint_column(args: AvatarConfig, dataset: Any) -> list[int]:
    """
    Check the column `hint`.

    Returns:
        `list[int]`: the rows that have one; none without `hints`, and of streamed rows, which are looked at when they come.

    Raises:
        RowError: for the first hint that is no text.
        ValueError: when no row has a hint.
    """
    columns = getattr(dataset, "column_names", None)
    if not args.hints or not columns:
        return []
    if HINT_COLUMN not in columns:
        raise ValueError(
            f"hints=True, but train_dataset has no column {HINT_COLUMN!r} (its columns: {', '.join(columns)}); "
            "`maple-trl data hints` writes one"
        )
    if not isinstance(dataset, Dataset):
        return []
    hints = list(dataset[HINT_COLUMN])
    odd = next((i for i, hint in enumerate(hints) if hint is not None and not isinstance(hint, str)), None)
    if odd is not None:
        raise RowError(
            f"train_dataset, row {odd}: field {HINT_COLUMN!r} must be a text or empty, got {hints[odd]!r:.60}"
        )
    hinted = [i for i, hint in enumerate(hints) if has_hint({HINT_COLUMN: hint})]
    if not hinted:
        raise ValueError(f"hints=True, but every {HINT_COLUMN!r} of train_dataset is empty")
    return hinted


def check_hint_visits(args: AvatarConfig, dataset: Any, warn: bool = True) -> None:
    """
    Check that prompts come back so often that one can be stuck long enough for its hint.

    A run that `max_steps` ends may be a first try: it is a warning.

    Args:
        warn: whether warnings are given, and not only errors.

    Raises:
        ValueError: when no hint could ever be shown.
    """
    if not args.hints or not isinstance(dataset, Dataset) or not len(dataset):
        return
    prompts, updates = args.prompts_per_rollout, args.steps_per_rollout
    # Shuffled, a prompt may be the last of an epoch and the first of the next.
    apart = updates if args.shuffle_dataset else updates * max(1, len(dataset) // prompts)
    if args.replay_max_age is not None and args.replay_max_age < apart:
        raise ValueError(
            f"hints=True, but no hint can ever be shown: it asks how far the policy has moved on a prompt's own completions, "
            f"which are older than replay_max_age={args.replay_max_age} when the prompt comes back ({apart:g} steps later at "
            "least). Raise replay_max_age, or set hints=False"
        )
    warn = warn and args.process_index == 0
    if warn:
        _tell_of_lost_completions(args, len(dataset), ", and hints wait for one of a prompt's own")
    by_steps = args.max_steps / updates * prompts / len(dataset) if args.max_steps > 0 else None
    visits = args.num_train_epochs if by_steps is None else by_steps
    needed = args.first_hinted_visit
    often = _repeats(args, dataset, prompts) if math.ceil(visits) < needed else 1
    if math.ceil(visits) * often >= needed:
        return
    length = f"num_train_epochs={args.num_train_epochs:g}" if by_steps is None else f"max_steps={args.max_steps}"
    text = (
        f"hints=True, but no hint can ever be shown: with hint_visits={args.hint_visits} that is at a prompt's visit "
        f"{needed} at the earliest, and this run ({length}) visits each of {len(dataset)} rows "
        f"{visits:.2g} times. Train for {needed} epochs or more (num_train_epochs), lower hint_visits, or set hints=False"
    )
    if by_steps is None:
        raise ValueError(text)
    if warn:
        logger.warning("%s", text)


def _repeats(args: AvatarConfig, dataset: Dataset, prompts: int) -> int:
    """Return how often an epoch visits one prompt at most: rows that are equal, and what a schedule fills up with."""
    repeats = max(Counter(row_digest(row) for row in dataset if has_hint(row)).values(), default=1)
    if args.batching == "stratified" and "tag" in dataset.column_names:
        rows = Counter(dataset["tag"]).values()
        repeats *= max(math.ceil(math.ceil(count / prompts) * prompts / count) for count in rows)
    return repeats * (1 + args.refill_rounds)


def _tell_of_lost_completions(args: AvatarConfig, rows: int, why: str = "") -> None:
    written = rows * (args.num_generations - args.replayed_generations)
    if written > args.replay_capacity:
        logger.warning(
            "An epoch over %d rows writes at least %d completions, more than replay_capacity (%d): most are gone before their "
            "prompt comes back%s. Raise replay_capacity, or train on fewer rows.",
            rows,
            written,
            args.replay_capacity,
            why,
        )


def _tell_of_leaks(dataset: Dataset, hinted: Sequence[int]) -> None:
    """Warn of hints that give the answer away, which users may write and `maple-trl data hints` does not."""
    if "solution" not in dataset.column_names:
        return
    found = {}
    for i in hinted:
        row = dataset[i]
        why = leaks_answer(row[HINT_COLUMN], _asked(row["prompt"]), row["solution"])
        if why not in (None, "empty", "too-long") and row["solution"] is not None:
            found[i] = LEAKS[why]
    if found:
        first = next(iter(found))
        logger.warning(
            "train_dataset: the hints of %d rows reveal the answer, so that what is learnt with them is to copy it; first row "
            "%d: %s",
            len(found),
            first,
            found[first],
        )


def _asked(prompt: Any) -> str:
    """Return the text of the last user message."""
    messages = read_content(prompt).messages
    if isinstance(messages, str):
        return messages
    last = next((message for message in reversed(messages) if message["role"] == "user"), {"content": []})
    return "\n".join(block["text"] for block in last["content"] if block["type"] == "text")


def check_places(args: AvatarConfig, world: int) -> None:
    """
    Check that a completion of a rollout can be replayed, as its places are shared by the ranks.

    Raises:
        ValueError: when no completion of a rollout could ever be replayed.
    """
    if not args.replayed_generations:
        return
    if not any(replayed_slots([args.replayed_generations] * args.prompts_per_rollout, args.num_generations, world)):
        raise ValueError(
            f"Nothing can be replayed: each of the {world} processes has {args.generation_batch_size // world} "
            "completion(s) of a rollout, and all generate equally many. Raise per_device_train_batch_size or "
            "steps_per_generation, or set replayed_generations=0"
        )


def check_columns(args: AvatarConfig, dataset: Any, used: Collection[str]) -> None:
    """
    Check that rows keep the columns by which a replayed completion's row is found again.

    Args:
        used: columns that a row keeps with `remove_unused_columns`.

    Raises:
        ValueError: when they lose some.
    """
    if not args.replayed_generations or args.replay_scope == "prompt" or not args.remove_unused_columns:
        return
    dropped = [name for name in getattr(dataset, "column_names", None) or () if name not in used]
    if dropped:
        raise ValueError(
            f"remove_unused_columns=True drops {', '.join(dropped)} from rows, by whose columns replay_scope="
            f"{args.replay_scope!r} finds a completion's row again: leave it False, or remove the columns from train_dataset"
        )


def check_dropout(args: AvatarConfig, model: nn.Module) -> None:
    """
    Check that no dropout makes log-probabilities random, which replay compares over time.

    Raises:
        ValueError: when log-probabilities are random, so that those of a replayed completion cannot be compared with the
            ones it was written with.
    """
    if not args.replayed_generations:
        return
    if dropouts := dropout_layers(model):
        raise ValueError(
            f"Replay compares log-probabilities over time, which {len(dropouts)} dropout layer(s) make random (first: "
            f"{dropouts[0]}): set lora_dropout to 0, or disable_dropout=True"
        )


def check_visits(args: AvatarConfig, dataset: Any) -> None:
    """
    Check that prompts come back while their completions are stored; warn where many will be gone.

    Raises:
        ValueError: when the run is one epoch long, so that nothing could ever be replayed, or when streamed rows would
            have to be shown again. A run that `max_steps` ends within an epoch may be a first try: it is a warning.
    """
    if not args.replayed_generations:
        return
    if args.replay_scope != "prompt" and not isinstance(dataset, Dataset):
        raise ValueError(
            f"replay_scope={args.replay_scope!r} shows rows again, so it needs a map-style Dataset, got "
            f"{type(dataset).__name__}; with replay_scope='prompt' streamed rows replay their own prompt's completions"
        )
    if args.replay_scope != "prompt" or not isinstance(dataset, Dataset):
        return
    prompts, updates = args.prompts_per_rollout, args.steps_per_rollout
    visits = args.max_steps / updates * prompts if args.max_steps > 0 else args.num_train_epochs * len(dataset)
    distinct = len({row_digest(row) for row in dataset}) if visits <= len(dataset) else 0
    if visits <= len(dataset) and distinct == len(dataset):
        text = (
            f"Nothing is replayed: completions are when their prompt comes back, and this run visits {visits:.0f} of "
            f"{len(dataset)} rows once. Raise num_train_epochs or max_steps, or set replay_scope='tiers' or "
            "replayed_generations=0"
        )
        if args.max_steps <= 0:
            raise ValueError(text)
        if args.process_index == 0:
            logger.warning("%s", text)
    if args.process_index == 0:
        _tell_of_lost_completions(args, len(dataset))
