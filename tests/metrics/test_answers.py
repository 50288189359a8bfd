"""Metrics of answers that are more than right or wrong, against scikit-learn, an own edit distance, and counts by hand."""

import re
import sys
import unicodedata
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from maple_trl.metrics import answers
from maple_trl.metrics.answers import HAN, UNSPACED, count_measures, rouge_f1, set_f1, word_error_rate, words
from maple_trl.rewards import answers as parser


LETTERS = "ABCDEF"
WORDS = st.lists(st.sampled_from("red blue sky cat dog tree".split()), min_size=1, max_size=8)


@given(st.integers(0, 300), st.integers(0, 300))
def test_a_count(told, truth):
    found = count_measures(float(told), float(truth))
    assert found["ACC"] == (told == truth) and found["OBOA"] == (told in (truth - 1, truth, truth + 1))
    error = abs(told - truth)
    assert found["MAE"] == (error if error <= 100 or error <= 2 * truth else 2 * truth)
    assert found["answered"] == 1


def test_a_count_that_is_not_told_is_none_of_zero():
    assert count_measures(None, 3.0) == {"ACC": 0, "OBOA": 0, "MAE": 3, "answered": 0}
    assert count_measures(None, 0.0)["ACC"] == count_measures(None, 1.0)["OBOA"] == 0
    assert count_measures(1e6, 4.0)["MAE"] == 8 and count_measures(104.0, 4.0)["MAE"] == 100


@given(st.sets(st.sampled_from(LETTERS)), st.sets(st.sampled_from(LETTERS)))
def test_f1_of_sets_is_that_of_scikit_learn(told, truth):
    flags = [[int(letter in chosen) for letter in LETTERS] for chosen in (truth, told)]
    assert set_f1(told, truth) == pytest.approx(f1_score(*flags, zero_division=0.0))
    assert set_f1(told, truth) == set_f1(truth, told) and (set_f1(told, truth) == 1) == (told == truth != set())


def edits(a, b):
    """Levenshtein's distance, row by row."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


@given(WORDS | st.just([]), WORDS)
def test_word_errors_are_edits_by_words_of_the_truth(told, truth):
    assert word_error_rate(" ".join(told), " ".join(truth)) == pytest.approx(edits(told, truth) / len(truth))


def lcs(a, b):
    rows = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            rows[i + 1][j + 1] = rows[i][j] + 1 if x == y else max(rows[i][j + 1], rows[i + 1][j])
    return rows[-1][-1]


def f1(shared, told, truth):
    return 2 * shared / (told + truth) if shared else 0.0


@given(WORDS, WORDS)
def test_rouge_by_hand(told, truth):
    found = rouge_f1(" ".join(told), " ".join(truth))
    pairs = [Counter(zip(words, words[1:], strict=False)) for words in (told, truth)]
    shared = (Counter(told) & Counter(truth)).total()
    assert found["rouge1"] == pytest.approx(f1(shared, len(told), len(truth)))
    assert found["rouge2"] == pytest.approx(f1((pairs[0] & pairs[1]).total(), len(told) - 1, len(truth) - 1))
    assert found["rougeL"] == pytest.approx(f1(lcs(told, truth), len(told), len(truth)))


def test_words_of_every_script_without_case_and_punctuation():
    assert word_error_rate("STOP, here.", "stop here") == 0 and word_error_rate("stop", "stop here") == 0.5
    assert rouge_f1("Собака бежит!", "собака бежит домой")["rouge1"] == pytest.approx(4 / 5)
    assert word_error_rate("…", "…") == 0 and word_error_rate("x", "…") == 1
    assert rouge_f1("…", "…")["rougeL"] == 1 and rouge_f1("x", "…")["rougeL"] == 0


@pytest.mark.parametrize(
    "text, found",
    [
        ("今天天气很好。", list("今天天气很好")),
        ("买3只狗dog，12个", ["买", "3", "只", "狗", "dog", "12", "个"]),
        ("赤い車・ガード", ["赤", "い", "車", "ガ", "ー", "ド"]),
        ("ที่นี่มี ๑๒", ["ที่", "นี่", "มี", "๑๒"]),  # tones and vowels stay with their letter
        ("ພາສາລາວ", ["ພ", "າ", "ສ", "າ", "ລ", "າ", "ວ"]),
        ("ខ្ញុំ៕", ["ខ្", "ញុំ"]),
        ("မြန်မာ။", ["မြ", "န်", "မာ"]),
        # With spaces between words: signs belong to them.
        ("हिन्दी, दिल!", ["हिन्दी", "दिल"]),
        ("مُحَمَّد", ["مُحَمَّد"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("cafe\u0301 Straße", ["café", "strasse"]),
        ("❤\ufe0f 1\ufe0f\u20e3", ["1"]),
        ("don't stop_here", ["don", "t", "stop_here"]),
    ],
)
def test_words_of_scripts(text, found):
    assert words(text) == found


def test_without_spaces_the_rate_is_one_of_characters():
    assert word_error_rate("今天天气真好", "今天天气很好") == pytest.approx(1 / 6)
    assert word_error_rate("今天，天气很好", "今天天气很好！") == 0
    assert word_error_rate("ไป", "ไม่") == pytest.approx(1 / 2) and word_error_rate("दल", "दिल") == 1
    found = rouge_f1("今天天气真好", "今天天气很好")
    assert found["rouge1"] == pytest.approx(5 / 6) and found["rouge2"] == pytest.approx(3 / 5)


def test_the_scripts_without_spaces_are_those_of_unicode():
    """By the names of all assigned characters: letters and signs of these scripts, neither digits nor punctuation."""
    spaceless = re.compile(f"[{UNSPACED}]")
    han = re.compile(f"[{HAN}]")
    scripts = "THAI|LAO|MYANMAR|KHMER|HIRAGANA|KATAKANA|HENTAIGANA|CJK (UNIFIED|COMPATIBILITY) IDEOGRAPH"
    others = "(VERTICAL )?(IDEOGRAPHIC|KANA) |HANGZHOU NUMERAL|MASU MARK|COMBINING KATAKANA"  # repetitions, numerals, voicing
    for char in map(chr, range(0x32000)):
        kind, name = unicodedata.category(char)[0], unicodedata.name(char, "")
        if not name:
            continue
        if re.match(rf"(HALFWIDTH )?({scripts})\b", name) and kind in "LM":
            assert spaceless.match(char), name
            assert bool(han.match(char)) == name.startswith("CJK"), name
        elif spaceless.match(char):
            assert re.match(others, name) and not char.isdecimal(), name
    assert spaceless.pattern == f"[{parser._UNSPACED}]" and han.pattern == f"[{parser._HAN}]"  # which keeps a copy


@pytest.mark.parametrize("module, call", [("jiwer", word_error_rate), ("rouge_score.rouge_scorer", rouge_f1)])
def test_a_missing_package_names_the_extra(monkeypatch, module, call):
    monkeypatch.setitem(sys.modules, module, None)
    answers._rouge_scorer.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'maple-trl\[texts\]'"):
        call("a", "b")
