from hypothesis import given
from hypothesis import strategies as st
from trl.trainer.utils import RepeatSampler

from maple_trl.trainers.common.samplers import LookaheadSampler


@given(
    rows=st.integers(1, 30),
    generations=st.integers(1, 4),
    prompts=st.integers(1, 4),
    repeats=st.integers(1, 4),
    ahead=st.integers(0, 60),
    behind=st.integers(0, 20),
)
def test_yields_what_the_inner_sampler_yields(rows, generations, prompts, repeats, ahead, behind):
    inner = RepeatSampler(range(rows), generations, prompts, repeats, shuffle=True, seed=3)
    expected = list(RepeatSampler(range(rows), generations, prompts, repeats, shuffle=True, seed=3))
    sampler = LookaheadSampler(inner, chunk=max(1, generations * prompts), ahead=max(1, ahead), behind=behind)
    assert len(sampler) == len(inner)
    for position, index in enumerate(sampler):
        assert index == expected[position]
        window = expected[max(0, position + 1 - behind) : position + 1 + max(1, ahead)]
        assert sampler.upcoming() == list(dict.fromkeys(window))


@given(chunk=st.integers(1, 4), world=st.integers(1, 3), total=st.integers(1, 40))
def test_ranks_share_what_comes(chunk, world, total):
    """Each index is announced to the rank that accelerate's batch sharding hands it to, and to no other."""
    samplers = [LookaheadSampler(range(total), chunk, total, 0, rank, world) for rank in range(world)]
    for sampler in samplers:
        iterator = iter(sampler)
        assert next(iterator) == 0
    chunks = [list(range(i, min(i + chunk, total))) for i in range(0, total, chunk)]
    for rank, sampler in enumerate(samplers):
        assert sampler.upcoming() == [i for c in chunks[rank::world] for i in c if i > 0]
