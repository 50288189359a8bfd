"""Option names and types that are read from sources, against those of the imported classes."""

import pytest

from maple_trl.jobs.declared import declared_class
from maple_trl.jobs.errors import SetupError
from maple_trl.jobs.options import TRAINERS, make_parser


def options(parser):
    return {option: action for action in parser._actions for option in action.option_strings}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_declared_options_are_those_of_the_class(trainer):
    """Those of the class, of TRL's and of transformers', which it inherits; numbers are told from text."""
    declared, real = options(make_parser(trainer, declared=True)), options(make_parser(trainer))
    assert declared.keys() == real.keys() and len(real) > 200
    for name, action in real.items():
        assert declared[name].dest == action.dest
        if action.type in (int, float):
            assert declared[name].type is action.type, name
    numbers = [name for name, action in declared.items() if action.type in (int, float)]
    assert {"--max_steps", "--learning_rate"} <= set(numbers)


def accepts(parser, words):
    try:
        return parser.parse_known_args(words)[1] == []
    except (SetupError, ValueError):
        return False


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.matrix(cases=2)
def test_what_the_class_accepts_its_declaration_accepts(trainer):
    """A mistake found early must be one."""
    declared, real = make_parser(trainer, declared=True), make_parser(trainer)
    tried = 0
    for name, action in options(real).items():
        candidates = [[name, str(getattr(value, "value", value))] for value in action.choices or ("3", "0.5", "yes")]
        for words in [[name], *candidates]:
            if accepts(real, words):
                assert accepts(declared, words), words
                tried += 1
    assert tried > 400


def test_later_fields_win_and_names_are_followed_to_their_origin(tmp_path, monkeypatch):
    package = tmp_path / "declared_example"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / "base.py").write_text("class Base:\n    one: int = 1\n    two: 'float | None' = None\n    raw = 3\n")
    (package / "inner" / "__init__.py").write_text("from ..base import Base as Renamed\n")
    child = "from dataclasses import field\nfrom .inner import Renamed\n\n"
    child += "class Child(Renamed):\n    one: str = 'x'\n    three: list[str] = field(default_factory=list)\n"
    child += "    four: 'Unknown' = field(default=Unknown.VALUE, metadata={})\n"
    (package / "child.py").write_text(child)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = declared_class("declared_example.child:Child")
    fields = {name: field.type for name, field in found.__dataclass_fields__.items()}
    assert fields == {"one": str, "two": float | None, "three": list[str], "four": str}
    assert (found().one, found().two, found().three, found().four) == ("x", None, [], None)
