"""The evaluator's sampling, its batches and its accounting, on the embedded model."""

import json
import math
import re

import numpy as np
import pyarrow as pa
import pytest
import torch

from maple_trl.cli.eval_print import print_results
from maple_trl.data import default_folder, load_seven_tags
from maple_trl.data.prompt_templates import read_template
from maple_trl.evaluation import EvalOptions, EvaluationError, evaluation_results, load_evaluation, parse_access
from maple_trl.evaluation import evaluator as evaluator_module
from maple_trl.evaluation.evaluator import Evaluator
from maple_trl.evaluation.identity import rows_digest, weights_digest
from maple_trl.evaluation.pipeline import OmniPipeline
from maple_trl.evaluation.sampling import StreamSampler, sample_stream
from maple_trl.files import differences, files_digest
from maple_trl.omni.families import family_for
from maple_trl.omni.generation import end_tokens
from maple_trl.omni.loading import load_model, load_processor
from maple_trl.omni.media.loader import MediaLimits, MediaLoader
from maple_trl.omni.prefix.sharing import probe_prompt
from maple_trl.omni.prompt import PromptBuilder
from maple_trl.records.evaluations import LINES, EvalStore
from maple_trl.records.run_folder import CRITICAL_STEPS_FILE, EMBEDDINGS_FILE
from maple_trl.rewards import accuracy_reward, extract_answer


TAGS = ["V", "A", "S", "VA", "VS", "AS", "VAS"]


# Sampling


def test_a_stream_is_decided_by_seed_question_and_sample():
    stream = sample_stream(3, "q", 1, 1000)
    assert (stream == sample_stream(3, "q", 1, 1000)).all()
    assert (stream[:10] == sample_stream(3, "q", 1, 10)).all()
    assert stream.min() >= 0 and stream.max() < 1 and abs(stream.mean() - 0.5) < 0.05
    for other in (sample_stream(4, "q", 1, 1000), sample_stream(3, "r", 1, 1000), sample_stream(3, "q", 2, 1000)):
        assert abs(np.corrcoef(stream, other)[0, 1]) < 0.15 and not (stream == other).any()
    # Written down: a resumed evaluation may run on another machine.
    assert sample_stream(0, "test-0000", 0, 2).tolist() == EXPECTED


