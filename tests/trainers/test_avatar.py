"""AvatarTrainer through `train()`: what is generated, what is replayed, and what both are trained with."""

import math
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import fmean, pstdev, stdev

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, IterableDataset
from omni_runs import QUIET_ON_CPU
from tiny_models import build_tiny_text

from maple_trl import AvatarConfig, AvatarTrainer
from maple_trl.data import load_seven_tags
from maple_trl.omni.families import family_for
from maple_trl.omni.loading import load_model, load_processor
from maple_trl.omni.lora import build_lora_config
from maple_trl.rewards import accuracy_reward
from maple_trl.trainers.common.hinted_rows import prompt_key


pytestmark = pytest.mark.slow


G = 8  # completions of a prompt
DEFAULTS = QUIET_ON_CPU | {
    "num_frames": 4,
    "max_pixels": 3136,
    "max_prompt_length": 128,
    "max_completion_length": 14,
    "num_generations": G,
    "per_device_train_batch_size": 4 * G,
    "gradient_accumulation_steps": 1,
    "max_steps": 4,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": False,
}
# Most tests here are about what groups are to one prompt; what is drawn by tier is in test_avatar_tiers.py.
OWN_PROMPT = {"replay_scope": "prompt", "replay_draw": "diverse"}
MODEL = "builtin:tiny-omni"


