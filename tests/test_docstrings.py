"""Docstrings of public names say every argument, error, shape, unit and source; the rules find where they do not."""

import textwrap

import pytest
from docstring_rules import SOURCED, UNSOURCED, all_faults, faults, is_sourced, names, public, read

from maple_trl import _EXPORTS


def test_docstrings_of_public_names_are_complete():
    """What is missing is listed by: python tests/docstring_rules.py."""
    assert all_faults() == {}


def test_the_rules_look_at_what_users_import():
    paths = {each.path for each in names().values()}
    assert len(paths) > 480
    assert set(_EXPORTS.values()) <= {path.rpartition(".")[0] for path in paths}
    assert {
        "maple_trl.algorithms.weights.AdaptiveTagWeights",
        "maple_trl.algorithms.replay.Vcrs.observe",
        "maple_trl.algorithms.replay.Vcrs.nbytes",
        "maple_trl.jobs.train.run",
        "maple_trl.metrics.gaps.modality_gap",
        "maple_trl.omni.loading.load_model",
        "maple_trl.rewards.caption_judge.CaptionJudge",
        "maple_trl.trainers.mapo.trainer.MAPOTrainer.assign",
    } <= paths


def test_what_must_name_a_source_is_there():
    told = {f"{module}.{name}" for module, each in SOURCED.items() for name in each.split()}
    assert (told | UNSOURCED) - names().keys() == set()
    assert sum(map(is_sourced, names())) > 50


# Faults that are planted

MEND = {
    "argument limit is not described": ("        timeout:", "        limit: most of them.\n        timeout:"),
    "Raises: does not name ValueError": ("    Returns:", "    Raises:\n        ValueError: for none.\n\n    Returns:"),
    "argument ids has no shape": ("ids: tokens.", "ids: tokens, of shape (rows, tokens)."),
    "the result has no shape": ("The same.", "The same, of shape (rows, tokens)."),
    "timeout has no unit": ("how long", "seconds"),
    "there is no argument count": ("        count: of them.\n", ""),
    "names no source": ("Cut tokens.", "Cut tokens (MAPLE, arXiv 2602.11596, eq. 3)."),
}
FAULTY = '''
from torch import Tensor


def cut(ids: Tensor, limit: int, timeout: float) -> Tensor:
    """
    Cut tokens.

    Args:
        ids: tokens.
        timeout: how long.
        count: of them.

    Returns:
        The same.
    """
    if not len(ids):
        raise ValueError("none")
    return ids[:, :limit]
'''


def planted(folder, source):
    (folder / "planted.py").write_text(textwrap.dedent(source), encoding="utf-8")
    return {name: faults(name, each, sourced=True) for name, each in public(read("planted", folder))}


@pytest.mark.parametrize("left", [*MEND, None])
def test_each_fault_is_found_alone(tmp_path, left):
    source = FAULTY
    for fault, (before, after) in MEND.items():
        assert source.count(before) == 1
        source = source.replace(before, after) if fault != left else source
    assert planted(tmp_path, source) == {"planted.cut": [left] if left else []}


def test_faults_are_found_in_classes(tmp_path):
    source = '''
    from dataclasses import dataclass, field


    class Reader:
        """Reads files (of no paper)."""

        def __init__(self, path, share: float):
            if not path:
                raise OSError(path)

        def pages(self):
            return []

        def close(self):
            """Close the file, of no paper."""
            try:
                raise KeyError
            except KeyError:
                pass
            raise NotImplementedError


    @dataclass
    class Config:
        """
        Options, of no paper.

        Args:
            seed: of draws.
        """

        seed: int
        width: int
        wait: float = field(default=1.0, metadata={"help": "How long."})
        cache: bool = field(default=True, metadata={"help": "Keep files."})

        def __post_init__(self):
            raise TypeError
    '''
    assert planted(tmp_path, source) == {
        "planted.Reader": [
            "argument path is not described",
            "argument share is not described",
            "Raises: does not name OSError",
            "share has no unit",
        ],
        "planted.Reader.pages": ["there is no docstring"],
        "planted.Reader.close": ["Raises: does not name NotImplementedError"],
        "planted.Config": [
            "argument width is not described",
            "Raises: does not name TypeError",
            "width has no unit",
            "wait has no unit",
        ],
    }


def test_few_arguments_may_stand_in_the_sentence_and_others_be_those_of_another_name(tmp_path):
    source = '''
    import transformers


    def double(number):
        """Double a number, of no paper."""


    def half(rows):
        """Halve it, of no paper."""


    class Callback(transformers.TrainerCallback):
        """Counts, of no paper."""

        def on_log(self, args, state, control):
            """Count as [`~transformers.TrainerCallback.on_log`] is called, of no paper."""

        def on_save(self, args, state, control):
            pass
    '''
    assert planted(tmp_path, source) == {
        "planted.double": [],
        "planted.half": ["argument rows is not described"],
        "planted.Callback": [],
        "planted.Callback.on_log": [],
        "planted.Callback.on_save": [],
    }
