"""Rows that share a prompt are generated as rows that do not, and the model reads the prompt once."""

import inspect

import pytest
import torch
from omni_runs import build_trainer, one_row_per_tag
from test_mixed_batches import batched, rows_of
from tiny_models import FAMILIES, GEMMA, build_tiny, decoder, towers_of
from transformers import GenerationConfig

from maple_trl.omni.encoded import MediaMismatchError, generation_position_ids, unique_prompts
from maple_trl.omni.families import family_for
from maple_trl.omni.media.loader import MediaLimits, MediaLoader
from maple_trl.omni.prefix.shared_prefill import grows_cache, last_position_alone, share_prefill
from maple_trl.omni.prompt import PromptBuilder
from maple_trl.omni.serving import serve_media


LIMITS = MediaLimits(num_frames=4, min_pixels=1024, max_pixels=4096)
TOKENS = 10
SAMPLED = {"do_sample": True, "top_k": 0, "temperature": 1.0}
GREEDY = {"do_sample": False}


def build(name, folder, rows):
    model, processor = build_tiny(name)
    family = family_for(model, processor)
    builder = PromptBuilder(family, MediaLoader(folder, LIMITS))
    return model.eval(), processor, family, [builder.encode(row) for row in rows]


def repeated(prompts, copies=3):
    """Groups of one to `copies` rows, no two of a group next to each other."""
    return [p for turn in range(copies) for i, p in enumerate(prompts) if turn <= i % copies]


def generate(model, processor, family, rows, shared, seed=0, **settings):
    empty = torch.empty(len(rows), 0, dtype=torch.long)
    inputs, width = batched(rows, empty, processor.tokenizer.pad_token_id)
    inputs["position_ids"] = generation_position_ids(rows, width)
    settings = {"max_new_tokens": TOKENS, "suppress_tokens": family.suppressed_ids, **settings}
    torch.manual_seed(seed)
    with torch.no_grad():
        if not shared:
            with serve_media(family, model, rows):
                return model.generate(**inputs, **settings)
        with share_prefill(family.core(model), rows), serve_media(family, model, unique_prompts(rows)[0]):
            return model.generate(**inputs, **settings)


class Counts:
    """What passes through the language model's first layer, the LM head and the towers, call by call."""

    def __init__(self, model, family):
        core = family.core(model)
        self.layer, self.real, self.head, self.towers = [], [], [], []
        decoder(core).register_forward_hook(self._tokens, with_kwargs=True)
        model.get_output_embeddings().register_forward_pre_hook(lambda m, args: self.head.append(args[0].shape[:2]))
        for name, tower in towers_of(core).items():
            tower.register_forward_pre_hook(
                lambda m, args, kwargs, name=name: self.towers.append(name), with_kwargs=True
            )

    def _tokens(self, module, args, kwargs, output):
        embeddings = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        mask = kwargs.get("attention_mask")
        if isinstance(mask, dict):  # of each kind of layer one; the whole rows' says what is padding in its last line
            mask = mask["full_attention"]
            mask = None if mask is None else mask[:, 0, -1]
        self.layer.append(tuple(embeddings.shape[:2]))
        self.real.append(embeddings.shape[0] * embeddings.shape[1] if mask is None else int(mask.sum()))


@pytest.mark.parametrize("how", ["sampled", "greedy"])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.matrix(cases=3)
def test_the_same_tokens_are_generated(name, how, seven_tags):
    folder, dataset = seven_tags
    *made, prompts = build(name, folder, rows_of(name, dataset))
    rows = repeated(prompts)
    settings = SAMPLED if how == "sampled" else GREEDY
    expected = generate(*made, rows, shared=False, **settings)
    found = generate(*made, rows, shared=True, **settings)
    assert torch.equal(found, expected)
    completions = found[:, -TOKENS:]
    own = [completions[i].tolist() for i, row in enumerate(rows) if row is prompts[2]]
    assert len(own) == 3 and (how == "greedy") == (own[0] == own[1])
    assert not torch.equal(generate(*made, rows, shared=True, seed=1, **SAMPLED), expected)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.matrix(cases=5)
