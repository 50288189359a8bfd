"""Prompts made of columns: exact texts, the place of the subtitle, and rows that cannot be asked."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from media_files import tone, write_video
from tiny_models import build_tiny

from maple_trl.data.benchmarks.prompts import PROMPT_STYLES
from maple_trl.data.prompt_templates import PROMPT_TEMPLATES, read_template, texts_of
from maple_trl.modalities import ModalityTag
from maple_trl.omni.errors import MediaError, RowError
from maple_trl.omni.families import family_for
from maple_trl.omni.media.loader import MediaLimits, MediaLoader
from maple_trl.omni.prompt import PromptBuilder, check_template
from maple_trl.omni.templates import PromptTemplate, option_lines


SPOKEN = "red, then {blue}"
ROW = {"question": "Which {color}?", "options": ["red", "a {n}", "green", "blue"], "solution": "B"}

# Written out, and not made by the code that is tested.
QUESTION = (
    "Which {color}?\n\nA. red\nB. a {n}\nC. green\nD. blue\n\n"
    "Choose the one right option, and end your answer with its letter in square brackets."
)
QA = dict.fromkeys(("V", "A", "VA"), QUESTION)
QA |= dict.fromkeys(("S", "VS", "AS", "VAS"), f"Subtitles: {SPOKEN}\n\n{QUESTION}")
FRAME = (
    "A video tells something in up to three ways: by its pictures, by its sound and by its subtitles. Sound is speech as well "
    "as everything else that can be heard; whoever describes it describes both.\n\n"
    "{} Write the heading '### Video Description', and the sentence below it.\n\n"
    "{}Let it be one natural sentence in which everything you were given fits together, and do not mention by which way you "
    "learned of it."
)
TASKS = {
    "V": "You are given the pictures of a video without its sound. Say in one sentence what happens in it.",
    "A": "You are given the sound of a video. Say in one sentence what happens in it, with what is spoken and what is heard in "
    "the background.",
    "S": "You are given the subtitles of a video. Say in one sentence what happens in it, by nothing but them.",
    "VA": "You are given a video with its sound. Say in one sentence what happens in it, by what is seen and by what is heard: "
    "speech and background sounds.",
    "VS": "You are given the pictures of a video and its subtitles. Say in one sentence what happens in it, by both, and guess "
    "nothing about its sound.",
    "AS": "You are given the sound of a video and its subtitles. Say in one sentence what happens in it, by what is heard and by "
    "the subtitles.",
    "VAS": "You are given a video with its sound and its subtitles. Say in one sentence what happens in it, by what is seen, by "
    "what is heard (speech and background sounds) and by the subtitles.",
}
CAPTION = {tag: FRAME.format(task, f"Subtitles: {SPOKEN}\n\n" if "S" in tag else "") for tag, task in TASKS.items()}


@pytest.mark.parametrize("template", ["think", "answer", "brackets", "maple-qa"])
def test_more_options_than_letters_are_refused(template):
    row = {"question": "Which?", "options": [f"class {number}" for number in range(27)]}
    with pytest.raises(RowError, match="column 'options' holds 27 texts, and there are 26 letters"):
        read_template(template).render(row, ModalityTag.V)
    row["options"].pop()
    assert "Z. class 25" in read_template(template).render(row, ModalityTag.V)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("clips")
    write_video(root / "clip.mp4", frames=8, audio=tone(0.5, 16000))
    (root / "said.srt").write_text(f"1\n00:00:00,000 --> 00:00:01,000\n{SPOKEN}\n")
    return root


def builder(folder, template=None, **kwargs):
    limits = MediaLimits(num_frames=4, min_pixels=1024, max_pixels=4096)
    template = None if template is None else read_template(template)
    return PromptBuilder(
        family_for(*build_tiny("qwen2_5_omni")), MediaLoader(folder, limits), template=template, **kwargs
    )


def row_of(tag, **columns):
    return {**ROW, "tag": tag, "video": "clip.mp4", "subtitle": "said.srt"} | columns


def said(build, prompt):
    """The conversation that tokens spell, by role, without media."""
    text = build.family.tokenizer.decode(prompt.input_ids)
    media = "|".join(re.escape(token) for token in build.family.media_tokens)
    turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>|$)", text, re.DOTALL)
    return [(role, re.sub(media, "", body).strip("\n")) for role, body in turns if role != "assistant"]


@pytest.mark.parametrize("tag", list(ModalityTag))
@pytest.mark.parametrize("name, texts", [("maple-qa", QA), ("maple-caption", CAPTION)])
def test_the_tokens_of_a_set_spell_the_text_of_the_tag(folder, name, texts, tag):
    build = builder(folder, name, system_prompt="Watch.")
    prompt = build.encode(build.asked(row_of(tag.value.lower())))
    assert said(build, prompt) == [("system", "Watch."), ("user", texts[tag])]
    assert {kind[0].upper() for kind in prompt.media_tokens} == set(tag)


def test_the_two_sets_have_seven_texts_for_captions_and_two_for_questions():
    assert len(set(CAPTION.values())) == 7 and len(set(QA.values())) == 2
    assert set(PROMPT_TEMPLATES) == {"maple-qa", "maple-caption", *PROMPT_STYLES}


@pytest.mark.parametrize("name", PROMPT_STYLES)
def test_the_styles_of_benchmarks_are_templates_too(folder, name):
    build = builder(folder, name)
    rows = [(ROW, "option"), (ROW | {"options": None}, "text"), (ROW | {"options": []}, "text")]
    for row, kind in [*rows, (ROW | {"options": [], "answer_kind": "yes_no"}, "yes_no")]:
        expected = PROMPT_STYLES[name].render(row["question"], row["options"] or [], kind)
        (message,) = build.asked(row)["prompt"]
        assert message == {"role": "user", "content": expected}
    assert said(build, build.encode(build.asked(row_of("S"))))[-1][1].startswith(f"Subtitles:\n{SPOKEN}\nWhich")
    with pytest.raises(RowError, match=f"prompt_template {name} needs a text in column 'question', got None"):
        build.asked({"options": ["a"]})


def test_what_is_fed_chooses_the_text_and_not_the_tag(folder):
    texts = {"V": "seen", "vas": "all: {subtitle}", "default": "other"}
    aware, unaware = builder(folder, texts), builder(folder, texts, modality_access="all")
    assert aware.asked(row_of("V"))["prompt"][0]["content"] == "seen"
    assert said(unaware, unaware.encode(unaware.asked(row_of("V"))))[-1] == ("user", f"all: {SPOKEN}")
    assert aware.asked(row_of("A"))["prompt"][0]["content"] == "other"
    assert aware.asked({"question": "x"})["prompt"][0]["content"] == "other"  # fed nothing


def test_a_subtitle_stands_once_and_alone_at_its_place(folder):
    build = builder(folder, "before {subtitle} after", subtitle_template="[[{subtitle}]]")
    row = build.asked(row_of("S"))
    assert said(build, build.encode(row))[-1] == ("user", f"before {SPOKEN} after")
    # A row's own prompt says the same; without a mark the template of the subtitle leads it.
    plain = builder(folder, subtitle_template="[[{subtitle}]]")
    own = [{"role": "user", "content": "before <subtitle> after"}]
    assert said(plain, plain.encode(row_of("S", prompt=own)))[-1] == ("user", f"before {SPOKEN} after")
    own = [{"role": "user", "content": "before after"}]
    assert said(plain, plain.encode(row_of("S", prompt=own)))[-1] == ("user", f"[[{SPOKEN}]]before after")
    # What is not fed does not stand there.
    own = [{"role": "user", "content": "before <subtitle> after"}]
    assert said(plain, plain.encode(row_of("V", prompt=own)))[-1] == ("user", "before  after")


def test_a_mark_without_a_subtitle_and_two_marks_are_refused(folder):
    build = builder(folder)
    for content, subtitle, counts in (("a <subtitle>", None, (1, 0)), ("<subtitle> <subtitle>", "said.srt", (2, 1))):
        row = row_of(None, prompt=[{"role": "user", "content": content}], subtitle=subtitle)
        with pytest.raises(
            RowError, match=rf"holds {counts[0]} <subtitle> mark.*field 'subtitle' names {counts[1]} file"
        ):
            build.spec(row)


def test_a_long_prompt_has_its_subtitle_shortened_at_its_place(folder):
    long = "red green blue yellow. " * 40
    whole = builder(folder, "before {subtitle} after")
    row = whole.asked(row_of("S", subtitle=long))
    assert len(whole.encode(row)) > 120
    short = builder(folder, "before {subtitle} after", max_prompt_length=120)
    prompt = short.encode(row)
    text = said(short, prompt)[-1][1]
    assert len(prompt) <= 120 and text.startswith("before red green") and text.endswith(" after")
    with pytest.raises(MediaError, match="only a subtitle can be shortened"):
        builder(folder, "word " * 200 + "{subtitle}", max_prompt_length=120).encode(
            builder(folder, "word " * 200 + "{subtitle}").asked(row)
        )


def test_asking_twice_changes_nothing(folder):
    build = builder(folder, "maple-qa", system_prompt="Watch.")
    once = build.asked(row_of("VAS", prompt=[{"role": "user", "content": "old"}]))
    assert build.asked(once) == once and build.spec(once).key == build.spec(build.asked(once)).key
    other = builder(folder, "maple-caption", system_prompt="Watch.").asked(once)
    assert build.spec(other).key != build.spec(once).key


def test_own_messages(folder):
    own = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "old"}]
    build = builder(folder, "{question}", system_prompt="Watch.")
    assert build.asked(row_of("V", prompt=own))["prompt"] == [own[0], {"role": "user", "content": ROW["question"]}]
    blocks = [{"role": "user", "content": [{"type": "text", "text": "old"}]}]
    asked = builder(folder, None, system_prompt="Watch.").asked(row_of("V", prompt=blocks))["prompt"]
    assert asked == [{"role": "system", "content": [{"type": "text", "text": "Watch."}]}, *blocks]
    for prompt, message in (
        ([*own, {"role": "assistant", "content": "x"}, own[1]], "has system, user, assistant, user"),
        ([{"role": "user", "content": [{"type": "video", "video": "clip.mp4"}]}], "would drop the media blocks"),
    ):
        with pytest.raises(RowError, match=message):
            build.asked(row_of("V", prompt=prompt))
    with pytest.raises(RowError, match="system_prompt leads a conversation, and field 'prompt' is none"):
        builder(folder, None, system_prompt="Watch.").asked({"prompt": "plain text"})


def test_the_chat_template_is_checked_with_the_made_prompt(folder):
    build = builder(folder, "maple-qa")
    rows = [build.asked(row_of(tag)) for tag in ("V", "S")]
    check_template(build, [row["prompt"] for row in rows], rows)


@pytest.mark.parametrize(
    "template, columns, message",
    [
        ("{title}?", {}, r"names \{title\}, and there is no column 'title'; there are question, options"),
        ("{question}", {"question": None}, r"column 'question' is empty in this row"),
        ("{question}", {"question": " \n"}, r"column 'question' is empty in this row"),
        ("{question}", {"question": float("nan")}, r"column 'question' is empty in this row"),
        ("{question}", {"question": ["x"]}, r"column 'question' holds list; it must be a text or a number"),
        ("{question}", {"question": True}, r"column 'question' holds bool"),
        ("{options}", {"options": []}, r"column 'options' is \[\], not texts"),
        ("{options}", {"options": None}, r"column 'options' is empty"),
        ("{options}", {"options": ["x"] * 27}, r"column 'options' holds 27 texts, and there are 26 letters"),
        ("{options}", {"options": ["x", None, "y"]}, r"column 'options' is \['x', None, 'y'\], not texts"),
        ("x {subtitle}", {}, r"names \{subtitle\} for a row that is fed V, which has none; give texts by tag"),
        ({"A": "x", "VAS": "y"}, {}, r"no text for rows that are fed V, nor one under 'default'; it has A, VAS"),
        ("{question}", {"subtitle": None, "tag": "VS"}, r"tag VS needs subtitle"),
    ],
)
def test_rows_that_cannot_be_asked(folder, template, columns, message):
    with pytest.raises(RowError, match=message):
        builder(folder, template).asked(row_of("V") | columns)


@pytest.mark.parametrize(
    "value, message",
    [
        ("maple-qua", r"there is no set of templates 'maple-qua'.*did you mean maple-qa\?"),
        ("", "must be a text, texts by tag, or one of maple-qa"),
        (7, "must be a text, texts by tag, or one of maple-qa"),
        ({}, "is empty"),
        ({"X": "a"}, r"'X' is neither a tag \(V, A, S, VA, VS, AS, VAS\) nor 'default'"),
        ({"VA": "a", "av": "b"}, "tag VA is given twice"),
        ({"V": " "}, "the text of 'V' must be a text that is not blank"),
        ({"V": "{subtitle}"}, r"the text of V names \{subtitle\}, and rows that are fed V have none"),
        ("{question!r}", "must be the name of a column"),
        ("{question.upper}", "must be the name of a column"),
        ("{} x", "must be the name of a column"),
        ("{question", "braces that are meant as such are doubled"),
        ("{prompt} again", r"\{prompt\} is what the template makes"),
        ("{subtitle}{subtitle}", "stands there twice"),
    ],
)
def test_values_that_are_no_template(value, message):
    with pytest.raises(ValueError, match=message):
        read_template(value)


def test_json_of_a_command_line():
    assert texts_of('{"V": "x"}') == {"V": "x"} and texts_of("null") is None
    for text in ("{question}", "{{x}}", "plain", None, {"V": "x"}):
        assert texts_of(text) == text


def test_options_with_letters_keep_them():
    assert option_lines(["red", "blue"]) == ["A. red", "B. blue"]
    wide = (["（A）red", "（B）blue"], ["A．red", "B．blue"], ["A、red", "B、blue"], ["Ａ：red", "Ｂ：blue"])
    close = (["(A)red", "(B)blue"], [" A.red", "B.blue "], ["A : red", "B : blue"])
    for given_ in (["A. red", "B. blue"], ["(a) red", "(b) blue"], ["A) red", "B: blue"], *wide, *close):
        assert option_lines(given_) == given_
    for given_ in (["A. red", "blue"], ["B. red", "A. blue"], ["A man", "Better"], ["A. red"]):
        assert option_lines(given_) == [f"{letter}. {text}" for letter, text in zip("AB", given_, strict=False)]


@given(st.text(max_size=40), st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=6))
def test_columns_stand_there_as_they_are(question, options):
    template = PromptTemplate({"default": "<<{question}>>{{}}{options}"})
    row = {"question": question, "options": options}
    if not question.strip():
        with pytest.raises(RowError, match="is empty"):
            template.render(row, None)
        return
    assert template.render(row, None) == f"<<{question}>>{{}}" + "\n".join(option_lines(options))


def test_a_set_is_known_by_its_texts():
    described = PROMPT_TEMPLATES["maple-qa"].described
    assert described["name"] == "maple-qa" and described["version"] == 1
    changed = PromptTemplate(dict(PROMPT_TEMPLATES["maple-qa"].texts) | {"V": "x"}, name="maple-qa", version=1)
    assert changed.described["digest"] != described["digest"]
