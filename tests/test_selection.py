"""Which cases `make test` runs, and which it leaves to `make test-long`: none is in neither."""

import planted_tests


PLANTED = """
import pytest

@pytest.mark.matrix(cases=2)
@pytest.mark.parametrize("one", range(3))
@pytest.mark.parametrize("other", "ab")
def test_a_matrix(one, other):
    print("ran", other, one)

@pytest.mark.long
def test_an_experiment():
    print("ran experiment")

class TestOfAClass:
    @pytest.mark.matrix(cases=1)
    @pytest.mark.parametrize("one", range(2))
    def test_a_matrix(self, one):
        print("ran in a class", one)

def test_a_usual_one():
    print("ran usual")
"""


def ran(folder, *words):
    shown = planted_tests.run(folder, PLANTED, "-rPs", *words)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    return sorted(line for line in shown.stdout.splitlines() if line.startswith("ran ")), shown.stdout


def test_every_case_is_run_by_one_of_the_two(tmp_path):
    usual, told = ran(tmp_path)
    long, _ = ran(tmp_path, "-m", "long")
    assert usual == ["ran a 0", "ran b 2", "ran in a class 0", "ran usual"]
    assert long == ["ran a 1", "ran a 2", "ran b 0", "ran b 1", "ran experiment", "ran in a class 1"]
    assert "[6] " in told and "make test-long runs it" in told