def test_each_prompt_is_read_once(name, seven_tags):
    folder, dataset = seven_tags
    *made, prompts = build(name, folder, rows_of(name, dataset))
    rows = repeated(prompts)
    counts = Counts(made[0], made[2])
    generate(*made, rows, shared=True, min_new_tokens=TOKENS, **SAMPLED)
    # A call for all clips of a kind, but of Phi-4 one for each.
    clips = {(k, p.media_digest(k) if name == "phi4_multimodal" else "") for p in prompts for k in p.kinds}
    assert len(counts.towers) == len(clips)
    # The padding between prompts of different lengths passes too; of the prompts themselves nothing passes twice.
    assert counts.layer == [(len(prompts), max(map(len, prompts)))] + [(len(rows), 1)] * (TOKENS - 1)
    assert counts.real[0] == sum(map(len, prompts))
    assert counts.head == [(len(rows), 1)] * TOKENS

    plain = Counts(made[0], made[2])
    generate(*made, rows, shared=False, min_new_tokens=TOKENS, **SAMPLED)
    assert plain.real[0] == sum(map(len, rows)) > counts.real[0]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.matrix(cases=4)
def test_the_head_reads_the_last_position_alone(name, seven_tags):
    """Where prompts are not shared too; which forwards of transformers see to that themselves is told by the control."""
    folder, dataset = seven_tags
    *made, prompts = build(name, folder, rows_of(name, dataset))
    rows = repeated(prompts)
    plain = Counts(made[0], made[2])
    expected = generate(*made, rows, shared=False, min_new_tokens=TOKENS, **SAMPLED)
    counts = Counts(made[0], made[2])
    with last_position_alone(made[2].core(made[0])):
        found = generate(*made, rows, shared=False, min_new_tokens=TOKENS, **SAMPLED)
    assert torch.equal(found, expected)
    assert counts.head == [(len(rows), 1)] * TOKENS
    keeps = "logits_to_keep" in inspect.signature(made[0].forward).parameters
    assert keeps == (name in ("qwen2_5_vl", "qwen3_vl", "phi4_multimodal", *GEMMA))
    assert plain.head[0] == (len(rows), 1 if keeps else max(map(len, rows)))


@pytest.mark.parametrize("copies", [1, 4])
def test_a_prompt_alone(copies, seven_tags):
    folder, dataset = seven_tags
    rows = [row for row in rows_of("qwen2_5_omni", dataset) if row["tag"] == "VAS"][:1]
    *made, [prompt] = build("qwen2_5_omni", folder, rows)
    counts = Counts(made[0], made[2])
    found = generate(*made, [prompt] * copies, shared=True, **SAMPLED)
    assert counts.layer[0] == (1, len(prompt)) and counts.towers == ["visual", "audio_tower"]
    assert torch.equal(found, generate(*made, [prompt] * copies, shared=False, **SAMPLED))


