"""What is sampled is decided by the run's options, never by a checkpoint's generation_config.json."""

import contextlib
import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omni_runs import build_config, build_trainer, one_row_per_tag
from test_evaluator import evaluator, parts  # noqa: F401
from tiny_models import build_tiny, build_tiny_text, save_tiny
from transformers import GenerationConfig

from maple_trl import OmniGRPOConfig, OmniGRPOTrainer, OmniSFTConfig, OmniSFTTrainer
from maple_trl.evaluation import EvalOptions, EvaluationError
from maple_trl.evaluation import evaluator as evaluator_module
from maple_trl.omni import generation, loading
from maple_trl.omni.families import family_for, unwrap
from maple_trl.omni.lora import build_lora_config
from maple_trl.rollout import transformers_engine
from maple_trl.trainers.common.rollout import InFlight
from maple_trl.trainers.omni_sft import trainer as omni_sft


pytestmark = pytest.mark.slow


# A value for each option of a generation_config.json that changes what is sampled where it is used at all, or breaks it.
NASTY = {
    "max_length": 1,
    "max_new_tokens": 1,
    "min_length": 400,
    "min_new_tokens": 6,
    "early_stopping": "never",
    "max_time": 1e-9,
    "stop_strings": ["a", "e", "i", "o", " "],
    "do_sample": False,
    "num_beams": 3,
    "use_mtp": True,
    "use_cache": False,
    "cache_implementation": "static",
    "cache_config": {"nbits": 4},
    "max_cache_len": 2,
    "temperature": 0.01,
    "top_k": 1,
    "top_p": 0.01,
    "min_p": 0.99,
    "top_h": 0.01,
    "typical_p": 0.01,
    "epsilon_cutoff": 0.9,
    "eta_cutoff": 0.9,
    "repetition_penalty": 50.0,
    "encoder_repetition_penalty": 50.0,
    "length_penalty": 9.0,
    "no_repeat_ngram_size": 1,
    "bad_words_ids": [[i] for i in range(40, 200)],
    "renormalize_logits": True,
    "forced_bos_token_id": 50,
    "forced_eos_token_id": 60,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": [1, 9.0],
    "suppress_tokens": list(range(40, 200)),
    "begin_suppress_tokens": list(range(40, 200)),
    "sequence_bias": [[[50], 90.0]],
    "token_healing": True,
    "guidance_scale": 7.0,
    "watermarking_config": {"greenlist_ratio": 0.1, "bias": 50.0},
    "num_return_sequences": 2,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_scores": True,
    "output_logits": True,
    "return_dict_in_generate": True,
    "encoder_no_repeat_ngram_size": 1,
    "decoder_start_token_id": 50,
    "is_assistant": True,
    "num_assistant_tokens": 1,
    "num_assistant_tokens_schedule": "heuristic",
    "assistant_confidence_threshold": 0.99,
    "prompt_lookup_num_tokens": 2,
    "max_matching_ngram_size": 1,
    "assistant_early_exit": 1,
    "assistant_lookbehind": 1,
    "target_lookbehind": 1,
    "assistant_ensemble_weight": 0.5,
    "speculation_type": "dflash",
    "compile_config": {"mode": "max-autotune"},
    "disable_compile": False,
    "continuous_batching_config": {"block_size": 4},
    "low_memory": True,
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "diversity_penalty": 5.0,
    "num_beam_groups": 2,
    "constraints": [1],
    "force_words_ids": [[50]],
    "prefill_chunk_size": 2,
    "custom_generate": "somebody/else",
    "a_name_of_a_later_version": 3,
}
# Those that a model of text takes note of when it samples: the control has to see that they would matter.
FELT = {
    *("max_length", "min_new_tokens", "max_time", "stop_strings", "num_beams", "top_h", "typical_p"),
    *("epsilon_cutoff", "eta_cutoff", "no_repeat_ngram_size", "bad_words_ids", "forced_bos_token_id"),
    *("forced_eos_token_id", "exponential_decay_length_penalty", "begin_suppress_tokens", "sequence_bias"),
    *("guidance_scale", "watermarking_config", "num_return_sequences", "return_dict_in_generate"),
    *("prompt_lookup_num_tokens",),
} - {"max_length"}  # the run's max_new_tokens goes before it in any case
TOKENS = {"pad_token_id", "bos_token_id", "eos_token_id", "transformers_version", "_from_model_config"}


