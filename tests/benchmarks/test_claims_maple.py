"""The task and the instruments of MAPLE's claims: what the set says, what training is rewarded for, and the gradient's moments."""

import importlib
import math
import random
import sys
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from maple_trl.algorithms import GradientSample
from maple_trl.data.synthetic import ATTRIBUTES, load_seven_tags
from maple_trl.modalities import Modality, ModalityTag
from maple_trl.rewards import accuracy_reward
from maple_trl.trainers.common.batch import PROMPTS_KEY


CLAIMS = Path(__file__).resolve().parents[2] / "benchmarks" / "claims"
LETTERS = "ABCD"


@pytest.fixture
def claims(monkeypatch):
    """The modules of benchmarks/claims, by the names that they call each other by."""
    monkeypatch.syspath_prepend(str(CLAIMS))
    known = set(sys.modules)
    yield lambda name: importlib.import_module(name)
    for name in set(sys.modules) - known:
        if getattr(sys.modules[name], "__file__", None) and str(CLAIMS) in sys.modules[name].__file__:
            del sys.modules[name]


@pytest.fixture
def task(claims):
    return claims("tasks.embedded")


@pytest.fixture
def rows(task, tmp_path):
    return {
        split: task.harden(task.tell(list(table), make_folder(tmp_path, split), split, seed=0), seed=0)
        for split, table in load_seven_tags().items()
    }


def make_folder(folder, split):
    (folder / split).mkdir(exist_ok=True)
    return folder


# The set


def attributes_shown(row, folder):
    """What each signal shows, by counting nothing but files: colour, pitch, and the words of the subtitle."""
    text = read(folder / row["subtitle"]) if row["told"] else row["truth_S"]
    words = set(text.split())
    told = [value for values in ATTRIBUTES.values() for value in values if value in words]
    return {"V": (row["truth_V"],), "A": (row["truth_A"],), "S": tuple(sorted(told))}


@cache
def read(file):
    return file.read_text()


def guessed(learned, asked, key):
    """The accuracy of guessing, from a key, the letter that went with it most often in other rows."""
    counts = defaultdict(Counter)
    for row in learned:
        counts[key(row)][row["answer"]] += 1
    return sum(row["answer"] == best(counts[key(row)]) for row in asked) / len(asked)


def best(counts):
    return max(sorted(counts), key=counts.__getitem__, default=None)


def test_shares_are_as_stated(rows, task, tmp_path):
    for table in rows.values():
        for tag in ModalityTag:
            own = [row for row in table if row["tag"] == tag.value]
            shares = Counter(row["told"] for row in own)
            outside = "S" not in tag.value
            assert shares["right"] / len(own) == (task.REDUNDANT if outside else 0)
            assert shares["wrong"] / len(own) == (task.DISTRACTING if outside else 0)
            assert sum(row["tier"] == "hard" for row in own) / len(own) == task.HARD_SHARE
            for row in own:
                told = [row[f"truth_{m.value}"] for m in task.asked_of(row)] if row["told"] == "right" else []
                assert row["told"] != "right" or row["told_value"] in told
                assert row["told"] != "wrong" or row["told_value"] not in (row["truth_V"], row["truth_A"])
                assert row["told_value"] in (tmp_path / row["subtitle"]).read_text() if row["told"] else True
                assert row["id"].endswith("-hard") == (row["tier"] == "hard") == row["question"].startswith("Answer")


def test_no_signal_outside_the_tag_gives_the_answer_away(task, tmp_path):
    tables = {split: list(table) for split, table in load_seven_tags().items()}
    learned, asked = (
        [row for seed in range(12) for row in task.tell(tables[split], make_folder(tmp_path, split), split, seed)]
        for split in ("train", "test")
    )
    trusted = task.REDUNDANT + (1 - task.REDUNDANT - task.DISTRACTING) / 4  # right where it is told so, else by chance
    for tag in ModalityTag:
        own = [[row for row in rows if row["tag"] == tag.value] for rows in (learned, asked)]
        for signal in "VAS":
            found = guessed(*own, lambda row, s=signal: attributes_shown(row, tmp_path)[s])
            if tag.value == signal:
                assert found == 1
            elif tag.value in ("V", "A") and signal == "S":
                assert found == pytest.approx(trusted, abs=0.05), tag
            else:
                assert found < 0.25 + 0.05, (tag, signal)
    # The control: by what is told rightly alone the answer is known.
    own = [[row for row in rows if row["tag"] == "V" and row["told"] == "right"] for rows in (learned, asked)]
    assert guessed(*own, lambda row: attributes_shown(row, tmp_path)["S"]) == 1


