"""Groups whose free places are filled with completions of other prompts."""

import json
from collections import Counter

import pytest
import torch
from datasets import Dataset, IterableDataset
from test_avatar import contents_of, data, logs, make, take
from test_avatar_hints import with_hints
from tiny_models import build_tiny_text

from maple_trl import AvatarConfig, AvatarTrainer
from maple_trl.omni.errors import MediaError
from maple_trl.trainers.common.hinted_rows import prompt_key


pytestmark = pytest.mark.slow


__all__ = ["data"]  # a fixture

SCOPE = {"replay_scope": "buffer", "replay_draw": "diverse", "learning_rate": 0.0, "tas_lambda": 0.0}


def replayed(trainer):
    """Per rollout, the replayed rows and whether each is of another prompt than the fresh ones of its group."""
    size = trainer.num_generations
    for batch in trainer.trained:
        own = {row["number"] // size: row["key"] for row in batch if not row["replayed"]}
        past = [row for row in batch if row["replayed"]]
        yield past, [prompt_key(row["key"]) != prompt_key(own[row["number"] // size]) for row in past]


def test_places_are_filled_in_the_first_epoch_by_what_others_wrote(data, tmp_path):
    rows = take(data[1], V=4, VAS=4, S=4)
    trainer = make(data[0], tmp_path, rows, **SCOPE, max_steps=4)
    trainer.train()
    steps = list(replayed(trainer))
    assert not steps[0][0] and all(past and all(strange) for past, strange in steps[1:2])
    written = {}
    for batch in trainer.trained:
        for row in batch:
            if not row["replayed"]:
                written.setdefault((prompt_key(row["key"]), tuple(row["ids"])), row["logps"])
    for past, _ in steps:
        for row in past:
            # The very completion, under the very prompt: nothing else would give these probabilities.
            assert torch.allclose(row["logps"], written[prompt_key(row["key"]), tuple(row["ids"])], atol=1e-5)
            assert torch.allclose(row["logps"], row["old"], atol=1e-5)
    shares = [(entry["replay/share"], entry["replay/of_other_prompts"]) for entry in logs(trainer)]
    assert shares[0] == (0, 0) and shares[1][0] == shares[1][1] == 0.5


def test_own_completions_come_first_and_none_twice(data, tmp_path):
    rows = take(data[1], V=2, S=2, A=2)
    trainer = make(data[0], tmp_path, rows, **SCOPE, max_steps=6)
    trainer.train()
    own = [strange.count(False) for _, strange in replayed(trainer)]
    assert sum(own) and any(any(strange) for _, strange in replayed(trainer))
    stored = Counter()
    for batch in trainer.trained:
        before = stored.copy()
        groups = Counter((row["number"] // trainer.num_generations, row["key"]) for row in batch if row["replayed"])
        for (_, key), count in groups.items():
            assert count <= before[prompt_key(key)]
        stored.update(prompt_key(row["key"]) for row in batch if not row["replayed"])


def test_without_it_the_first_epoch_replays_nothing(data, tmp_path):
    rows = take(data[1], V=4, VAS=4, S=4)
    trainer = make(data[0], tmp_path, rows, **(SCOPE | {"replay_scope": "prompt"}), max_steps=2)
    trainer.train()
    assert [entry["replay/share"] for entry in logs(trainer)] == [0, 0]


def test_a_text_model(tmp_path):
    model, tokenizer = build_tiny_text()
    rows = Dataset.from_list(
        [{"prompt": f"one two {word}"} for word in ("three", "four", "five", "six", "seven", "one")]
    )
    config = AvatarConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=8, num_generations=4, replayed_generations=2,
        max_completion_length=6, max_steps=3, learning_rate=0.0, replay_scope="buffer", logging_steps=1, report_to=[],
        use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = AvatarTrainer(
        model, lambda completions, **k: [len(c) % 5 / 5 for c in completions], config, rows, processing_class=tokenizer
    )
    trainer.train()
    last = logs(trainer)[-1]
    assert last["replay/of_other_prompts"] > 0
    assert last["replay/ratio_max"] == pytest.approx(1, abs=1e-5) == last["replay/ratio_p05"]


def test_a_clip_that_is_gone_is_named_and_its_completions_discarded(data, tmp_path, monkeypatch, caplog):
    rows = take(data[1], V=4, S=4)
    trainer = make(data[0], tmp_path, rows, **SCOPE, max_steps=4)
    encode, gone = trainer._row_and_prompt, []

    def sometimes(row, prompt, key, hinted):
        if not gone and prompt.key != prompt_key(key) and trainer._row_of(key)["video"]:
            gone.append(key)
        if key in gone:
            raise MediaError("not-found", trainer._row_of(key)["video"], "it is gone")
        return encode(row, prompt, key, hinted)

    monkeypatch.setattr(trainer, "_row_and_prompt", sometimes)
    trainer.train()
    assert gone and [prompt.key for prompt in trainer.row_encoder.quarantined] == [prompt_key(gone[0])]
    written = json.loads((tmp_path / "quarantine.json").read_text())
    assert [(row["key"], row["reason"]) for row in written] == [(prompt_key(gone[0]), "not-found")]
    assert not any(e.prompt == gone[0] for e in contents_of(trainer))
    assert logs(trainer)[-1]["replay/discarded"] > 0 and "are not replayed" in caplog.text


def test_hinted_completions_are_shown_with_their_hint(data, tmp_path):
    rows = with_hints(take(data[1], VAS=4, S=4), "zebra quartz", *[None] * 7)
    options = SCOPE | {"hints": True, "hint_visits": 1, "max_steps": 8, "seed": 3}
    trainer = make(data[0], tmp_path, rows, lambda completions, **k: [0.0] * len(completions), **options)
    trainer.train()
    assert any(e.hinted for e in contents_of(trainer))
    for past, _ in replayed(trainer):
        for row in past:
            assert torch.allclose(row["logps"], row["old"], atol=1e-5)


def test_refusals(data, tmp_path):
    rows = take(data[1], V=4, S=4)
    with pytest.raises(ValueError, match="replay_scope='buffer' brings other tags into a rollout"):
        make(data[0], tmp_path, rows, replay_scope="buffer", batching="stratified")
    with pytest.raises(ValueError, match="replay_scope must be one of 'tiers', 'prompt', 'buffer', got 'all'"):
        make(data[0], tmp_path, rows, replay_scope="all")
    stream = IterableDataset.from_generator(lambda: iter(list(rows)))
    with pytest.raises(ValueError, match="needs a map-style Dataset, got IterableDataset"):
        make(data[0], tmp_path, stream, replay_scope="buffer")