def test_every_option_of_the_library_is_tried():
    assert set(GenerationConfig().to_dict()) - TOKENS <= set(NASTY)


def written(folder, options):
    """The model's generation config as a checkpoint with these options gives it."""
    plain = json.loads((folder / "generation_config.json").read_text())
    other = folder / "other"
    other.mkdir(exist_ok=True)
    (other / "generation_config.json").write_text(json.dumps(plain | options))
    return loading._usable_generation_config(str(other), {}) or GenerationConfig.from_pretrained(other)


@pytest.fixture(scope="module")
def ways(seven_tags, parts, tmp_path_factory):  # noqa: F811
    """The ways in which completions are sampled here: a model each, and a function that samples its token ids."""
    folder, dataset = seven_tags
    rows = one_row_per_tag(dataset).select(range(2))
    options = {"max_completion_length": 7, "num_generations": 2, "per_device_train_batch_size": 2}
    options["output_dir"] = str(tmp_path_factory.mktemp("run"))
    found = {}
    for shared in ("off", "on"):
        trainer = build_trainer(folder, rows, shared_prefix=shared, **options)

        def rollout(trainer=trainer):
            with contextlib.ExitStack() as stack:
                prompts = trainer.encode_rows([row for row in rows for _ in range(2)])[1]
                stack.enter_context(trainer._in_flight(InFlight(prompts)))
                ids, _, fields = trainer._tokenize_prompts([])
                trainer.model.eval()
                return trainer._generate_single_turn(ids, None, fields, 1)[0]

        found[f"rollout, shared_prefix {shared}"] = trainer.model, rollout
    model, processor = build_tiny("qwen2_5_omni")
    config = OmniSFTConfig(
        output_dir=options["output_dir"], media_root=str(folder), max_completion_length=7, use_cpu=True, bf16=False,
        report_to=[], num_frames=2, max_pixels=64 * 64,
    )  # fmt: skip
    data = rows.add_column("completion", ["a", "b"])
    sft = OmniSFTTrainer(model, config, train_dataset=data, processing_class=processor)
    found["supervised"] = model, lambda: sft.generate_completions(list(rows) * 2)
    for shared in (False, True):
        asking = evaluator(parts, rows=parts[2][:2], shared_prompt=shared, max_new_tokens=7, temperature=1.5)
        prompts = [asking._encode(number, "required") for number in range(2)]
        found[f"evaluation, shared {shared}"] = (
            parts[0],
            lambda asking=asking, prompts=prompts: asking._generate(prompts, asking.names)[0],
        )
    return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny("qwen2_5_omni", tmp_path_factory.mktemp("model"))


def sample(way, config):
    """Samples by seed with a generation config in the model, which gets its own back."""
    model, draw = way
    kept, model.generation_config = model.generation_config, config
    try:
        torch.manual_seed(11)
        return draw()
    finally:
        assert model.generation_config is config and "generate" not in vars(model)
        model.generation_config = kept


@pytest.fixture(scope="module")
def undisturbed(ways):
    found = {name: sample(way, way[0].generation_config) for name, way in ways.items()}
    for texts in found.values():
        assert len({str(text) for text in texts}) > 1
    return found


@pytest.mark.parametrize("name", NASTY)
@pytest.mark.matrix(cases=9)
def test_no_option_of_a_checkpoint_reaches_sampling(name, ways, undisturbed, checkpoint):
    """In every way of sampling what would be felt there; of the others each in one way, and in sets in all of them, below."""
    config = written(checkpoint, {name: NASTY[name]})
    tried = list(ways) if name in FELT else [list(ways)[list(NASTY).index(name) % len(ways)]]
    for way in tried:
        assert sample(ways[way], config) == undisturbed[way], way


@settings(suppress_health_check=list(HealthCheck))
@given(names=st.sets(st.sampled_from(sorted(NASTY)), min_size=2, max_size=12), number=st.integers(0, 4))
def test_no_set_of_options_of_a_checkpoint_reaches_sampling(ways, undisturbed, checkpoint, names, number):
    config = written(checkpoint, {name: NASTY[name] for name in names})
    way = list(ways)[number]
    assert sample(ways[way], config) == undisturbed[way], way