def test_the_hard_tiers_rule_is_the_letter_after(rows):
    hard = [row for row in rows["test"] if row["tier"] == "hard"]
    for row in hard:
        indices = sum(
            ATTRIBUTES[Modality(letter)].index(row[f"truth_{letter}"])
            for letter in ModalityTag.parse(row["tag"]).value
        )
        assert row["answer"] == row["solution"] == LETTERS[(indices + 1) % 4]
        assert row["options"][LETTERS.index(row["answer"])].find(row[f"truth_{row['tag'][0]}"]) >= 0


def test_a_split_is_the_same_by_seed(task, tmp_path):
    table = list(load_seven_tags()["test"])
    folder = make_folder(tmp_path, "test")
    once, again, other = (task.tell(table, folder, "test", seed) for seed in (0, 0, 1))
    assert once == again != other


# Rewards


def completions_of(rows, draw):
    letters = [row["solution"] if draw.random() < 0.6 else "E" for row in rows]
    return [[{"role": "assistant", "content": f"<think></think><answer>{letter}</answer>"}] for letter in letters]


def test_noise_and_scale_act_on_training_alone(rows, task):
    chosen = [row for row in rows["train"] if row["tag"] in ("V", "S", "VA")] * 20
    columns = {name: [row[name] for row in chosen] for name in chosen[0] if name != "prompt"}
    completions = completions_of(chosen, random.Random(0))
    exact = accuracy_reward(completions=completions, **columns)

    def trained(step):
        state = SimpleNamespace(global_step=step)
        told = {"completions": completions, "trainer_state": state, "prompts": None, **columns}
        return task.noisy_accuracy(**told), task.scale(**told)

    noisy, added = trained(3)
    assert task.noisy_accuracy.__name__ == "accuracy_reward"
    assert set(noisy) == {0.0, 1.0}
    for tag in ("V", "S", "VA"):
        own = [i for i, row in enumerate(chosen) if row["tag"] == tag]
        turned = sum(noisy[i] != exact[i] for i in own) / len(own)
        assert turned == pytest.approx(task.NOISE[tag], abs=0.03)
        assert all(noisy[i] + added[i] == task.SCALE[tag] * noisy[i] for i in own)
    assert trained(3) == (noisy, added) and trained(4)[0] != noisy
    assert task.score(completions=completions, **columns) == exact  # the evaluation has neither
    assert len(set(task.NOISE.values())) > 2 and len(set(task.SCALE.values())) > 2


# The gradient


def pool_of(module, seed, prompts=32, shift=0.0, coordinates=6):
    """Prompts whose centred gradients have a known mean and spread, the same for all tags but for a shift."""
    draw = torch.Generator().manual_seed(seed)
    tags = [tag.value for tag in ModalityTag for _ in range(prompts)]
    rewards = torch.tensor([1.0, 0.0] * 4).repeat(len(tags), 1)
    centred = 1 + torch.randn(len(tags), coordinates, generator=draw)
    centred += shift * torch.tensor([[tag == "V"] for tag in tags]).float()
    return module.Pool(tags, rewards, torch.full((len(tags),), 8), centred, torch.zeros_like(centred))


