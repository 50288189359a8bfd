"""Splits by clip: disjoint, near their shares, and the same for any order of the rows."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maple_trl.data.splits import balanced, clips_for_test


ROWS = st.lists(st.tuples(st.sampled_from([f"clip-{i}" for i in range(12)]), st.sampled_from("VAS")), max_size=60)


def distance(rows, test, share):
    """How far the strata are from their shares, each counted by its size."""
    total, inside = Counter(tag for _, tag in rows), Counter(tag for clip, tag in rows if clip in test)
    return sum(abs(inside[tag] - share * total[tag]) / total[tag] for tag in total)


@given(ROWS, st.floats(0, 0.5), st.integers(0, 5), st.randoms())
def test_clips_for_test(rows, share, seed, rng):
    test = clips_for_test([clip for clip, _ in rows], [tag for _, tag in rows], share, seed)
    clips = {clip for clip, _ in rows}
    assert test <= clips and (test < clips or not clips)
    assert bool(test) == (share > 0 and len(clips) > 1)
    shuffled = rng.sample(rows, len(rows))
    assert clips_for_test([clip for clip, _ in shuffled], [tag for _, tag in shuffled], share, seed) == test
    if len(test) > 1:  # no other clip would bring it nearer, and every one but the first has
        now = distance(rows, test, share)
        for clip in clips - test if len(clips - test) > 1 else ():
            assert distance(rows, test | {clip}, share) >= now - 1e-9


def test_equal_clips_give_the_exact_share():
    rows = [(f"clip-{i}", tag) for i in range(100) for tag in "VAS" for _ in range(3)]
    test = clips_for_test(*zip(*rows, strict=True), 0.2, seed=3)
    assert len(test) == 20 and test != clips_for_test(*zip(*rows, strict=True), 0.2, seed=4)


def test_uneven_clips_come_near_every_share():
    rng = random.Random(1)
    rows = [(f"clip-{i}", tag) for i in range(200) for tag in "VAS" for _ in range(rng.randrange(0, 12))]
    test = clips_for_test(*zip(*rows, strict=True), 0.1, seed=0)
    total, inside = Counter(tag for _, tag in rows), Counter(tag for clip, tag in rows if clip in test)
    for tag in "VAS":
        assert inside[tag] == pytest.approx(0.1 * total[tag], abs=3), tag


def test_what_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match="2 clips and 1 strata"):
        clips_for_test(["a", "b"], ["V"], 0.1)
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\], got 1.5"):
        clips_for_test(["a"], ["V"], 1.5)


@given(ROWS, st.integers(0, 5), st.randoms())
def test_balanced(rows, seed, rng):
    named = [(f"row-{i}", tag) for i, (_, tag) in enumerate(rows)]
    stays = (
        dict(zip([name for name, _ in named], balanced(*map(list, zip(*named, strict=True)), seed), strict=True))
        if rows
        else {}
    )
    total, kept = Counter(tag for _, tag in named), Counter(tag for name, tag in named if stays[name])
    assert all(kept[tag] == min(total.values()) for tag in total)
    shuffled = rng.sample(named, len(named))
    if rows:
        again = balanced(*map(list, zip(*shuffled, strict=True)), seed)
        assert dict(zip([name for name, _ in shuffled], again, strict=True)) == stays