@pytest.mark.long
def test_without_the_guard_they_would_be_felt(ways, undisturbed, checkpoint, monkeypatch):
    """The negative control: what the tests above would see."""

    @contextlib.contextmanager
    def open_to_all(model, tokenizer, config):
        class Nothing:
            def cut(self, completions):
                return completions

            def stopped(self, completions):
                return [False] * len(completions)

        yield Nothing()

    for module in (transformers_engine, omni_sft, evaluator_module):
        monkeypatch.setattr(module, "own_options", open_to_all)
    for way, made in ways.items():
        felt, left = set(), sorted(FELT)
        while left and len(felt) < 10:
            name = left.pop()
            # A file that the library itself refuses reaches nobody.
            config = written(checkpoint, {name: NASTY[name], "do_sample": True})
            try:
                changed = sample(made, config) != undisturbed[way]
            except Exception:
                changed = True
            felt |= {name} if changed else set()
        assert len(felt) >= 10, (way, FELT - felt)


def test_the_head_reads_the_last_position_alone(ways, undisturbed, monkeypatch):
    """In every way of sampling, of prompts that are shared and of others; the control computes logits of whole prompts."""
    for guarded in (True, False):
        if not guarded:
            monkeypatch.setattr(generation, "last_position_alone", contextlib.nullcontext)
        for way, (model, draw) in ways.items():
            widths = []
            head = unwrap(model).get_output_embeddings()
            handle = head.register_forward_pre_hook(lambda m, args, widths=widths: widths.append(args[0].size(1)))
            assert sample((model, draw), model.generation_config) == undisturbed[way]
            handle.remove()
            whole = not guarded and way not in ("rollout, shared_prefix on", "evaluation, shared True")
            assert max(widths) > 10 if whole else set(widths) == {1}, way


def test_a_checkpoint_whose_generation_config_is_refused_loads_with_its_tokens(checkpoint, caplog):
    config = written(checkpoint, {"do_sample": False, "num_return_sequences": 4, "eos_token_id": [2, 5]})
    assert config.eos_token_id == [2, 5] and config.num_return_sequences is None
    assert any("generation_config.json" in record.message for record in caplog.records)


def test_a_rollout_from_the_file_is_that_of_the_options(seven_tags, checkpoint, tmp_path):
    """Through `trainer.train()`, twice: with the checkpoint as it is, and with all that can be valid together."""
    folder, dataset = seven_tags
    nasty = {name: NASTY[name] for name in ("top_h", "num_beams", "min_new_tokens", "stop_strings", "sequence_bias")}
    nasty |= {"temperature": 0.01, "top_k": 1, "repetition_penalty": 9.0, "no_repeat_ngram_size": 1}
    nasty |= {
        "pad_token_id": None
    }  # which the trainer fills in: the library then refuses to save what contradicts itself
    config = json.loads((checkpoint / "generation_config.json").read_text())
    texts = {}
    for name, options in {"plain": {}, "nasty": nasty}.items():
        shutil.copytree(checkpoint, tmp_path / name)
        (tmp_path / name / "generation_config.json").write_text(json.dumps(config | options))
        args = build_config(
            folder, output_dir=str(tmp_path / "run" / name), max_steps=2, save_strategy="steps", save_steps=1
        )
        trainer = OmniGRPOTrainer(
            str(tmp_path / name), lambda completions, **_: [len(c[0]["content"]) for c in completions], args,
            one_row_per_tag(dataset).select(range(4)),
        )  # fmt: skip
        trainer.train()
        texts[name] = [list(row) for row in trainer._logs["completion"]]
        # Who uses the model later has its own settings back, in a form that can be saved.
        saved = json.loads((tmp_path / "run" / name / "checkpoint-2" / "generation_config.json").read_text())
        assert saved.get("top_h") == options.get("top_h") and saved.get("num_beams") == options.get("num_beams")
    assert texts["nasty"] == texts["plain"]


