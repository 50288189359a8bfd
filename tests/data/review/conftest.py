"""What the tests of the review share: a set with real clips, and desks on it."""

import pytest
from media_files import copy_small_set
from review_sets import caption_row, desk_of, question_row, write_rows


@pytest.fixture
def rows_file(tmp_path):
    """Eight questions, V and VA in turn, and a caption."""
    rows = [question_row(number, ("V", "VA")[number % 2]) for number in range(8)]
    return write_rows(tmp_path / "rows.parquet", [*rows, caption_row(8)])


@pytest.fixture
def desk(rows_file):
    return desk_of(rows_file)


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """A small seven-tag set: four rows of each tag, with real clips."""
    folder = tmp_path_factory.mktemp("clips")
    copy_small_set(folder, seed=5)
    return folder
