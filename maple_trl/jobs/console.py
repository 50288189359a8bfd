"""What a training job tells on the console: what it will do, and a row for each entry of its log."""

from __future__ import annotations

import logging
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length
from transformers.utils.import_utils import is_in_notebook

from maple_trl.modalities import SCOPES, ModalityTag
from maple_trl.omni.families import unwrap
from maple_trl.omni.quantization import Held, is_quantized, weight_count
from maple_trl.records.metrics_log import headline


_TAGS = [str(tag) for tag in ModalityTag]
_REPEAT = 25  # rows between two headings
_WIDTHS = {"reward": 7, "loss": 7, "acc %": 5, "tok %": 5, "length": 6, "s/step": 6, "left": 9}
# The last ones go first where a line is too narrow; by tag before all.
_IMPORTANCE = ("step", "reward", "loss", "acc %", "tok %", "left", "length", "s/step")


def show_progress(trainer: Trainer) -> None:
    """
    Let a trainer print a row for each entry of its log, in place of the whole entry.

    On a terminal the bar of transformers stays below the rows, unless `disable_tqdm`. In a notebook they are rows of its
    table. Callbacks that are added afterwards are left alone.
    """
    rows = LogRows(_rows_by_tag(trainer))
    if is_in_notebook() and not trainer.args.disable_tqdm:
        from maple_trl.jobs.notebook_rows import NotebookProgressCallback, NotebookRows

        if trainer.pop_callback(NotebookProgressCallback) is not None:
            trainer.add_callback(NotebookRows(rows))
        return
    usual = PrinterCallback if trainer.args.disable_tqdm else ProgressCallback
    if trainer.pop_callback(usual) is None:
        return
    if not trainer.args.disable_tqdm and sys.stderr.isatty():
        trainer.add_callback(_Bar)
    trainer.add_callback(rows)


def show_messages() -> None:
    """Print the package's messages, also those that warn of nothing, unless logging has been set up already."""
    package = logging.getLogger("maple_trl")
    if not package.hasHandlers():
        package.addHandler(logging.StreamHandler())
        package.setLevel(logging.INFO)