def test_a_text_model_samples_by_the_options(tmp_path):
    from datasets import Dataset

    data = Dataset.from_dict({"prompt": ["a", "b c", "d"] * 4})
    texts = []
    for options in ({}, {"top_h": 0.01, "num_beams": 2, "begin_suppress_tokens": list(range(100))}):
        model, tokenizer = build_tiny_text()
        model.generation_config.update(**options)
        args = build_config(tmp_path, output_dir=str(tmp_path))
        rewards = lambda completions, **_: [len(text) for text in completions]  # noqa: E731
        trainer = OmniGRPOTrainer(model, rewards, args, data, processing_class=tokenizer)
        trainer.train()
        texts.append(list(trainer._logs["completion"]))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("shared", ["off", "on"])
@pytest.mark.matrix(cases=1)
def test_with_adapters(shared, seven_tags):
    """PEFT hands a generation config of its own on to the model below."""
    folder, dataset = seven_tags
    texts = []
    nasty = {name: NASTY[name] for name in ("top_h", "num_beams", "forced_eos_token_id")}
    for options in ({}, nasty, {"stops": True}):
        model, processor = build_tiny("qwen2_5_omni")
        lora = build_lora_config(model, family_for(model, processor), r=4, alpha=8)
        if options is nasty:
            model.generation_config.update(**options)
        trainer = build_trainer(
            folder,
            one_row_per_tag(dataset).select(range(2)),
            model=model,
            processing_class=processor,
            peft_config=lora,
            shared_prefix=shared,
            generation_kwargs={"stop_strings": [stop_of([text[0]["content"] for text in texts[0]])]}
            if "stops" in options
            else None,
        )
        trainer.train()
        texts.append(list(trainer._logs["completion"]))
        assert unwrap(trainer.model).generation_config.top_h == options.get("top_h")
    assert texts[1] == texts[0]
    assert texts[2] != texts[0]


# Stop strings


def stop_of(texts):
    """A letter with much behind it in one of the texts: what stopping at it changes can be seen."""
    behind = {
        char: len(text) - text.index(char) for text in texts for char in text if char.isascii() and char.isalpha()
    }
    return max(behind, key=behind.get)


@pytest.mark.parametrize("shared", ["off", "on"])
def test_rollouts_end_at_stop_strings(shared, seven_tags):
    """The tokens are those sampled without, cut after the token that completes the string; none is padding."""
    folder, dataset = seven_tags
    rows = one_row_per_tag(dataset).select(range(4))
    options = {"shared_prefix": shared, "max_completion_length": 12, "shuffle_dataset": False}
    ids, strings = {}, None
    for stops in (False, True):
        trainer = build_trainer(folder, rows, **options, generation_kwargs={"stop_strings": strings})
        tokenizer = trainer.processing_class.tokenizer
        trainer.model.eval()
        prompts = trainer.encode_rows([row for row in rows for _ in range(4)])[1]
        with trainer._in_flight(InFlight(prompts)):
            prompt_ids, _, fields = trainer._tokenize_prompts([])
            torch.manual_seed(3)
            ids[stops] = trainer._generate_single_turn(prompt_ids, None, fields, 1)[0]
        if not stops:
            strings = [stop_of([tokenizer.decode(row, skip_special_tokens=True) for row in ids[False]])]
    expected = []
    for row in ids[False]:
        length = next((n for n in range(1, len(row) + 1) if strings[0] in tokenizer.decode(row[:n])), len(row))
        expected.append(row[:length])
    # Rows that go on draw on as before: the numbers of a batch do not depend on which rows have ended.
    assert ids[True] == expected and expected != ids[False]
    assert trainer.generation_config.stop_strings == strings


def test_training_with_stop_strings(seven_tags):
    folder, dataset = seven_tags
    seen = []

    def reward(completions, completion_ids, **_):
        seen.extend(zip([c[0]["content"] for c in completions], completion_ids, strict=True))
        return [float(i % 3) for i in range(len(completions))]

    trainer = build_trainer(
        folder, one_row_per_tag(dataset), reward=reward, generation_kwargs={"stop_strings": ["e", "a"]},
        max_completion_length=16, max_steps=2,
    )  # fmt: skip
    trainer.train()
    pad = trainer.processing_class.tokenizer.pad_token_id
    stopped = [(text, ids) for text, ids in seen if "e" in text or "a" in text]
    assert len(seen) == 16 and stopped
    for _, ids in seen:
        assert pad not in ids


