"""Two processes with weights of 4 and 8 bits, each its own, give the adapters the gradient of one."""

import pytest
import torch
from jobs.runner import Job, changes, facts, once, weights, write_inputs
from test_processes import TAGS, by_tag, step_options, worst


pytestmark = [pytest.mark.slow, pytest.mark.long]


KINDS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


def runs(world):
    def run(name, kind, **more):
        options = step_options(world, 2, loss_type="dapo", shared_prefix="on")
        return {
            "name": name,
            "lora": True,
            "quantized": KINDS[kind],
            "fixed_completions": True,
            "options": options,
        } | more

    return [run(kind, kind) for kind in KINDS] + ([run("unsynced", "nf4", unsynced=True)] if world == 2 else [])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    def make(folder):
        rows = by_tag(write_inputs(folder), TAGS)
        for world, name in ((1, "one"), (2, "two")):
            Job(world, folder, name, rows, runs(world)).wait()

    return once(tmp_path_factory, "quantized-processes", make)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.long
def test_two_processes_give_the_gradient_of_one(results, kind):
    expected = changes(results / "one", kind)
    assert expected and all(value.abs().max() > 0 for name, value in expected.items() if "lora_B" in name)
    for rank in (0, 1):
        assert facts(results / "two", kind, rank)["world"] == 2
        assert worst(expected, changes(results / "two", kind, rank))[0] < 0.01  # adapters are bfloat16
    first, second = (weights(results / "two", kind, rank) for rank in (0, 1))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_processes_that_do_not_average_are_noticed(results):
    alone = changes(results / "two", "unsynced")
    assert worst(changes(results / "one", "nf4"), alone)[0] > 0.01
    assert worst(changes(results / "two", "unsynced", 1), alone)[0] > 0.01