class _Bar(ProgressCallback):
    """The bar without the log's entries."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        pass


class LogRows(TrainerCallback):
    """
    Prints a row of a table for each entry of the log; on the first process alone.

    Args:
        tags: those that have a column from the beginning, where accuracy is logged by tag.

    Attributes:
        tags (`set[str]`): the same.
    """

    def __init__(self, tags: Sequence[str] = ()):
        self.console = Console(highlight=False, markup=False, soft_wrap=True)
        self.tags = set(tags)
        self._seen: set[str] = set()
        self._columns: list[str] = []
        self._rows = 0  # below the last heading
        self._step_begun = 0.0
        self._begun = (time.monotonic(), 0)
        self._forget_steps()

    def _forget_steps(self) -> None:
        self._steps, self._seconds = 0, 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control, **kwargs):
        """Print how much there is to train."""
        self._begun = (time.monotonic(), state.global_step)
        self._forget_steps()
        self._columns = []
        if state.is_world_process_zero:
            loader = kwargs.get("train_dataloader")
            self.console.print(_amount(args, state, len(loader) if has_length(loader) else 0))

    def on_step_begin(self, args, state, control, **kwargs):
        """Start the clock of a step."""
        self._step_begun = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        """Stop the clock of a step."""
        self._steps, self._seconds = self._steps + 1, self._seconds + time.monotonic() - self._step_begun

    def on_log(self, args, state: TrainerState, control, logs: Mapping[str, Any] | None = None, **kwargs):
        """Print a row."""
        if state.is_world_process_zero:
            cells = self.cells(logs or {}, state)
            if len(cells) > 1:  # as the entry at the end does not
                self._print(cells, step_width=max(4, 2 * len(str(state.max_steps)) + 1))

    def cells(self, logs: Mapping[str, Any], state: TrainerState) -> dict[str, str]:
        """Return what a row tells of an entry of the log, by column; the step alone where it tells of other things than learning."""
        evaluation = any(name.startswith("eval_") for name in logs)
        logs = {name.removeprefix("eval_"): value for name, value in logs.items()} if evaluation else logs
        cells = {"step": "eval" if evaluation else f"{state.global_step}/{state.max_steps}"}
        for name, value in (("reward", "{:.3f}"), ("loss", "{:.3f}"), ("length", "{:.1f}")):
            found = headline(logs, name)
            if found is not None and not (name == "loss" and "reward" in cells):
                cells[name] = value.format(found)
        accuracies = {"acc %": headline(logs, "accuracy"), "tok %": headline(logs, "token accuracy")}
        accuracies |= {tag: headline(logs, tag) for tag in _TAGS}
        cells |= {name: f"{100 * value:.0f}" for name, value in accuracies.items() if value is not None}
        if len(cells) > 1 and not evaluation:
            cells |= self._times(state)
        return cells

    def _times(self, state: TrainerState) -> dict[str, str]:
        """Return the seconds a step took since the last row, and what is left at the pace of the whole run."""
        cells = {}
        if self._steps:
            seconds = self._seconds / self._steps
            cells["s/step"] = f"{seconds:.2f}" if seconds < 100 else f"{seconds:.0f}"
        began, first = self._begun
        if state.global_step > first:
            pace = (time.monotonic() - began) / (state.global_step - first)
            cells["left"] = _clock(pace * (state.max_steps - state.global_step))
        self._forget_steps()
        return cells

    def _print(self, cells: Mapping[str, str], step_width: int) -> None:
        self._seen |= set(cells)
        if self._seen & set(_TAGS):
            self._seen |= self.tags
        widths = {"step": step_width, **_WIDTHS, **dict.fromkeys(_TAGS, 3)}
        widths = {name: width for name, width in widths.items() if name in self._seen}
        columns = _fitting(widths, self.console.width)
        with tqdm.external_write_mode(file=sys.stdout):
            if columns != self._columns or self._rows == _REPEAT:
                self.console.print(_line({name: name for name in columns}, columns, widths), style="bold")
                self._columns, self._rows = columns, 0
            self.console.print(_line(cells, columns, widths))
        self._rows += 1


def _fitting(widths: Mapping[str, int], room: int) -> list[str]:
    """Choose the columns for which a line has room."""
    columns = list(widths)
    order = [[name for name in columns if name not in _IMPORTANCE], *([name] for name in reversed(_IMPORTANCE[1:]))]
    for group in order:
        if sum(widths[name] + 1 for name in columns) - 1 <= room:
            break
        columns = [name for name in columns if name not in group]
    return columns


def _line(cells: Mapping[str, str], columns: Sequence[str], widths: Mapping[str, int]) -> str:
    return " ".join(cells.get(name, "").rjust(widths[name]) for name in columns).rstrip()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _amount(args: TrainingArguments, state: TrainerState, batches: int) -> str:
    epochs = state.max_steps * args.gradient_accumulation_steps / batches if batches else 0.0
    passes = f", {_counted(float(f'{epochs:.3g}'), 'epoch')}" if batches else ""  # of a stream it is not known
    start = f", going on after step {state.global_step}" if state.global_step else ""
    return f"Training: {_counted(state.max_steps, 'step')}{passes}{start}"


def _counted(number: float, noun: str) -> str:
    return f"{number:.12g} {noun}{'s' * (number != 1)}"


# What a run will do


def describe_run(trainer: Trainer, model_name: str) -> None:
    """Print what is trained, on which rows, how many of them a step, and where the results go."""
    args, model = trainer.args, trainer.model
    parts = count_parameters(trainer)
    every, trained = (sum(numbers) for numbers in zip(*parts.values(), strict=True))
    shares = [f"{part}\xa0{_amount_of(some)}/{_amount_of(most)}" for part, (most, some) in parts.items()]
    lines = {
        "model": f"{model_name}, {str(unwrap(model).dtype).removeprefix('torch.')} on {args.device}",
        "trained": f"{_amount_of(trained)} of {_amount_of(every)} parameters ({100 * trained / every:.3g} %): {', '.join(shares)}",
        **({"weights": Held.of(model).told()} if is_quantized(model) else {}),
        "rows": _described_rows(trainer),
        "a step": _described_step(args),
        "steps": str(args.max_steps) if args.max_steps > 0 else _counted(args.num_train_epochs, "epoch"),
        "results": args.output_dir,
    }
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for name, text in lines.items():
        wrapped = textwrap.wrap(text, console.width - 9, break_long_words=False, break_on_hyphens=False)
        for first, line in zip((name, *[""] * len(wrapped)), wrapped, strict=False):
            console.print(f"{first:<9}{line}".replace("\xa0", " "))


def count_parameters(trainer: Trainer) -> dict[str, tuple[int, int]]:
    """Count parameters, all and trained, by part of the model; what an adapter adds or copies is a part of its own."""
    family = getattr(trainer, "family", None)
    counts = {part: [0, 0] for part in (*SCOPES, "other", "adapter")}
    for name, parameter in trainer.model.named_parameters():
        adds = ".lora_" in name or ".modules_to_save." in name
        part = "adapter" if adds else (family.scope_of(name) if family is not None else "llm") or "other"
        size = getattr(
            parameter, "ds_numel", weight_count(parameter)
        )  # DeepSpeed's, of one that is spread over the processes
        counts[part][0] += size
        counts[part][1] += size * parameter.requires_grad
    return {part: (most, some) for part, (most, some) in counts.items() if most}


def _amount_of(parameters: int) -> str:
    for size, unit, digits in ((1e9, "B", 2), (1e6, "M", 1)):
        if parameters >= size:
            return f"{parameters / size:.{digits}f}{unit}"
    return f"{parameters:,}"


def _rows_by_tag(trainer: Trainer) -> Counter[str]:
    dataset = trainer.train_dataset
    if not hasattr(dataset, "__len__"):  # a stream
        return Counter()
    if getattr(trainer, "family", None) is None or "tag" not in (getattr(dataset, "column_names", None) or ()):
        return Counter()
    by_tag: Counter[str] = Counter()
    for spelt, rows in Counter(filter(None, dataset["tag"])).items():  # few spellings, of many rows
        by_tag[str(ModalityTag.parse(spelt))] += rows
    return by_tag


def _described_rows(trainer: Trainer) -> str:
    if not hasattr(trainer.train_dataset, "__len__"):
        return "streamed"
    by_tag = _rows_by_tag(trainer)
    shares = ", ".join(f"{tag} {by_tag[tag]}" for tag in _TAGS if by_tag[tag])
    return f"{len(trainer.train_dataset)}{shares and f': {shares}'}"


def _described_step(args: TrainingArguments) -> str:
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    copies = getattr(args, "num_generations", None)
    return _counted(size, "row") if copies is None else f"{_counted(size / copies, 'prompt')} x {copies} completions"
