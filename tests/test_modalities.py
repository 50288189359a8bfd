import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maple_trl.modalities import Modality, ModalityTag


def test_canonical_order_and_spelling():
    assert [str(tag) for tag in ModalityTag] == ["V", "A", "S", "VA", "VS", "AS", "VAS"]


@pytest.mark.parametrize("tag", list(ModalityTag))
def test_any_order_and_case_parses(tag):
    for letters in itertools.permutations(tag.value):
        assert ModalityTag.parse("".join(letters).lower()) is tag
    assert ModalityTag.from_modalities(tag.modalities) is tag


@given(st.text(max_size=6))
def test_everything_else_is_rejected_by_name(text):
    letters = text.strip().upper()
    if letters and set(letters) <= set("VAS") and len(set(letters)) == len(letters):
        assert set(ModalityTag.parse(text).value) == set(letters)
    else:
        with pytest.raises(ValueError, match="is not a modality tag"):
            ModalityTag.parse(text)


@pytest.mark.parametrize("value", [None, 3, ["V"], "VV", "", "X", "VAX"])
def test_bad_values_are_rejected(value):
    with pytest.raises(ValueError, match="is not a modality tag"):
        ModalityTag.parse(value)


def test_relations_follow_set_inclusion():
    for tag, other in itertools.product(ModalityTag, ModalityTag):
        assert (other in tag.supersets()) == (set(other.value) > set(tag.value))
        assert (other in tag.deficits()) == (not set(tag.value) <= set(other.value))
        stratum = "exact" if other is tag else "superset" if other in tag.supersets() else "deficit"
        assert tag.stratum_of(other) == stratum


def test_families():
    assert [tag.arity for tag in ModalityTag] == ["uni"] * 3 + ["bi"] * 3 + ["tri"]
    assert ModalityTag.VS.modalities == {Modality.VIDEO, Modality.SUBTITLE}