def test_moments_are_those_of_known_gradients(claims):
    module = claims("instruments_maple")
    mixed, tagged = (module.Scheme("required", stratified, "group") for stratified in (False, True))
    factor = 1 / (torch.tensor([1.0, 0.0] * 4).std() + 1e-4) / 8
    found = defaultdict(list)
    for seed in range(20):
        for name, scheme in (("mixed", mixed), ("tagged", tagged)):
            for shift in (0.0, 4.0):
                pool = pool_of(module, seed, shift=shift)
                found[name, shift].append(module.moments(pool, scheme, 16, 8, 14, seed))

    def mean(name, shift, what):
        values = torch.tensor([one[what] for one in found[name, shift]])
        return float(values.mean()) / float(factor**2), float(values.std()) / len(values) ** 0.5 / float(factor**2)

    # A step's gradient is the mean of 8 prompts', of unit variance in 6 coordinates.
    for name, shift, what, expected in (
        ("mixed", 0.0, "variance", 6 / 8),
        ("tagged", 0.0, "variance", 6 / 8),
        ("tagged", 0.0, "between", 0.0),
        ("mixed", 0.0, "mean_square", 6 + 6 / 8),
        ("tagged", 4.0, "within", 6 / 8),
        ("tagged", 4.0, "between", 6 * 16 * (1 / 7) * (6 / 7)),
        ("mixed", 4.0, "variance", 6 / 8 + 6 * 16 * (1 / 7) * (6 / 7) / 8),
    ):
        value, error = mean(name, shift, what)
        assert value == pytest.approx(expected, abs=max(4 * error, 1e-3)), (name, shift, what)
    nothing = pool_of(module, 0)
    nothing.rewards.zero_()  # a policy that no reward tells anything
    assert module.moments(nothing, mixed, 16, 8, 14)["relative_norm_variance"] is None
    # The control: the variance about the mean of the draws themselves would be too small, by a share that prompts decide.
    with pytest.raises(ValueError, match="half of the pool has 8"):
        module.moments(pool_of(module, 0, prompts=16), tagged, 16, 8, 28)


@pytest.fixture
def trainer(tmp_path):
    from maple_trl.data.synthetic import default_folder
    from maple_trl.trainers.mapo import MAPOConfig, MAPOTrainer

    table = load_seven_tags()["train"]

    def make(rows_of_step=32, **options):
        per_tag = {tag: [row for row in table if row["tag"] == tag][:8] for tag in ("V", "VA")}
        args = MAPOConfig(
            output_dir=str(tmp_path),
            media_root=str(default_folder()),
            num_frames=4,
            max_completion_length=14,
            prompt_template="{question}",
            per_device_train_batch_size=rows_of_step,
            steps_per_generation=2,
            num_generations=8,
            temperature=1.0,
            learning_rate=1e-4,
            max_steps=1,
            loss_aggregation="token",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **options,
        )
        rows = [dict(row) for own in per_tag.values() for row in own]
        return MAPOTrainer("builtin:tiny-omni", [accuracy_reward], args, Dataset.from_list(rows))

    return make


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("mupo", {}),
        ("mupo", {"advantage_scope": "batch"}),
        ("mapo", {}),
        ("mapo", {"advantage_scope": "tag_whitened"}),
    ],
)
@pytest.mark.matrix(cases=2)
def test_steps_that_are_put_together_are_the_trainers(claims, trainer, method, options):
    module = claims("instruments_maple")
    made = trainer(method=method, **options)
    sample = GradientSample(made.model.named_parameters(), 4096, 0)
    rounds, steps, true = [], [], []
    roll_out, compute, end = made._roll_out, made._compute_loss, made.on_optimizer_step
    made._roll_out = lambda *args: rounds.append(roll_out(*args)) or rounds[-1]
    made._compute_loss = lambda model, inputs: steps.append(inputs[PROMPTS_KEY]) or compute(model, inputs)
    made.on_optimizer_step = lambda: (true.append(sample().clone()), weights.append(weights_of(made)), end())
    weights = []
    made.train()
    with torch.no_grad():  # the step has moved them
        for parameter, value in zip(made.model.parameters(), weights[0], strict=True):
            parameter.copy_(value)
    parts = zip(*module.pulls(made, rounds[0], sample), strict=True)
    rewards, tokens, centred, plain = map(torch.stack, parts)
    prompts = rounds[0].batch.prompts[:: made.num_generations]
    shown = made.train_dataset
    of_key = {made.encode_rows([dict(row)])[1][0].key: row["tag"] for row in shown}
    pool = module.Pool([of_key[prompt.key] for prompt in prompts], rewards, tokens, centred, plain)
    keys = [prompt.key for prompt in prompts]
    batch = list(dict.fromkeys(keys.index(prompt.key) for prompt in steps[0]))
    assert len(batch) == 4 and len(keys) == 8
    scope = made.args.advantage_scope
    rest = [i for i in range(8) if i not in batch]
    found, other = pool.gradients([*batch, *rest], 4, scope)
    assert true[0].norm() > 0
    torch.testing.assert_close(found, true[0], rtol=1e-3, atol=1e-4 * float(true[0].norm()))
    # The control: of other prompts of the rollout it is another.
    assert (other - true[0]).norm() > 0.1 * true[0].norm()


