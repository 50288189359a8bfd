"""A rollout in pieces has the tokens of a rollout in one, and of no piece more than its rows are in the model."""

from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from omni_runs import build_config, build_trainer, one_row_per_tag, spread_reward
from tiny_models import build_tiny, build_tiny_text
from transformers import GenerationConfig

from maple_trl import OmniGRPOTrainer
from maple_trl.omni.families import family_for
from maple_trl.omni.lora import build_lora_config
from maple_trl.rollout import TransformersEngine
from maple_trl.rollout.pieces import BatchDraws, cut_into_pieces
from maple_trl.trainers.common.rollout import InFlight


# Cutting


@given(sizes=st.lists(st.integers(1, 9), max_size=12), most=st.integers(1, 10))
def test_pieces_are_all_rows_in_order_and_prompts_are_cut_only_where_they_are_larger(sizes, most):
    prompts = [number for number, size in enumerate(sizes) for _ in range(size)]
    pieces = cut_into_pieces(prompts, most)
    assert [i for piece in pieces for i in range(piece.start, piece.stop)] == list(range(len(prompts)))
    assert all(1 <= piece.stop - piece.start <= most for piece in pieces)
    for piece in pieces[1:]:
        inside = prompts[piece.start - 1] == prompts[piece.start]
        assert not inside or sizes[prompts[piece.start]] > most
    # No two neighbours of whole prompts would have fitted together.
    for one, other in pairwise(pieces):
        if most >= max(sizes):
            first_prompt = sizes[prompts[other.start]]
            assert one.stop - one.start + first_prompt > most


def test_pieces_of_the_usual_case():
    cut = cut_into_pieces([0] * 4 + [1] * 4 + [2] * 4, 8)
    assert cut == [slice(0, 8), slice(8, 12)]
    assert cut_into_pieces([0] * 4, 9) == [slice(0, 4)] and cut_into_pieces([], 3) == []


# The same tokens


def trained(folder, rows, most, shared="off", trainer=build_trainer, **options):
    """Completions of a run, the weights at its end, the rows of each prefill, and where the random stream stands."""
    options = {"max_steps": 2, "shared_prefix": shared, "generation_batch": most} | options
    made = trainer(folder, rows, **options)
    prefills = []

    def note(module, args, kwargs):
        inputs = next(kwargs[name] for name in ("inputs_embeds", "input_ids") if kwargs.get(name) is not None)
        if kwargs.get("use_cache") and inputs.size(1) > 1:
            prefills.append(len(inputs))

    language_model = made.family.core(made.model).language_model if made.family else made.model.base_model
    language_model.register_forward_pre_hook(note, with_kwargs=True)
    made.train()
    weights = {name: value.detach().clone() for name, value in made.model.named_parameters()}
    return list(made._logs["completion"]), weights, prefills, torch.get_rng_state()


def same(one, other):
    """Whether two runs sampled the same and learned the same, to the last bit, and go on with the same numbers."""
    alike = all(torch.equal(value, other[1][name]) for name, value in one[1].items())
    return one[0] == other[0] and alike and torch.equal(one[3], other[3])


@pytest.fixture(scope="module")
def rows(seven_tags):
    """Of each kind: with video, with sound, with both, and text alone."""
    folder, dataset = seven_tags
    return folder, one_row_per_tag(dataset).filter(lambda row: row["tag"] in ("V", "A", "VAS", "S"))


STOPS = {"stop_strings": ["e", "a", "o"]}  # rows end at different lengths, and so do pieces
WAYS = [("off", 3, STOPS), ("on", 4, STOPS), ("on", 3, None), ("off", 1, None)]


@pytest.mark.parametrize(("shared", "most", "kwargs"), WAYS)
@pytest.mark.matrix(cases=1)
def test_a_run_in_pieces_is_the_run_at_once(shared, most, kwargs, rows):
    options = {"generation_kwargs": kwargs, "max_completion_length": 8}
    at_once = trained(*rows, None, shared, **options)
    in_pieces = trained(*rows, most, shared, **options)
    assert same(at_once, in_pieces)
    texts = [text[0]["content"] for text in at_once[0]]
    assert len(set(texts)) > 3 and (kwargs is None or len(set(map(len, texts))) > 2)
    # A rollout is two prompts of four completions; in pieces of three each makes two.
    assert at_once[2][-1:] == ([2] if shared == "on" else [8])
    pieces = {3: [3, 1, 3, 1], 4: [4, 4], 1: [1] * 8}[most]
    assert in_pieces[2][-len(pieces) :] == ([1] * len(pieces) if shared == "on" else pieces)


def test_pieces_that_draw_for_themselves_are_another_run(rows, monkeypatch):
    """The negative control."""
    at_once = trained(*rows, None)
    monkeypatch.setattr(BatchDraws, "of_piece", lambda *_: nullcontext())
    assert not same(at_once, trained(*rows, 4))


def test_greedy_pieces_take_no_numbers(rows):
    options = {"generation_kwargs": {"do_sample": False}, "max_steps": 1}
    assert same(trained(*rows, None, **options), trained(*rows, 3, **options))


