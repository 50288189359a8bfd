"""What the papers themselves report of a measure, to stand beside what was found."""

from __future__ import annotations

from pathlib import Path

from register import Register, RegisterError, load

from maple_trl.messages import did_you_mean


FILE = Path(__file__).with_name("figures.yaml")


def read_figures(register: Register, file: Path = FILE) -> dict[str, dict[str, float]]:
    """
    Return what papers report, by claim and measure.

    Raises:
        RegisterError: for a claim or a measure that there is not, and for what is no number.
    """
    told = load(file)[0]
    for name, figures in told.items():
        if name not in register.claims:
            raise RegisterError(f"{file.name}: there is no claim {name!r}{did_you_mean(name, register.claims)}")
        known = [one.name for one in register.claims[name].measures]
        for measure, figure in figures.items():
            if measure not in known:
                raise RegisterError(f"{file.name}: {name} has no measure {measure!r}{did_you_mean(measure, known)}")
            if isinstance(figure, bool) or not isinstance(figure, int | float):
                raise RegisterError(f"{file.name}: {name}.{measure} must be a number, got {figure!r}")
    return told