class Watched(AvatarTrainer):
    """
    Notes what is generated and what is trained on.

    `generated` holds, per call of the model's `generate`, its rows; `trained`, per micro-batch, a dict per completion;
    `evaluated` whether an evaluation left the memory as it was.
    """

    def __init__(self, *args, **kwargs):
        self.generated, self.trained, self.evaluated = [], [], []
        super().__init__(*args, **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        generate = model.generate

        def noted(*args, **kwargs):
            ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
            rows = [row[shown.bool()].tolist() for row, shown in zip(ids, mask, strict=True)]
            self.generated.append({"training": self.model.training, "rows": rows})
            return generate(*args, **kwargs)

        model.generate = noted

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        if not self.model.training:
            assert "replayed" not in inputs
            return loss
        rows = []
        for i, mask in enumerate(inputs["completion_mask"].bool()):
            if "unscorable" in inputs and inputs["unscorable"][i]:
                assert not mask.any()  # no token counts; what it said is noted all the same
                mask = inputs["completion_ids"][i] != self._tokenizer.pad_token_id
            advantage = inputs["advantages"][i]
            row = {
                "ids": tuple(inputs["completion_ids"][i][mask].tolist()),
                "prompt_ids": inputs["prompt_ids"][i][inputs["prompt_mask"][i].bool()].tolist(),
                "replayed": bool(inputs["replayed"][i]),
                "advantage": (advantage[mask] if advantage.dim() else advantage).tolist(),
                "logps": self._last[i][mask],
                "unscorable": "unscorable" in inputs and bool(inputs["unscorable"][i]),
            }
            if "completion_numbers" in inputs:
                row["number"] = int(inputs["completion_numbers"][i])
            if inputs.get("old_per_token_logps") is not None:
                row["old"] = inputs["old_per_token_logps"][i][mask]
            if "ref_per_token_logps" in inputs:
                row["ref"] = inputs["ref_per_token_logps"][i][mask]
            if "omni_prompts" in inputs:
                row["prompt"] = inputs["omni_prompts"][i]
                row["key"] = row["prompt"].key
            rows.append(row)
        self.trained.append(rows)
        return loss

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._last = found[0].detach()
        return found

    def evaluate(self, *args, **kwargs):
        before = contents(self)
        found = super().evaluate(*args, **kwargs)
        self.evaluated.append(contents(self) == before)
        return found


class Diary:
    """
    A reward function that remembers what it was asked for.

    `value(row, copy, call)` is the reward of one completion, `row` being the columns that it was given, `copy` its place
    among its prompt's fresh ones. Without it, completions are rewarded for right answers.
    """

    __name__ = "diary"

    def __init__(self, value=None):
        self.value = value
        self.calls = []

    def __call__(self, completions, prompts, completion_ids, **columns):
        columns = {name: values for name, values in columns.items() if isinstance(values, list)}
        rows = [
            dict(zip(columns, values, strict=True), prompt=prompt)
            for prompt, *values in zip(prompts, *columns.values(), strict=True)
        ]
        counted = Counter()
        rewards = []
        for row, completion, ids in zip(rows, completions, completion_ids, strict=True):
            rewards.append(self.value_of(row, completion, ids, counted[row["id"]]))
            counted[row["id"]] += 1
        entries = zip(rows, map(tuple, completion_ids), rewards, strict=True)
        self.calls.append([{"row": row, "ids": ids, "reward": reward} for row, ids, reward in entries])
        return rewards

    def value_of(self, row, completion, ids, copy):
        if self.value is None:
            return accuracy_reward(completions=[completion], solution=[row["solution"]])[0]
        return self.value(row, copy, len(self.calls))


def contents(trainer):
    """All that the buffer and the baselines of a run hold, in a form that can be compared."""
    memory = trainer.memory
    state = memory.state_dict()
    stored = [e for prompt in state["vcrs"] for e in memory.buffer.stored(prompt)]
    rows = [(e.prompt, e.row, e.completion_ids.tolist(), e.logps.tolist(), e.reward, e.step, e.hinted) for e in stored]
    return repr((rows, memory.buffer.sizes(), state))


def make(folder, output, data, reward=None, trainer_class=Watched, **options):
    """A trainer of the embedded model; other options are fields of its config."""
    arguments = ("model", "processing_class", "eval_dataset", "peft_config", "callbacks")
    given = {name: options.pop(name) for name in arguments if name in options}
    if "model" not in given:
        given = {"model": load_model(MODEL, dtype="float32"), "processing_class": load_processor(MODEL)} | given
    own = OWN_PROMPT if options.get("replayed_generations", 4) else {}
    options = {"output_dir": str(output), "media_root": str(folder), **DEFAULTS, **own, **options}
    return trainer_class(reward_funcs=reward or Diary(), args=AvatarConfig(**options), train_dataset=data, **given)


def logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def ids_by_key(trainer):
    """The id of the row behind each prompt's key."""
    return {trainer.prompt_builder.spec(row).key: row["id"] for row in trainer.train_dataset}


def take(dataset, **counts):
    """So many rows of each tag, e.g. `V=4, S=2`, no two of which are the same prompt."""
    return dataset.select([i for tag, n in counts.items() for i in places(dataset, tag)[:n]])


def places(dataset, tag):
    """Rows of a tag, each prompt once: those with subtitles alone are often equal."""
    rows = dataset.to_list()
    shown = [(row["question"], row["subtitle"] if tag == "S" else row["video"]) for row in rows]
    first = {content: i for i, content in reversed(list(enumerate(shown))) if rows[i]["tag"] == tag}
    return sorted(first.values())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with clips, and the rows of the set that the embedded model was trained on others of."""
    folder = tmp_path_factory.mktemp("set")
    return folder, load_seven_tags(folder, prompts_per_tag=64, clips_per_pair=4, splits=("train",))["train"]


@pytest.fixture
def build(data, tmp_path):
    def of(dataset, reward=None, **options):
        return make(data[0], tmp_path / "run", dataset, reward, **options)

    return of


def spread(row, copy, call):
    """Completions of a prompt differ in reward, at every visit in another way."""
    return ((3 * copy + 5 * call) % 7) / 7


# Prompts on which the policy fails


@pytest.fixture(scope="module")
def hard_rows(data, tmp_path_factory):
    """Rows of whose 16 sampled completions at most two are right."""
    folder, rows = data
    asked = rows.select([i for tag in ("VAS", "VA", "AS") for i in places(rows, tag)])
    trainer = make(folder, tmp_path_factory.mktemp("sampling"), asked)
    torch.manual_seed(0)
    right = Counter()
    for _ in range(16):
        rows = [row for row in asked.to_list() if right[row["id"]] <= 2]  # no other can be one of them any more
        texts = trainer.generate_completions(rows, batch_size=len(rows))
        scores = accuracy_reward(
            completions=[[{"content": text}] for text in texts], solution=[row["solution"] for row in rows]
        )
        right.update({row["id"]: score for row, score in zip(rows, scores, strict=True) if score})
    hardest = sorted(range(len(asked)), key=lambda i: right[asked["id"][i]])[:8]
    counts = [right[asked["id"][i]] for i in hardest]
    print("right of 16:", counts)
    assert max(counts) <= 2 and sum(counts) < 8
    return asked.select(hardest)


def run_hard(data, hard_rows, tmp_path_factory, visits):
    """So many visits of each of the hard prompts, with and without replay."""
    runs = {}
    for name, options in (("replay", {}), ("none", {"replayed_generations": 0})):
        diary = Diary()
        options |= {"max_steps": 2 * visits, "learning_rate": 1e-6, "seed": 3}
        runs[name] = make(data[0], tmp_path_factory.mktemp(name), hard_rows, diary, **options), diary
        runs[name][0].train()
    return runs


@pytest.fixture(scope="module")
def hard_runs(data, hard_rows, tmp_path_factory):
    return run_hard(data, hard_rows, tmp_path_factory, visits=4)


def alike(rewards):
    known = [reward for reward in rewards if reward is not None and not math.isnan(reward)]
    return not known or max(known) - min(known) < 1e-6


def recorded_zero_variance(trainer, diary):
    """Per rollout, shares of groups whose fresh rewards, and whose rewards of all completions, are alike."""
    ids, rewards, shares = ids_by_key(trainer), {}, []
    for call, rows in zip(diary.calls, trainer.trained, strict=True):
        fresh, everyone = defaultdict(list), defaultdict(list)
        for entry in call:
            one = entry["row"]["id"]
            rewards[one, entry["ids"]] = entry["reward"]  # a right answer is right at every visit
            fresh[one].append(entry["reward"])
        for row in rows:
            everyone[ids[row["key"]]].append(rewards[ids[row["key"]], row["ids"]])
        assert all(len(group) == G for group in everyone.values())
        shares.append([fmean(map(alike, groups.values())) for groups in (fresh, everyone)])
    return shares


def test_groups_that_teach_nothing_are_counted(hard_runs):
    trainer, diary = hard_runs["replay"]
    shares = recorded_zero_variance(trainer, diary)
    assert len({share for pair in shares for share in pair}) > 1
    for entry, (fresh, everyone) in zip(logs(trainer), shares, strict=True):
        assert entry["replay/zero_variance_fresh"] == entry["frac_reward_zero_std"] == pytest.approx(fresh)
        assert entry["replay/zero_variance_mixed"] == pytest.approx(everyone)
    plain, plain_diary = hard_runs["none"]
    groups = [fresh for fresh, _ in recorded_zero_variance(plain, plain_diary)]
    assert [entry["frac_reward_zero_std"] for entry in logs(plain)] == pytest.approx(groups)


@pytest.mark.long
def test_replay_halves_the_groups_that_teach_nothing(data, hard_rows, tmp_path_factory):
    runs = run_hard(data, hard_rows, tmp_path_factory, visits=16)
    shares = recorded_zero_variance(*runs["replay"])
    warm = shares[len(shares) // 2 :]
    before, after = (fmean(values) for values in zip(*warm, strict=True))
    print(f"zero variance: fresh {before:.3f}, mixed {after:.3f}")
    assert before > 0.5 and after < before / 2
    # Nor would eight fresh completions do as well.
    groups = [fresh for fresh, _ in recorded_zero_variance(*runs["none"])]
    grpo = fmean(groups[len(groups) // 2 :])
    print(f"zero variance of GRPO with eight fresh completions: {grpo:.3f}")
    assert grpo > 0.25 and after < grpo / 2


def test_only_what_is_not_replayed_is_generated(hard_runs):
    trainer, _ = hard_runs["replay"]
    rows = [len(call["rows"]) for call in trainer.generated]
    assert rows[:2] == [4 * G, 4 * G] and set(rows[2:]) == {4 * G // 2}  # eight prompts are an epoch of two rollouts
    assert rows == [entry["replay/generated"] for entry in logs(trainer)]
    assert [1 - n / (4 * G) for n in rows] == [entry["replay/share"] for entry in logs(trainer)]
    for count, batch in zip(rows, trainer.trained, strict=True):
        assert sum(not row["replayed"] for row in batch) == count and len(batch) == 4 * G
    plain, _ = hard_runs["none"]
    assert {len(call["rows"]) for call in plain.generated} == {4 * G}
    assert not any(row["replayed"] for batch in plain.trained for row in batch)


def test_replayed_completions_are_the_prompts_own_of_before(hard_runs):
    trainer, _ = hard_runs["replay"]
    seen = set()
    for batch in trainer.trained:
        for row in batch:
            if row["replayed"]:
                assert (row["key"], row["ids"]) in seen
        seen |= {(row["key"], row["ids"]) for row in batch if not row["replayed"]}


def test_a_group_has_one_prompt_and_its_media(hard_runs):
    trainer, _ = hard_runs["replay"]
    for batch in trainer.trained:
        groups = defaultdict(list)
        for row in batch:
            groups[row["number"] // G].append(row)
        assert len(groups) == 4
        for group in groups.values():
            assert len(group) == G and len({row["key"] for row in group}) == 1
            assert len({tuple(row["prompt_ids"]) for row in group}) == 1
            assert group[0]["prompt"].kinds
    numbers = [row["number"] for batch in trainer.trained for row in batch]
    assert sorted(numbers) == list(range(len(numbers)))


# Advantages


def by_hand(trainer, diary, scope="group", mixed=False, alpha=1.0, limit=5.0, window=20):
    """
    The advantages that each rollout should have been trained with, by completion number.

    A loop over rewards as they came, with its own moving baselines. The loss is a mean over tokens.
    """
    ids, tags = ids_by_key(trainer), dict(zip(trainer.train_dataset["id"], trainer.train_dataset["tag"], strict=True))
    history, rewards, expected = defaultdict(list), {}, []
    for call, rows in zip(diary.calls, trainer.trained, strict=True):
        given = defaultdict(list)
        for entry in call:
            given[entry["row"]["id"]].append(entry["reward"])
        for one, values in given.items():
            history[one] = (history[one] + [value for value in values if value is not None])[-window:]
        # Fresh completions keep their places, so the reward function saw them in the order of their numbers.
        value = {}
        for row in sorted(rows, key=lambda row: row["number"]):
            one = ids[row["key"]]
            if not row["replayed"]:
                value[row["number"]] = given[one].pop(0)
                rewards.setdefault((one, row["ids"]), value[row["number"]])
            else:
                value[row["number"]] = rewards[one, row["ids"]]
        fresh = [row for row in rows if not row["replayed"]]
        past = [row for row in rows if row["replayed"]]
        advantage = {}
        for row in fresh:
            mine = [r for r in (rows if mixed else fresh) if r["key"] == row["key"]]
            of_tag = [r for r in fresh if tags[ids[r["key"]]] == tags[ids[row["key"]]]]
            known = [value[r["number"]] for r in mine if value[r["number"]] is not None]
            scale = known if scope == "group" else [value[r["number"]] for r in of_tag]
            scale = [v for v in scale if v is not None]
            own = value[row["number"]]
            deviation = stdev(scale) if len(scale) > 1 else 0.0
            advantage[row["number"]] = 0.0 if own is None else (own - fmean(known)) / (deviation + 1e-4)
        values = [value[row["number"]] for row in past]
        sd = stdev(values) + 1e-4 if len(values) > 1 and not alike(values) else 1.0
        for row in past:
            raw = (value[row["number"]] - fmean(history[ids[row["key"]]])) / sd
            advantage[row["number"]] = min(max(raw, -limit), limit)
        known = [row for row in fresh if value[row["number"]] is not None]  # the others are in no mean
        lengths = [sum(len(row["ids"]) for row in part) for part in (known, past)]
        asked = len(rows) // trainer.num_generations * trainer.args.replayed_generations
        if past:
            for row, factor in [(r, sum(lengths) / lengths[0]) for r in fresh] + [
                (r, alpha * len(past) / asked * sum(lengths) / lengths[1]) for r in past
            ]:
                advantage[row["number"]] *= factor
        expected.append(advantage)
    return expected


class Worth(Diary):
    """
    Rewards that follow from the completion's tokens, so that those of replayed ones are known; with `none`, those of
    every third are missing.
    """

    def __init__(self, none=False):
        super().__init__()
        self.none = none

    def value_of(self, row, completion, ids, copy):
        return None if self.none and sum(ids) % 3 == 0 else sum(ids) % 8 / 8


@pytest.mark.parametrize(
    ("options", "reference"),
    [
        ({}, {}),
        ({"advantage_scope": "tag"}, {"scope": "tag"}),
        ({"advantage_scope": "tag", "batching": "stratified"}, {"scope": "tag"}),
        ({"advantage_group": "mixed"}, {"mixed": True}),
        ({"replay_alpha": 0.25, "replay_advantage_limit": 0.5, "vcrs_window": 3}, {}),
        ({"none": True}, {}),
    ],
)
@pytest.mark.matrix(cases=2)
def test_advantages_against_a_loop(data, build, options, reference):
    rows = take(data[1], VAS=3, VA=3)
    diary = Worth(none=options.pop("none", False))
    names = {"replay_alpha": "alpha", "replay_advantage_limit": "limit", "vcrs_window": "window"}
    reference = reference | {names[name]: value for name, value in options.items() if name in names}
    options = {"per_device_train_batch_size": 3 * G, "tas_lambda": 0.0, "max_steps": 6, **options}
    trainer = build(rows, diary, **options)
    trainer.train()
    replayed = 0
    for found, expected in zip(trainer.trained, by_hand(trainer, diary, **reference), strict=True):
        for row in found:
            assert row["advantage"] == pytest.approx(expected[row["number"]], rel=1e-4, abs=1e-4)
            replayed += row["replayed"]
    assert replayed >= 3 * G
    # The reference tells scopes and groups apart.
    for other in ({"scope": "tag"}, {"mixed": True}, {"alpha": 0.5}, {"window": 4}):
        if not (other.keys() & reference.keys() or (other == {"window": 4} and "limit" not in reference)):
            wrong = by_hand(trainer, diary, **(reference | other))
            differ = [
                abs(row["advantage"] - numbers[row["number"]]) > 1e-3
                for found, numbers in zip(trainer.trained, wrong, strict=True)
                for row in found
            ]
            assert any(differ), other


# Splits and batches


@pytest.mark.parametrize(("generations", "replayed"), [(8, 0), (8, 6), (4, 3), (2, 1)])
@pytest.mark.matrix(cases=1)
def test_other_splits(data, build, generations, replayed):
    options = {"num_generations": generations, "per_device_train_batch_size": 2 * generations, "max_steps": 5}
    if generations - replayed == 1:  # which alone has no advantage in its group
        options["advantage_scope"] = "batch"
    trainer = build(take(data[1], VAS=2), Worth(), replayed_generations=replayed, **options)
    trainer.train()
    rows = [len(call["rows"]) for call in trainer.generated]
    # The first visit fills the buffer, with as many completions as a later visit replays at most.
    assert rows == [2 * generations] + [2 * (generations - replayed)] * 4
    assert [sum(row["replayed"] for row in batch) for batch in trainer.trained] == [0] + [2 * replayed] * 4
    assert all(math.isfinite(entry["loss"]) and math.isfinite(entry["grad_norm"]) for entry in logs(trainer))
    assert any(entry["grad_norm"] > 0 for entry in logs(trainer)[1:])


def test_stratified_batches_have_one_tag_and_epochs_every_row_once(data, build):
    rows = take(data[1], V=4, S=4, VA=4)
    trainer = build(rows, Worth(), batching="stratified", per_device_train_batch_size=2 * G, max_steps=12)
    trainer.train()
    ids = ids_by_key(trainer)
    tag_of = dict(zip(rows["id"], rows["tag"], strict=True))
    visited = [sorted({ids[row["key"]] for row in batch}) for batch in trainer.trained]
    assert all(len({tag_of[one] for one in batch}) == 1 and len(batch) == 2 for batch in visited)
    for epoch in (visited[:6], visited[6:]):
        assert sorted(one for batch in epoch for one in batch) == sorted(rows["id"])
    assert visited[:6] != visited[6:]
    order = [tag_of[batch[0]] for batch in visited]
    assert any(one != two for one, two in pairwise(order))
    assert all(entry["replay/share"] == 0.5 for entry in logs(trainer)[6:])
    # The control: rows as they come mix the tags.
    trainer = build(rows, Worth(), per_device_train_batch_size=2 * G, max_steps=6)
    trainer.train()
    assert any(len({tag_of[ids[row["key"]]] for row in batch}) > 1 for batch in trainer.trained)


@pytest.mark.parametrize("option", [{"batching": "stratified"}, {"advantage_scope": "tag"}])
def test_what_needs_tags_says_which_row_lacks_one(data, build, option):
    rows = Dataset.from_list([dict(row, tag=None if i == 2 else row["tag"]) for i, row in enumerate(data[1]) if i < 6])
    with pytest.raises(ValueError, match=f"train_dataset, row 2: {next(iter(option))}=.* needs a field 'tag'"):
        build(rows, **option)


# Ratios


def test_ratios_are_one_while_the_policy_has_not_moved(data, build):
    trainer = build(take(data[1], VAS=2, S=2), Worth(), learning_rate=0.0, max_steps=6)
    trainer.train()
    past = [row for batch in trainer.trained for row in batch if row["replayed"]]
    assert len(past) == 5 * 2 * G
    ratios = torch.cat([(row["logps"] - row["old"]).exp() for row in past])
    assert (ratios - 1).abs().max() < 1e-5
    for entry in logs(trainer)[1:]:
        assert entry["replay/effective_share"] == pytest.approx(1, abs=1e-6)
        assert entry["replay/ratio_max"] == pytest.approx(1, abs=1e-5)
    moving = build(take(data[1], VAS=2, S=2), Worth(), learning_rate=1e-2, max_steps=6)
    moving.train()
    assert logs(moving)[-1]["replay/ratio_max"] > 1.05 and logs(moving)[-1]["replay/effective_share"] < 0.999


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.matrix(cases=1)
def test_passes_over_a_rollout_store_each_completion_once(data, build, steps):
    """Behaviour log-probabilities are those of the policy that wrote them, not of the last pass."""
    options = {"num_iterations": 2, "steps_per_generation": steps, "per_device_train_batch_size": 2 * G // steps}
    trainer = build(take(data[1], VAS=2), Worth(), learning_rate=5e-3, max_steps=4 * steps, **options)
    trainer.train()
    assert [len(call["rows"]) for call in trainer.generated] == [2 * G, G]
    first = trainer.trained[: 2 * steps]  # micro-batches of the first rollout: two passes
    written = {}
    for batch in first[:steps]:
        written |= {row["number"]: row for row in batch}
    stored = {tuple(e.completion_ids.tolist()): e for e in contents_of(trainer) if e.step < steps}
    moved = 0
    for row in written.values():
        assert torch.allclose(stored[row["ids"]].logps, row["old"], atol=1e-6)
    for batch in first[steps:]:
        moved += sum(not torch.allclose(row["logps"], stored[row["ids"]].logps, atol=1e-3) for row in batch)
    assert moved, "the policy moved between the passes"
    assert len(trainer.memory.buffer) == 3 * G


def contents_of(trainer):
    return [e for prompt in trainer.memory.vcrs.state_dict() for e in trainer.memory.buffer.stored(prompt)]


# Models


def test_adapters_train_with_replay(data, build):
    model, processor = load_model(MODEL, dtype="float32"), load_processor(MODEL)
    config = build_lora_config(model, family_for(model, processor), r=4, alpha=8)
    trainer = build(
        take(data[1], VAS=4), Worth(), model=model, processing_class=processor, peft_config=config, max_steps=3,
        learning_rate=1e-2,
    )  # fmt: skip
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert [entry["replay/share"] for entry in logs(trainer)] == [0, 0.5, 0.5]
    assert before and all("lora" in name for name in before)
    assert any(not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if n in before)
    assert logs(trainer)[-1]["replay/ratio_max"] > 1


@pytest.mark.long
def test_half_precision_trains_with_replay(data, build):
    trainer = build(take(data[1], VAS=4), Worth(), bf16=True, max_steps=4, learning_rate=0.0)
    trainer.train()
    for entry in logs(trainer)[1:]:
        assert entry["replay/share"] == 0.5 and math.isfinite(entry["grad_norm"])
        # What rounding leaves of a ratio of 1.
        assert entry["replay/ratio_p50"] == pytest.approx(1, abs=0.02)
        assert entry["replay/effective_share"] > 0.99
    assert all(e.logps.dtype == torch.float32 for e in contents_of(trainer))


@pytest.mark.parametrize("chat", [False, True])
def test_a_text_model_replays(tmp_path, chat):
    model, tokenizer = build_tiny_text()
    texts = ["what color is", "low or high", "red or blue", "cat or dog"]
    prompts = [[{"role": "user", "content": text}] for text in texts] if chat else texts
    rows = Dataset.from_dict({"prompt": prompts, "id": texts})
    diary = Worth()
    options = {"model": model, "processing_class": tokenizer, "max_steps": 6, "per_device_train_batch_size": 2 * G}
    trainer = make(tmp_path, tmp_path / "run", rows, diary, **options, learning_rate=0.0)
    trainer.train()
    assert trainer.family is None
    assert [len(call["rows"]) for call in trainer.generated] == [2 * G] * 2 + [G] * 4
    past = [row for batch in trainer.trained for row in batch if row["replayed"]]
    assert len(past) == 4 * G
    assert (torch.cat([(row["logps"] - row["old"]).exp() for row in past]) - 1).abs().max() < 1e-5
    seen = {
        (tuple(row["prompt_ids"]), row["ids"]) for batch in trainer.trained for row in batch if not row["replayed"]
    }
    assert all((tuple(row["prompt_ids"]), row["ids"]) in seen for row in past)


# Rewards and completions that cannot be used


def test_completions_without_a_reward_are_not_stored(data, build):
    rows = take(data[1], VAS=2, S=2)
    never = rows["id"][0]

    def value(row, copy, call):
        return None if row["id"] == never or copy == 0 else spread(row, copy, call)

    trainer = build(rows, Diary(value), max_steps=3)
    trainer.train()
    stored = Counter(ids_by_key(trainer)[prompt_key(e.prompt)] for e in contents_of(trainer))
    assert never not in stored
    assert stored == {one: (G - 1) + 2 * (G // 2 - 1) for one in rows["id"] if one != never}
    assert [len(call["rows"]) for call in trainer.generated] == [4 * G, 2 * G + G // 2, 2 * G + G // 2]
    assert logs(trainer)[-1]["replay/unstorable"] == sum((G, 3, G, 3, G, 3))
    assert logs(trainer)[0]["tag/all/unscorable"] == pytest.approx((G + 3) / (4 * G))
    key = {one: key for key, one in ids_by_key(trainer).items()}[never]
    for batch in trainer.trained:
        for row in batch:
            assert row["key"] != key or not any(row["advantage"])
    assert all(math.isfinite(entry["loss"]) for entry in logs(trainer))


def test_a_column_that_a_reward_begins_to_log_later_stands_beside_its_completions(data, build):
    """As the grade of a judge for rows of some tags: once some is replayed, a rollout brings fewer than the table holds."""

    class Noting(Diary):
        def __call__(self, completions, log_extra, **columns):
            if len(self.calls) > 1:
                log_extra("said", [completion[0]["content"] for completion in completions])
            return super().__call__(completions, **columns)

    trainer = build(take(data[1], S=4), Noting(spread), log_completions=True, num_completions_to_print=2)
    trainer.train()
    tables = [pq.read_table(path) for path in sorted(Path(trainer.args.output_dir, "completions").iterdir())]
    assert ["said" in table.column_names for table in tables] == [False, False, True, True]
    fresh = 4 * G // 2
    for table, known in zip(tables[2:], (fresh, 2 * fresh), strict=True):
        texts = [completion[0]["content"] for completion in table["completion"].to_pylist()]
        assert table["said"].to_pylist() == [None] * (4 * G - known) + texts[4 * G - known :]


def test_a_run_without_any_reward_changes_nothing_and_ends(data, build):
    trainer = build(take(data[1], S=4), Diary(lambda row, copy, call: None), max_steps=2)
    trainer.train()
    assert not len(trainer.memory.buffer)
    assert all(entry["rewardless"] == 1 and entry["grad_norm"] == 0 for entry in logs(trainer))
    assert logs(trainer)[-1]["replay/size"] == 0 and logs(trainer)[-1]["replay/unstorable"] == 8 * G


def test_truncated_completions_are_masked_and_not_stored(data, build):
    options = {"mask_truncated_completions": True, "max_completion_length": 8, "max_steps": 4}
    trainer = build(take(data[1], VAS=2, S=2), Worth(), **options)
    trainer.train()
    eos = trainer.processing_class.tokenizer.eos_token_id
    stored = contents_of(trainer)
    cut = sum(not row["ids"] for batch in trainer.trained for row in batch if not row["replayed"])
    assert cut and stored and all(e.completion_ids[-1] == eos for e in stored)
    assert logs(trainer)[-1]["replay/unstorable"] == cut
    fresh = sum(not row["replayed"] for batch in trainer.trained for row in batch)
    assert len(stored) == fresh - cut
    assert all(math.isfinite(entry["loss"]) for entry in logs(trainer))
    whole = build(take(data[1], VAS=2, S=2), Worth(), **options | {"mask_truncated_completions": False})
    whole.train()
    assert any(e.completion_ids[-1] != eos for e in contents_of(whole))


# Streams


def test_streamed_rows_replay(data, build):
    rows = take(data[1], VAS=2, S=2).to_list()
    stream = IterableDataset.from_generator(lambda: iter(rows * 4))
    trainer = build(stream, Worth(), max_steps=4, shuffle_dataset=False)
    trainer.train()
    assert [entry["replay/share"] for entry in logs(trainer)] == [0, 0.5, 0.5, 0.5]
    seen = {(row["key"], row["ids"]) for batch in trainer.trained for row in batch if not row["replayed"]}
    assert all((row["key"], row["ids"]) in seen for batch in trainer.trained for row in batch if row["replayed"])
    assert {e.row for e in contents_of(trainer)} == {-1}


def test_a_streamed_text_run_replays(tmp_path):
    model, tokenizer = build_tiny_text()
    rows = [{"prompt": text, "id": text} for text in ("what color is", "low or high")]
    stream = IterableDataset.from_generator(lambda: iter(rows * 4))
    options = {"model": model, "processing_class": tokenizer, "per_device_train_batch_size": 2 * G, "max_steps": 3}
    trainer = make(tmp_path, tmp_path / "run", stream, Worth(), **options, shuffle_dataset=False)
    trainer.train()
    assert [entry["replay/share"] for entry in logs(trainer)] == [0, 0.5, 0.5]


# Evaluation, and one run after another


def test_an_evaluation_neither_replays_nor_writes(data, build):
    rows = take(data[1], VAS=2, S=2)
    options = {"eval_strategy": "steps", "eval_steps": 1, "num_generations_eval": 4, "max_steps": 3}
    options |= {"per_device_eval_batch_size": 16, "eval_dataset": rows}
    trainer = build(rows, Worth(), **options)
    trainer.train()
    assert trainer.evaluated == [True] * 3
    counts = [(call["training"], len(call["rows"])) for call in trainer.generated]
    assert counts == [(True, 32), (False, 16), (True, 16), (False, 16), (True, 16), (False, 16)]
    found = [entry for entry in trainer.state.log_history if "eval_reward" in entry]
    assert len(found) == 3 and not any(name.startswith("eval_replay") for entry in found for name in entry)
    assert [entry["replay/size"] for entry in logs(trainer)] == [32, 48, 64]
    assert trainer.evaluate()["eval_reward"] >= 0 and trainer.evaluated[-1]
    before = contents(trainer)
    assert len(trainer.generate_completions(rows.to_list())) == 4 and contents(trainer) == before


@pytest.mark.long
def test_a_second_run_begins_anew(data, build):
    trainer = build(take(data[1], VAS=2, S=2), Worth(), max_steps=3)
    trainer.train()
    assert len(trainer.memory.buffer) == 64 and trainer.memory.buffer.metrics()["replay/hit_rate"] == 1
    trainer.trained.clear()
    trainer.train()
    assert not any(row["replayed"] for row in trainer.trained[0])
    numbers = sorted(row["number"] for row in trainer.trained[0])
    assert numbers == list(range(4 * G))
    assert [entry["replay/size"] for entry in logs(trainer)] == [32, 48, 64]
    assert max(e.step for e in contents_of(trainer)) == 2


def test_a_run_after_one_that_broke_begins_anew(data, build):
    class Break(Worth):
        def __call__(self, *args, **kwargs):
            if len(self.calls) == 2:
                self.calls.append([])
                raise RuntimeError("the judge is away")
            return super().__call__(*args, **kwargs)

    options = {"steps_per_generation": 2, "per_device_train_batch_size": 2 * G, "max_steps": 6}
    trainer = build(take(data[1], VAS=2, S=2), Break(), **options)
    with pytest.raises(RuntimeError, match="the judge is away"):
        trainer.train()
    assert len(trainer.memory.buffer)
    trainer.trained.clear()
    trainer.train()
    assert trainer.state.global_step == 6 and not any(row["replayed"] for row in trainer.trained[0])
    assert logs(trainer)[0]["replay/size"] == 2 * G


@pytest.mark.long
def test_the_age_limit_holds_in_a_run(data, build):
    """All prompts are visited at every step, so what was written at the one before has age 1."""
    rows = take(data[1], VAS=2, S=2)
    trainer = build(rows, Worth(), replay_max_age=0)
    trainer.train()
    assert [entry["replay/share"] for entry in logs(trainer)] == [0] * 4
    assert logs(trainer)[-1]["replay/expired"] == 3 * 4 * G and {e.step for e in contents_of(trainer)} == {3}
    trainer = build(rows, Worth(), replay_max_age=1)
    trainer.train()
    assert [entry["replay/share"] for entry in logs(trainer)] == [0] + [0.5] * 3
    assert {e.step for e in contents_of(trainer)} == {2, 3}
    assert logs(trainer)[-1]["replay/expired"] == 4 * G + 2 * G


@pytest.mark.parametrize("retier", [False, True])
@pytest.mark.matrix(cases=1)
def test_the_capacity_holds_in_a_run(data, build, retier):
    trainer = build(take(data[1], VAS=2, S=2), Worth(), replay_capacity=40, replay_retier=retier, max_steps=6)
    trainer.train()
    assert trainer.memory.buffer.capacities == {"easy": 10, "medium": 14, "hard": 16}
    for entry in logs(trainer):
        sizes = {tier: entry[f"replay/size/{tier}"] for tier in ("easy", "medium", "hard")}
        assert all(sizes[tier] <= most for tier, most in trainer.memory.buffer.capacities.items())
        assert sum(sizes.values()) == entry["replay/size"]
    last = logs(trainer)[-1]
    generated = sum(entry["replay/generated"] for entry in logs(trainer))
    assert last["replay/evicted"] == generated - last["replay/size"] > 0
    assert bool(last["replay/promoted"] + last["replay/demoted"]) == retier


def test_group_deviations_are_of_the_fresh_completions(data, build):
    """The logged advantages are those before weights of terms and shaping."""
    trainer = build(take(data[1], VAS=2, S=2), Worth(), max_steps=3)
    trainer.train()
    for entry, call in zip(logs(trainer), trainer.reward_funcs[0].calls, strict=True):
        groups = defaultdict(list)
        for one in call:
            groups[one["row"]["id"]].append(one["reward"])
        expected = [
            (r - fmean(g)) / (stdev(g) + 1e-4) for g in groups.values() for r in g
        ]  # fmt: skip
        assert entry["tag/all/advantage_std"] == pytest.approx(pstdev(expected), abs=1e-4)
