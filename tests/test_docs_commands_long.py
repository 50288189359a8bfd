"""The commands of the pages that take long, as test_docs_commands.py has the others: trainings, launchers, many evaluations."""

import pytest
from page_commands import LONG, follow


pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.mark.parametrize("page", sorted(LONG))
def test_the_commands_of_a_page_run(page, tmp_path, monkeypatch):
    assert follow(page, tmp_path, monkeypatch) == []