def weights_of(trainer):
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


@pytest.mark.slow
@pytest.mark.long
def test_looking_leaves_the_policy_as_it_was(claims, trainer, monkeypatch):
    module = claims("instruments_maple")
    monkeypatch.setattr(module.Gradient, "COORDINATES", 64)
    made = trainer(rows_of_step=16, method="mapo")
    before, stream = weights_of(made), torch.get_rng_state()
    made.model.train()
    first, again = (module.Gradient(made, None, None).result() for _ in range(2))
    assert first == again and first["own"] == first["mapo"] != first["stratified"]
    assert set(module.SCHEMES) | {"own"} < set(first) and all(one["mean_square"] > 0 for one in first.values())
    assert all(map(torch.equal, before, weights_of(made))) and torch.equal(stream, torch.get_rng_state())
    assert made.model.training and made.prompt_builder.modality_access == "required"
    assert all(parameter.grad is None for parameter in made.model.parameters())


# Metrics


def test_metrics_read_results(claims):
    metrics = claims("metrics_maple").METRICS
    result = {
        "gradient": {"mapo": {"variance": 0.6, "noise": 2.0}, "mupo": {"variance": 0.8, "noise": None}},
        "after": {
            "trained": {
                "accuracy": dict.fromkeys("A S VA VS AS".split(), 0.5) | {"V": 0.5, "VAS": 0.25},
                "samples": 5,
                "questions": [["a-hard", "V", 1.0], ["b", "V", 4.0], ["c-hard", "S", 2.0]],
            }
        },
        "log": {
            f"tag/{tag}/weight": [0.5, None, 0.7 if tag == "VAS" else 0.4, 0.6] for tag in "V A S VA VS AS VAS".split()
        },
    }
    assert metrics["gradient_ratio"](result, "mapo", "mupo") == pytest.approx(0.75)
    assert math.isnan(metrics["gradient_ratio"](result, "mapo", "mupo", "noise"))
    assert metrics["tags_accuracy"](result, "trained", "V", "VAS") == 0.375
    assert metrics["disparity"](result, "trained") == pytest.approx(6 * 0.25 / 21)
    tiers = [metrics["embedded_tier"](result, "trained", tier) for tier in ("hard", "usual")]
    assert tiers == [pytest.approx(0.3), pytest.approx(0.8)]
    with pytest.raises(ValueError, match="a tier is hard or usual"):
        metrics["embedded_tier"](result, "trained", "easy")
    assert metrics["weight_lead"](result, "last", "VAS") == pytest.approx(0.15)
    assert metrics["weight_lead"](result, "first", "VAS") == 0
    assert math.isnan(metrics["weight_lead"]({"log": {}}, "first", "VAS"))
    assert metrics["remaining"]({"log": {"entropy": [2.0, None, 3.0, 1.0, 1.0]}}, "entropy") == 0.5
    with pytest.raises(ValueError, match="first or the last half"):
        metrics["weight_lead"](result, "middle", "VAS")


# Through jobs


@pytest.fixture
def job(claims, task, tmp_path, monkeypatch):
    """A run's options for the embedded model and the plain set, with the task's rewards."""
    from maple_trl.data.synthetic import default_folder

    load_seven_tags()
    monkeypatch.setattr(claims("tasks"), "prepared", lambda name: tmp_path)
    return {
        "model_name_or_path": "builtin:tiny-omni",
        "dataset_name": "builtin:seven-tags",
        "media_root": str(default_folder()),
    }