# By the definition, from NumPy's generator and nothing of the library.
def _by_definition():
    import hashlib

    key = hashlib.sha256(b'[0, "test-0000", 0]').digest()[:16]
    bits = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(2)
    return [int(word) // 2**32 / 2**32 for word in bits]


EXPECTED = _by_definition()


def test_draws_follow_the_probabilities():
    scores = torch.tensor([2.0, -torch.inf, 0.5, 1.0, -1.0])
    count = 20_000
    numbers = torch.from_numpy(sample_stream(0, "any", 0, count))[:, None]
    drawn = StreamSampler(numbers, 4)(torch.zeros(count, 4), scores.expand(count, -1)).argmax(-1)
    share = torch.bincount(drawn, minlength=5) / count
    wanted = scores.softmax(-1)
    assert share[1] == 0
    assert ((share - wanted).abs() < 4 * (wanted * (1 - wanted) / count).sqrt() + 1e-12).all()


def test_ends_of_the_unit_interval_draw_tokens_that_are_possible():
    scores = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(2, -1)
    ends = torch.tensor([[0.0], [1 - 2.0**-32]], dtype=torch.float64)
    kept = StreamSampler(ends, 0)(torch.zeros(2, 0), scores)
    assert kept.argmax(-1).tolist() == [1, 3]
    assert (kept == -torch.inf).sum(-1).tolist() == [4, 4]


# Asking


@pytest.fixture(scope="module")
def parts():
    model = load_model("builtin:tiny-omni").eval()
    processor = load_processor("builtin:tiny-omni")
    loader = MediaLoader(default_folder(), MediaLimits(num_frames=4, max_pixels=3136), backend="pyav")
    rows = load_seven_tags()["test"].select(range(14)).to_list()
    yield model, PromptBuilder(family_for(model, processor), loader), rows
    loader.close()


def evaluator(parts, rows=None, score=accuracy_reward, **options):
    model, builder, all_rows = parts
    options = EvalOptions(**{"samples": 3, "max_new_tokens": 14, **options})
    return Evaluator(model, builder, all_rows if rows is None else rows, score, extract_answer, options)


def ask(*args, **options):
    asking = evaluator(*args, **options)
    return [line for batch in asking.batches for line in asking.run(batch)] + asking.skipped


def completions(lines):
    return {(line["id"], line["access"], line["sample"]): line["completion"] for line in lines}


def test_a_sample_does_not_depend_on_the_batch_or_what_came_before(parts):
    whole = completions(ask(parts, batch_size=8))
    assert len(whole) == 42 and len(set(whole.values())) > 10
    assert completions(ask(parts, batch_size=3)) == whole
    torch.manual_seed(99)
    torch.rand(5)
    backwards = completions(ask(parts, rows=parts[2][::-1], batch_size=5))
    assert backwards == whole
    alone = completions(ask(parts, rows=[parts[2][6]], samples=2))
    assert alone == {key: text for key, text in whole.items() if key in alone} and len(alone) == 2
    # Negative control: the same question under another seed.
    assert completions(ask(parts, rows=[parts[2][6]], samples=2, seed=1)) != alone


def test_an_access_gives_the_same_in_the_ablation_and_alone(parts):
    together = completions(ask(parts, access=tuple(TAGS), samples=1, batch_size=4))
    alone = completions(ask(parts, access=("VS",), samples=1, batch_size=4))
    assert alone == {key: text for key, text in together.items() if key[1] == "VS"} and len(alone) == 14


def test_a_shared_prompt_changes_nothing(parts):
    shared = ask(parts, batch_size=4)
    apart = ask(parts, batch_size=4, shared_prompt=False)
    assert completions(shared) == completions(apart)
    assert [line["inputs"] for line in shared] == [line["inputs"] for line in apart]
    evaluator(parts).check_shared_prompt()


def test_samples_of_a_cache_that_cannot_grow_have_a_prompt_each(parts):
    rows = parts[2][:3]
    static = ask(parts, rows, samples=2, max_new_tokens=4, generation={"cache_implementation": "static"})
    assert completions(static) == completions(ask(parts, rows, samples=2, max_new_tokens=4))


def test_the_check_of_shared_prompts_looks_at_what_is_asked(parts, monkeypatch):
    model, builder, rows = parts
    asked = PromptBuilder(builder.family, builder.loader, template=read_template("{question}"))
    bare = [{name: value for name, value in row.items() if name != "prompt"} for row in rows]
    looked_at = []
    monkeypatch.setattr(
        evaluator_module, "probe_prompt", lambda prompts: looked_at.extend(prompts) or probe_prompt(prompts)
    )
    evaluator((model, asked, bare)).check_shared_prompt()
    assert {"video", "audio"} <= {kind for prompt in looked_at[1:] for kind in prompt.kinds}


def test_answers_end_with_any_end_token_of_the_model(parts, monkeypatch):
    """The turns of some models end with another token than their tokenizer's."""
    model, builder, rows = parts
    pipeline = OmniPipeline(model, builder.family.processor, str(default_folder()), num_frames=4, max_pixels=3136)
    whole = pipeline(rows[0], max_new_tokens=14)
    tokenizer = builder.family.tokenizer
    first, *rest = tokenizer.encode(whole, add_special_tokens=False)
    assert rest
    monkeypatch.setattr(model.generation_config, "eos_token_id", [tokenizer.eos_token_id, first])
    assert pipeline(rows[0], max_new_tokens=14) == tokenizer.decode([first])
    assert end_tokens(model, tokenizer) == sorted([tokenizer.eos_token_id, first])
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    assert end_tokens(model, tokenizer) == [tokenizer.eos_token_id]


@pytest.mark.parametrize("shortest", [0, 20])  # tokens; a prompt without media has fewer
def test_a_prompt_that_cannot_be_shared_is_noticed(parts, shortest):
    asking = evaluator(parts)

    # A model that computes otherwise for a single row, as one that keeps something per row would.
    handle = asking.core.language_model.layers[0].register_forward_pre_hook(
        lambda module, args: (
            (args[0] * 2 if len(args[0]) == 1 and args[0].size(1) > shortest else args[0]) + 0,
            *args[1:],
        )
    )
    try:
        with pytest.raises(EvaluationError, match="cannot share their prompt.*--no-shared-prompt"):
            asking.check_shared_prompt()
    finally:
        handle.remove()


def test_greedy_answers_and_cut_distributions(parts):
    greedy = completions(ask(parts, temperature=0.0, samples=1))
    assert completions(ask(parts, top_k=1, samples=1)) == greedy
    assert completions(ask(parts, temperature=1e-4, samples=1, seed=5)) == greedy
    assert completions(ask(parts, top_p=1e-6, samples=1)) == greedy
    assert completions(ask(parts, min_p=0.999, samples=1)) == greedy
    assert completions(ask(parts, samples=1, temperature=3.0)) != greedy
    assert completions(ask(parts, temperature=0.0, samples=1, generation={"repetition_penalty": 50.0})) != greedy


def test_media_tokens_are_never_sampled(parts):
    lines = ask(parts, temperature=50.0, samples=2)
    family = parts[1].family
    assert not any(token in line["completion"] for line in lines for token in family.media_tokens)
    assert evaluator(parts, generation={"suppress_tokens": [20]}).generation_config.suppress_tokens == sorted(
        {20, *family.suppressed_ids}
    )


def test_scores_of_plain_prompts_and_what_scorers_are_handed(parts):
    seen = []

    def note(prompts, completions, completion_ids, group_ids, solution, **columns):
        seen.append((prompts, completions, completion_ids, group_ids, solution))
        return [0.5, None, math.nan]

    lines = ask(parts, rows=[{"prompt": "color?", "solution": "A"}], score=note)
    assert [(line["status"], line["score"]) for line in lines] == [
        ("scored", 0.5),
        ("unscored", None),
        ("unscored", None),
    ]
    ((prompts, texts, ids, groups, solutions),) = seen
    assert prompts == ["color?"] * 3 and solutions == ["A"] * 3 and len(set(groups)) == 1
    assert texts == [line["completion"] for line in lines] and list(map(len, ids)) == [
        line["completion_tokens"] for line in lines
    ]
    with pytest.raises(EvaluationError, match="gave 1 scores for 3 completions"):
        ask(parts, rows=[{"prompt": "color?"}], score=lambda **_: [1.0])
    with pytest.raises(EvaluationError, match="row 0: the scoring function gave 'good'"):
        ask(parts, rows=[{"prompt": "color?"}], score=lambda **_: ["good"] * 3)


def test_ids_that_do_not_tell_rows_apart_are_not_used(parts):
    rows = [{**row, "id": "same"} for row in parts[2][:3]]
    assert evaluator(parts, rows=rows).names == ["0", "1", "2"]
    assert evaluator(parts, rows=parts[2][:2]).names == ["test-0000", "test-0001"]


def test_accesses_are_read():
    assert parse_access("required, sv,all") == ("required", "VS", "all")
    with pytest.raises(EvaluationError, match="access '' is neither"):
        parse_access("V,,A")


# An adapter


def test_an_adapter_is_evaluated_and_pinned(parts, tmp_path, capsys):
    from peft import get_peft_model
    from rich.console import Console

    from maple_trl import cli
    from maple_trl.omni.lora import build_lora_config

    model = load_model("builtin:tiny-omni")
    family = family_for(model, load_processor("builtin:tiny-omni"))
    torch.manual_seed(0)
    adapted = get_peft_model(model, build_lora_config(model, family, r=2, alpha=64, console=Console(quiet=True)))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    parts[1].family.processor.save_pretrained(tmp_path / "merged")

    def run(name, *words):
        words = [*words, "--data", "builtin:seven-tags", "--limit", "7", "--samples", "1", "--max-new-tokens", "14"]
        words += ["--num-frames", "4", "--max-pixels", "3136", "--quiet", "--output", str(tmp_path / name)]
        assert cli.main(["eval", *map(str, words)]) == 0, capsys.readouterr().err
        found = load_evaluation(tmp_path / name)
        return found.result["model"], found.lines["completion"].to_pylist()

    base, plain = run("base", "--model", "builtin:tiny-omni")
    named, texts = run("named", "--model", "builtin:tiny-omni", "--adapter", tmp_path / "adapter")
    own, same = run("own", "--model", tmp_path / "adapter")
    merged, also = run("merged-out", "--model", tmp_path / "merged")
    assert texts == same == also != plain
    assert base["adapter"] is None and base["sha256"] == named["sha256"] == own["sha256"] != merged["sha256"]
    assert named["adapter"]["sha256"] == own["adapter"]["sha256"]
    # One whose weights are not all there is refused, not evaluated by half.
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    save_file(dict(list(weights.items())[2:]), tmp_path / "adapter" / "adapter_model.safetensors")
    words = ["--model", "builtin:tiny-omni", "--adapter", tmp_path / "adapter", "--data", "builtin:seven-tags"]
    assert cli.main(["eval", *map(str, words), "--output", str(tmp_path / "half")]) == 2
    assert "its weights are not all there: 1 layers have none, e.g. " in capsys.readouterr().err


# Accounting


def lines_from(questions):
    """Lines of questions given as (tag, access, scores), a status in place of scores where there are none."""
    lines = []
    for row, (tag, access, scores) in enumerate(questions):
        line = {"id": str(row), "row": row, "tag": tag, "access": access, "notes": []}
        if isinstance(scores, str):
            lines.append(line | {"status": scores, "reason": "unreadable"})
            continue
        zeros = {name: 0 for name in LINES.names if name.endswith("_tokens")}
        lines += [
            line | zeros | {"status": "scored", "sample": i, "score": score, "finish": "end", "answer": "A"}
            for i, score in enumerate(scores)
        ]
    return pa.Table.from_pylist(lines, LINES)


def test_a_tag_at_zero_leaves_the_gap_undefined():
    questions = [(tag, "required", [0.0, 0.0] if len(tag) == 1 else [1.0, 0.0]) for tag in TAGS for _ in range(2)]
    found = evaluation_results(lines_from(questions), ["required"], 2)["accesses"]["required"]
    assert found["accuracy"]["per_tag"]["V"]["value"] == 0.0
    for weighting in ("sample", "tag"):
        assert "divides by the accuracy of V, A, S, which is 0" in found["modality_gap"][weighting]["undefined"]
    assert found["tag_disparity"][0][3] == 0.5 and found["tag_disparity"][0][1] == 0.0


def test_the_gap_of_an_evaluation_by_hand():
    share = {"V": 0.5, "A": 0.5, "S": 0.5, "VA": 0.75, "VS": 0.75, "AS": 0.75, "VAS": 1.0}
    questions = [(tag, "all", [float(i < 4 * share[tag])]) for tag in TAGS for i in range(4)]
    found = evaluation_results(lines_from(questions), ["all"], 1)["accesses"]["all"]
    gap = found["modality_gap"]["sample"]
    assert [gap[name]["value"] for name in ("uni_bi", "uni_tri", "bi_tri")] == pytest.approx([0.5, 1.0, 1 / 3])
    assert gap["mean"]["value"] == pytest.approx((0.5 + 1 + 1 / 3) / 3)


def test_errors_and_missing_tags_are_counted():
    questions = [("V", "required", [1.0]), ("V", "required", "error"), (None, "required", [0.0])]
    questions.append(("A", "required", "error"))
    result = evaluation_results(lines_from(questions), ["required"], 1)
    found = result["accesses"]["required"]
    assert found["accuracy"]["sample_mean"]["value"] == 0.5 and found["accuracy"]["per_tag"]["V"]["value"] == 1.0
    assert found["accuracy"]["missing_tags"] == TAGS[1:]
    assert found["bounds"]["sample_mean"] == {"low": 0.25, "high": 0.75}
    assert found["bounds"]["per_tag"] == {"V": {"low": 0.5, "high": 1.0}, "A": {"low": 0.0, "high": 1.0}}
    assert [error["row"] for error in result["errors"]] == [1, 3]
    json.dumps(result, allow_nan=False)


def test_partly_scored_questions():
    questions = [("V", "required", [1.0, None, 0.5]), ("V", "required", [1.0, 1.0, 1.0])]
    found = evaluation_results(lines_from(questions), ["required"], 3)["accesses"]["required"]
    assert found["accuracy"]["sample_mean"]["value"] == pytest.approx((0.75 + 1) / 2)
    assert found["pass_at_k"]["1"]["value"] == pytest.approx(0.75)  # a score of 0.5 is not right
    assert "question 0 has n=2" in found["pass_at_k"]["3"]["undefined"]


def test_ungraded_samples_are_counted_told_and_wrong_or_right_in_the_bounds(capsys):
    """Four questions of five samples, of which one was graded, as right."""
    lines = lines_from(
        [("V", "required", [1.0, None, None, None, None])] * 3 + [("A", "required", [None, 1.0] + [None] * 3)]
    )
    reasons = ["no-judge" if score is None else None for score in lines["score"].to_pylist()]
    lines = lines.set_column(lines.schema.get_field_index("reason"), "reason", pa.array(reasons))
    result = evaluation_results(lines, ["required"], 5)
    found = result["accesses"]["required"]
    assert found["ungraded_samples"] == {"no-judge": 16} and found["completions"]["all"] == 20
    assert (found["counts"]["scored"], found["counts"]["unscored"], found["reasons"]) == (4, 0, {})
    assert found["accuracy"]["sample_mean"]["value"] == 1.0
    assert (
        found["bounds"]["sample_mean"] == found["bounds"]["per_tag"]["A"] == {"low": pytest.approx(0.2), "high": 1.0}
    )
    print_results(result | {"left_out": []}, "out")
    assert re.search(r"samples unscored\W+16\b", capsys.readouterr().out)


def test_samples_and_questions_without_a_score_in_the_bounds():
    asked = [("V", "required", [0.5, 1.0, None]), ("V", "required", [None] * 3), ("V", "required", "error")]
    found = evaluation_results(lines_from([*asked, ("V", "required", "lacking")]), ["required"], 3)["accesses"][
        "required"
    ]
    assert found["bounds"]["sample_mean"] == pytest.approx({"low": 0.5 / 3, "high": (2.5 / 3 + 1 + 1) / 3})
    assert sum(found["ungraded_samples"].values()) == 4


# The folder


def test_a_folder_keeps_whole_batches_alone(tmp_path):
    store = EvalStore(tmp_path / "out")
    store.begin({"seed": 0})
    line = {"id": "a", "row": 0, "access": "V", "status": "error", "notes": []}
    store.write(0, [line])
    (store.batches / ".00001.parquet.7.partial").write_bytes(b"half")  # as a kill leaves it
    assert store.has(0) and not store.has(1) and not store.complete
    with pytest.raises(EvaluationError, match=r"00001\.parquet cannot be read"):
        store.finish(2, [])
    (store.batches / "00001.parquet").write_bytes(b"damaged")
    with pytest.raises(EvaluationError, match=r"00001\.parquet cannot be read.*remove it"):
        store.finish(2, [])
    store.write(1, [line | {"row": 1}])
    store.finish(2, [line | {"row": 2, "access": "A"}])
    assert [(row["access"], row["row"]) for row in store.lines().to_pylist()] == [("A", 2), ("V", 0), ("V", 1)]
    assert not store.batches.exists()
    with pytest.raises(EvaluationError, match=r"another evaluation: seed: 0, not 1\. Name another folder"):
        store.begin({"seed": 1})
    about = [store.folder / name for name in (CRITICAL_STEPS_FILE, EMBEDDINGS_FILE)]
    for file in (*about, store.folder / "notes.txt"):
        file.write_bytes(b"x")
    store.begin({"seed": 1}, overwrite=True)
    assert not store.complete
    assert not any(file.exists() for file in about) and (store.folder / "notes.txt").exists()
    with pytest.raises(FileNotFoundError):
        load_evaluation(tmp_path / "out")


def test_digests_see_what_matters(parts, tmp_path):
    model = load_model("builtin:tiny-omni")
    before = weights_digest(model)
    assert before == weights_digest(parts[0])
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-6
    assert weights_digest(model) != before
    rows = [{"prompt": "a", "tag": "V"}, {"prompt": "b", "tag": None}]
    assert rows_digest(rows) == rows_digest([{"tag": "V", "prompt": "a"}, rows[1]]) != rows_digest(rows[::-1])
    (tmp_path / "file").write_bytes(b"1")
    one = files_digest(tmp_path, ["file", "none"])
    (tmp_path / "file").write_bytes(b"2")
    assert files_digest(tmp_path, ["file", "none"]) != one
    assert differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "d": 4}) == [
        "a.b: 1, not 3",
        "c: 2, not None",
        "d: None, not 4",
    ]