def text_trainer(folder, dataset, **options):
    model, tokenizer = build_tiny_text()
    args = build_config(folder, **options)
    return OmniGRPOTrainer(model, spread_reward, args, train_dataset=dataset, processing_class=tokenizer)


def test_a_text_only_model(tmp_path):
    questions = ("Which colour?", "How many squares are there?", "What is heard?", "Who?")
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in questions])
    runs = [trained(tmp_path, rows, most, trainer=text_trainer) for most in (None, 3)]
    assert same(*runs) and max(runs[1][2]) == 3 < max(runs[0][2])


def lora_trainer(folder, dataset, **options):
    model, processor = build_tiny("qwen2_5_omni")
    torch.manual_seed(8)  # of the adapters' first weights
    lora = build_lora_config(model, family_for(model, processor), r=4)
    return build_trainer(folder, dataset, model=model, processing_class=processor, peft_config=lora, **options)


def test_a_model_with_adapters(rows):
    runs = [trained(*rows, most, "on", trainer=lora_trainer) for most in (None, 3)]
    assert same(*runs) and len(runs[1][2]) > len(runs[0][2])


def test_answers_outside_of_rollouts_are_in_pieces_too(rows):
    folder, dataset = rows
    found = []
    for most in (None, 3):
        trainer = build_trainer(folder, dataset, generation_batch=most, shared_prefix="on")
        torch.manual_seed(4)
        found.append((trainer.generate_completions(list(dataset) * 3, batch_size=8), torch.rand(1)))
    assert found[0] == found[1] and len(set(found[0][0])) > 4


# Ranks


class Turns:
    """Stands for TRL's generation: answers with what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, ids, fields):
        self.asked.append(len(ids))
        return [list(row) for row in ids], None


@pytest.mark.parametrize("most", [2, 5, 100])
def test_every_rank_generates_as_often_as_the_one_with_most_pieces(most):
    model, tokenizer = build_tiny_text()
    turns, told = Turns(), []

    def largest(count):
        told.append(count)
        return max(count, 4)

    greedy = GenerationConfig(do_sample=False)
    engine = TransformersEngine(model, tokenizer, greedy, rows_at_a_time=most, largest=largest)
    prompts = [[1, 2], [1, 2], [3, 4], [5, 6, 7], [5, 6, 7]]
    assert engine.sample(turns, prompts, None) == (prompts, None)
    assert told == [{2: 3, 5: 1, 100: 1}[most]]
    assert turns.asked == {2: [2, 1, 2, 1], 5: [5, 1, 1, 1], 100: [5, 1, 1, 1]}[most]


def test_a_rank_that_stands_in_leaves_the_random_stream_alone(rows):
    """One rank has a piece where another has two: its tokens and what it draws next are those at once."""
    folder, dataset = rows
    found = []
    for pieces in (1, 2):
        trainer = build_trainer(folder, dataset, generation_batch=8, shared_prefix="off")
        trainer.engine.largest = lambda count, pieces=pieces: pieces
        _, prompts = trainer.encode_rows(list(dataset))
        trainer.model.eval()
        with trainer._in_flight(InFlight(prompts)):
            torch.manual_seed(5)
            ids, _, fields = trainer._tokenize_prompts([])
            found.append((trainer._generate_single_turn(ids, None, fields, 1)[0], torch.rand(2).tolist()))
    assert found[0] == found[1]


def test_what_else_draws_meanwhile_does_not_draw_the_numbers_of_the_tokens():
    """As the dropout of adapters does; afterwards the stream goes on as if it had not."""
    torch.manual_seed(6)
    expected, state = torch.rand(4), torch.get_rng_state()
    torch.manual_seed(6)
    draws = BatchDraws(1)
    first, second = draws.begin(torch.device("cpu")), draws.begin(torch.device("cpu"))
    meanwhile = torch.rand(4)
    assert all(torch.equal(torch.rand(4, generator=own), expected) for own in (first, second))
    assert not torch.isin(meanwhile, expected).any()
    draws._after = 1, first.get_state()
    draws.end()
    assert torch.equal(torch.get_rng_state(), state)


# What is refused


@pytest.mark.parametrize("most", [0, -1, 2.5, True, "4"])
def test_bad_sizes_are_refused_by_name(most, tmp_path):
    with pytest.raises(ValueError, match=f"generation_batch must be a whole number from 1 on, .* got {most!r}"):
        build_config(tmp_path, generation_batch=most)


def test_a_library_that_samples_in_another_way_is_noticed(rows, monkeypatch):
    """Else pieces would quietly draw for themselves."""
    folder, dataset = rows
    trainer = build_trainer(folder, dataset, generation_batch=3, shared_prefix="off")

    def generate(self, input_ids, **kwargs):
        self(input_ids=input_ids, position_ids=kwargs["position_ids"])
        return torch.cat([input_ids, torch.full_like(input_ids[:, :2], 30)], dim=1)

    monkeypatch.setattr(type(trainer.model), "generate", generate)
    with pytest.raises(RuntimeError, match="sampled a piece of a batch without the random numbers of the batch"):
        trainer.train()