@pytest.mark.long
@pytest.mark.slow
def test_training_is_rewarded_with_noise_and_scale(claims, job, tmp_path):
    from maple_trl.jobs.options import parse_args
    from maple_trl.jobs.train import build_trainer

    run = claims("runs").Run(
        "embedded",
        "tiny/best",
        100,
        {"max_steps": 14, "per_device_train_batch_size": 16, "zero_shot_questions": 2, **job},
    )
    file = claims("worker").job_file(run, tmp_path, tmp_path)
    made, _ = build_trainer(*parse_args(["--config", str(file)]))
    assert made.reward_func_names == ["format_reward", "accuracy_reward", "scale"] and made._task_reward == 1
    made.train()
    log = [entry for entry in made.state.log_history if "tag/all/rewards/scale" in entry]
    seen = set()
    for entry in log:
        for tag in ModalityTag:
            names = [f"tag/{tag}/rewards/{name}" for name in ("format_reward", "accuracy_reward", "scale")]
            if names[0] in entry:
                form, right, added = (entry[name] for name in names)
                seen.add(tag)
                scale = claims("tasks.embedded").SCALE[tag.value]
                assert added == pytest.approx(right * (scale - 1), abs=1e-3)
                assert entry[f"tag/{tag}/reward"] == pytest.approx(0.1 * form + right * scale, abs=1e-3)
    assert len(seen) == 7
    assert any("tag/VAS/weight" in entry for entry in made.state.log_history)


@pytest.mark.slow
@pytest.mark.long
def test_steps_are_timed_in_turns(claims, job, monkeypatch):
    module = claims("step_times")
    monkeypatch.setattr(module, "RECIPES", {name: module.RECIPES[name] for name in ("mupo", "early")})
    order, epoch = [], module._epoch
    monkeypatch.setattr(module, "_epoch", lambda recipe, *args: order.append(recipe) or epoch(recipe, *args))
    found = module.variants_in_turn(1, 2, job | {"per_device_train_batch_size": 16})
    assert order == ["tiny/early_filtering", "tiny/mupo", "tiny/mupo", "tiny/early_filtering"]
    for one in found.values():
        assert one["cpu"] == pytest.approx(one["generate_cpu"] + one["update_cpu"]) and one["update_cpu"] > 0
    assert found["mupo"]["media_tokens"] >= found["early"]["media_tokens"] > 0
    assert set(module.ratios([found])) == {"early"}


def test_real_clips_are_asked_for_by_folder(claims, monkeypatch, capsys, tmp_path):
    module = claims("step_times")
    monkeypatch.delenv("MAPLE_CLIPS", raising=False)
    with pytest.raises(ValueError, match="name one with --clips or in MAPLE_CLIPS"):
        module.StepTimesOnClips(SimpleNamespace(args=SimpleNamespace(seed=0, max_steps=2)), None, None).result()
    with pytest.raises(SystemExit):
        module.main(["--clips", str(tmp_path)])
    assert "there is no qa.json" in capsys.readouterr().err
    module.main(["--steps", "0", "--seeds", "0", "--json", str(tmp_path / "found.json")])
    assert "clips: not run: no folder of clips" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.claims
def test_the_start_lies_in_the_stated_bands(claims, task, tmp_path, monkeypatch):
    from maple_trl.jobs.options import parse_args
    from maple_trl.jobs.train import build_trainer

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = claims("tasks").prepared("embedded")
    output = tmp_path / "run"
    output.mkdir()
    run = claims("runs").Run("embedded", "tiny/mapo_token", 100, {}, trained=False)
    made, _ = build_trainer(*parse_args(["--config", str(claims("worker").job_file(run, folder, output))]))
    measure = claims("worker").Exam(made, task, task.held_out(folder))
    asked = measure(task.QUESTIONS, 2, ("required", "all"))
    for access, found in asked.items():
        low, high = task.START[access]
        assert low < found["accuracy"]["all"] < high, access
        for tag in ModalityTag:
            assert task.START_OF_A_TAG[0] < found["accuracy"][tag.value] < task.START_OF_A_TAG[1], (access, tag)
    hard, usual = (
        claims("metrics_maple").embedded_tier({"after": asked}, "required", tier) for tier in ("hard", "usual")
    )
    assert hard < task.START_OF_THE_HARD_TIER and usual > 0.65