SETTINGS = {
    "penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "top p": {"top_p": 0.7, "min_p": 0.02},
    "two tokens": {"max_new_tokens": 2},
    "one token": {"max_new_tokens": 1},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
def test_with_other_settings_of_generation(settings, seven_tags):
    """Whatever works without sharing gives the same tokens with it."""
    folder, dataset = seven_tags
    *made, prompts = build("qwen2_5_omni", folder, rows_of("qwen2_5_omni", dataset))
    rows = repeated(prompts)
    expected = generate(*made, rows, shared=False, **SAMPLED, **settings)
    assert torch.equal(generate(*made, rows, shared=True, **SAMPLED, **settings), expected)


@pytest.mark.parametrize("settings", [{"use_cache": False}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.matrix(cases=1)
def test_settings_without_a_cache_that_grows_are_not_shared(settings, seven_tags, tmp_path):
    folder, dataset = seven_tags
    rows = one_row_per_tag(dataset).select(range(2))
    assert not grows_cache(GenerationConfig(**settings)) and grows_cache(GenerationConfig())
    written = {}
    for shared in ("off", "on"):
        options = {"shared_prefix": shared, "generation_kwargs": settings, "output_dir": str(tmp_path / shared)}
        trainer = build_trainer(folder, rows, **options)
        trainer.train()
        written[shared] = [list(row) for row in trainer._logs["completion"]]
    assert written["on"] == written["off"]


@pytest.mark.parametrize("name", ["num_beams", "num_return_sequences"])
def test_more_than_a_completion_per_row_is_refused(name, seven_tags):
    folder, dataset = seven_tags
    with pytest.raises(ValueError, match=f"generation_kwargs: {name}=2 is not supported"):
        build_trainer(folder, dataset, generation_kwargs={name: 2})
    build_trainer(folder, dataset, generation_kwargs={name: 1})
    *made, prompts = build("qwen2_5_omni", folder, rows_of("qwen2_5_omni", dataset)[:2])
    for shared in (False, True):
        with pytest.raises(MediaMismatchError, match="4 prompts were given for a forward of 8 rows"):
            generate(*made, prompts * 2, shared=shared, **SAMPLED, **{name: 2})


def test_nothing_is_left_behind(seven_tags):
    folder, dataset = seven_tags
    *made, prompts = build("qwen2_5_omni", folder, rows_of("qwen2_5_omni", dataset))
    core = made[2].core(made[0])
    before = len(core._forward_hooks), len(core._forward_pre_hooks)
    generate(*made, repeated(prompts), shared=True, **SAMPLED)
    with pytest.raises(KeyboardInterrupt), share_prefill(core, prompts):
        raise KeyboardInterrupt
    assert (len(core._forward_hooks), len(core._forward_pre_hooks)) == before


# Negative controls


def test_rows_of_another_prompt_are_noticed(seven_tags):
    """The cache repeated in another order: each row goes on with another prompt."""
    folder, dataset = seven_tags
    rows = [row for row in rows_of("qwen2_5_omni", dataset) if row["tag"] in ("VA", "V")][:2]
    model, processor, family, prompts = build("qwen2_5_omni", folder, rows)
    expected = generate(model, processor, family, prompts * 2, shared=False, **GREEDY)
    empty = torch.empty(4, 0, dtype=torch.long)
    inputs, width = batched(prompts * 2, empty, processor.tokenizer.pad_token_id)
    inputs["position_ids"] = generation_position_ids(prompts * 2, width)
    core = family.core(model)
    wrong = [prompts[0], prompts[1], prompts[1], prompts[0]]
    with torch.no_grad(), share_prefill(core, wrong), serve_media(family, model, prompts):
        found = model.generate(**inputs, **GREEDY, max_new_tokens=TOKENS, suppress_tokens=family.suppressed_ids)
    assert torch.equal(found[:2, -TOKENS:], expected[:2, -TOKENS:])
    assert not torch.equal(found[2:, -TOKENS:], expected[2:, -TOKENS:])


def test_media_of_all_rows_for_unique_prompts_are_refused(seven_tags):
    folder, dataset = seven_tags
    rows = [row for row in rows_of("qwen2_5_omni", dataset) if row["tag"] == "VA"][:1]
    model, processor, family, prompts = build("qwen2_5_omni", folder, rows)
    inputs, width = batched(prompts * 2, torch.empty(2, 0, dtype=torch.long), processor.tokenizer.pad_token_id)
    inputs["position_ids"] = generation_position_ids(prompts * 2, width)
    core = family.core(model)
    with pytest.raises(MediaMismatchError, match="2 prompts were given for a forward of 1 rows"):
        with torch.no_grad(), share_prefill(core, prompts * 2), serve_media(family, model, prompts * 2):
            model.generate(**inputs, **GREEDY, max_new_tokens=2)