def test_an_evaluation_ends_at_stop_strings(parts):  # noqa: F811
    plain = evaluator(parts, rows=parts[2][:4], max_new_tokens=14)
    lines = [line for batch in plain.batches for line in plain.run(batch)]
    stop = stop_of([line["completion"] for line in lines])
    for shared in (True, False):
        asking = evaluator(
            parts, rows=parts[2][:4], max_new_tokens=14, generation={"stop_strings": stop}, shared_prompt=shared
        )
        found = [line for batch in asking.batches for line in asking.run(batch)]
        for before, after in zip(lines, found, strict=True):
            if stop in before["completion"]:
                assert stop in after["completion"] and before["completion"].startswith(after["completion"])
                assert after["finish"] == "end" and after["completion_tokens"] <= before["completion_tokens"]
            else:
                assert after["completion"] == before["completion"] and after["finish"] == before["finish"]


# Options of a run that are refused


@pytest.mark.parametrize("config", [OmniGRPOConfig, OmniSFTConfig])
@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": 0.0}, "temperature must be"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"generation_kwargs": {"temperature": 0.5}}, "generation_kwargs: temperature is set by temperature"),
        ({"generation_kwargs": {"max_new_tokens": 5}}, "max_new_tokens is set by max_completion_length"),
        ({"generation_kwargs": {"num_beams": 2}}, "num_beams=2 is not supported"),
        ({"generation_kwargs": {"num_return_sequences": 2}}, "num_return_sequences=2 is not supported"),
        ({"generation_kwargs": {"return_dict_in_generate": True}}, "return_dict_in_generate=True is not supported"),
        ({"generation_kwargs": {"eos_token_id": 5}}, "eos_token_id=5 is not supported"),
        ({"generation_kwargs": {"top_hh": 0.5}}, "no option 'top_hh'; did you mean top_h?"),
        ({"generation_kwargs": {"stop_strings": [3]}}, "stop_strings must be a text or a list of texts"),
        ({"generation_kwargs": {"stop_strings": ""}}, "stop_strings must be a text or a list of texts"),
        ({"generation_kwargs": {"cache_implementation": "none"}}, "generation_kwargs: Invalid `cache_implementation`"),
    ],
)
def test_sampling_options_are_checked_before_a_model_is_loaded(config, options, message, tmp_path):
    with pytest.raises(ValueError) as caught:
        config(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)
    assert message in str(caught.value)


def test_stop_strings_and_a_mask_of_what_was_cut_do_not_go_together(tmp_path):
    with pytest.raises(ValueError, match="mask_truncated_completions leaves out completions"):
        OmniGRPOConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, mask_truncated_completions=True,
            generation_kwargs={"stop_strings": ["x"]},
        )  # fmt: skip


def test_an_evaluation_at_temperature_0_is_greedy(parts):  # noqa: F811
    asking = evaluator(parts, rows=parts[2][:2], samples=1, temperature=0.0, max_new_tokens=4)
    model, prompts = parts[0], [asking._encode(number, "required") for number in range(2)]
    expected, _ = asking._generate(prompts, asking.names)
    wide = evaluator(parts, rows=parts[2][:2], samples=1, temperature=1e-4, max_new_tokens=4, seed=5)
    assert wide._generate(prompts, wide.names)[0] == expected
    assert model.generation_config is not asking.generation_config


@pytest.mark.parametrize(
    "name, value", [("top_h", 0.05), ("typical_p", 0.02), ("epsilon_cutoff", 0.5), ("eta_cutoff", 0.9)]
)
def test_further_options_of_an_evaluation_cut_what_is_drawn_from(name, value, parts):  # noqa: F811
    """Near enough to nothing left, they leave the likeliest token: the greedy answer."""
    asking = evaluator(parts, rows=parts[2][:3], samples=3, temperature=1.0, max_new_tokens=6)
    prompts = [asking._encode(number, "required") for number in range(3)]
    free, _ = asking._generate(prompts, asking.names)
    cut = evaluator(parts, rows=parts[2][:3], samples=3, max_new_tokens=6, generation={name: value})
    assert cut._generate(prompts, cut.names)[0] != free


def test_an_evaluation_refuses_what_it_sets_itself():
    for name in ("min_p", "num_beams", "do_sample"):
        with pytest.raises(EvaluationError, match=f"generation: {name}"):
            EvalOptions(generation={name: 0.5})
