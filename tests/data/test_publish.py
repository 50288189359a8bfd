"""Shards are uploaded to a hub with a card, and come back as they were."""

import json
import logging

import pytest
import yaml
from datasets import config, load_dataset
from huggingface_hub import constants
from local_hub import local_hub

from maple_trl import cli
from maple_trl.data.dataset_card import count_contents, render_card
from maple_trl.data.publish import PublishError, publish
from maple_trl.data.schema import ROW_FEATURES
from maple_trl.data.shards import find_shards, write_shards
from maple_trl.omni import checkpoints


KEY = "hf_secretsecretsecret"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that the libraries take for theirs, with a key that may write to it."""
    with local_hub(KEY) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(config, "HF_ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        for module in (constants, config):
            monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HUGGINGFACE_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(checkpoints, "_reached", set())
        monkeypatch.setenv("HF_TOKEN", KEY)
        yield hub


def row(number, **changes):
    fields = {
        "id": f"q{number}",
        "clip": f"c{number}",
        "tag": "V",
        "source": "mine | yours",
        "split": "train",
        "prompt": [{"role": "user", "content": "?"}],
        "question": "?",
        "options": ["a", "b"],
        "answer": "A",
        "solution": "A",
        "question_type": "color",
        "video": f"{number}.mp4",
        "provenance": [{"field": "answer", "model": "m7"}] if number % 2 else [],
    }
    return fields | changes


ROWS = [row(n) for n in range(5)] + [row(n, split="test", tag="VA", question_type=None) for n in range(5, 8)]
ROWS[0]["provenance"] = [{"field": "tag", "model": "m7"}, {"field": "tag", "reviewer": "ann"}]


@pytest.fixture
def folder(tmp_path):
    write_shards(ROWS, tmp_path / "rows", shard_rows=2)
    return tmp_path / "rows"


@pytest.mark.slow
def test_what_was_pushed_loads_back(hub, folder, tmp_path, capsys, caplog, refused):  # datasets counts who loads
    caplog.set_level(logging.DEBUG)
    assert cli.main(["data", "push", str(folder), "me/clips", "--private", "--license", "cc-by-4.0"]) == 0
    out, err = capsys.readouterr()
    assert "8 rows in 5 shards" in out and hub.repositories["me/clips"].private
    assert KEY not in out + err + caplog.text and KEY in {key for *_, key in hub.requests}
    loaded = load_dataset("me/clips", cache_dir=str(tmp_path / "cache"))
    assert set(loaded) == {"train", "test"}
    for split, rows in loaded.items():
        assert rows.features == ROW_FEATURES
        local = load_dataset(
            "parquet",
            data_files=list(map(str, find_shards(folder)[split])),
            split="train",
            cache_dir=str(tmp_path / "own"),
        )
        assert rows.to_list() == local.to_list() and rows["id"] == [r["id"] for r in ROWS if r["split"] == split]


def test_the_card_tells_what_is_in_it(folder):
    files = {split: [f"data/{path.name}" for path in paths] for split, paths in find_shards(folder).items()}
    card = render_card(count_contents(find_shards(folder)), files, "me/clips", "cc-by-4.0")
    _, head, text = card.split("---\n", 2)
    told = yaml.safe_load(head)
    assert told["license"] == "cc-by-4.0"
    [configuration] = told["configs"]
    assert configuration["data_files"] == [{"split": s, "path": files[s]} for s in ("test", "train")]
    for line in (
        "8 rows on clips",
        "| V | 5 |",
        "| VA | 3 |",
        "| mine \\| yours | 8 |",
        "| color | 5 |",
        "| model | 4 | 50.0% |",
        "| model and reviewer | 1 | 12.5% |",
        "| neither | 3 | 37.5% |",
        "| m7 | answer | 4 | 50.0% |",
        "| ann | tag | 1 | 12.5% |",
        'load_dataset("me/clips", split="test")',
    ):
        assert line in text, line


def test_a_second_push_replaces_the_shards_and_nothing_else(hub, folder, tmp_path):
    publish(folder, "me/clips")
    repository = hub.repositories["me/clips"]
    repository.commit(
        repository.commits[repository.head] | {"data/notes.txt": hub.put(b"mine"), "own.parquet": hub.put(b"x")}
    )
    write_shards([ROWS[0], ROWS[5]], tmp_path / "fewer")
    published = publish(tmp_path / "fewer", "me/clips")
    assert sorted(published.removed) == [
        f"data/{path.name}" for paths in find_shards(folder).values() for path in paths
    ]
    assert set(hub.files("me/clips")) == {
        "README.md",
        "data/notes.txt",
        "own.parquet",
        "data/train-00000-of-00001.parquet",
        "data/test-00000-of-00001.parquet",
    }
    assert len(repository.commits) == 4  # made, pushed, the user's own, pushed in one


@pytest.mark.slow
def test_a_split_that_is_pushed_alone_leaves_the_others(hub, folder, tmp_path, capsys, refused):
    publish(folder, "me/clips", license="cc-by-4.0")
    write_shards(ROWS[:1], tmp_path / "train")
    assert cli.main(["data", "push", str(tmp_path / "train"), "me/clips", "--license", "cc-by-4.0"]) == 0
    out = capsys.readouterr().out
    assert "1 rows in 1 shards" in out and "left as they are, of an earlier upload: test" in out
    assert {name for name in hub.files("me/clips") if name.startswith("data/")} == {
        "data/train-00000-of-00001.parquet",
        *(f"data/{path.name}" for path in find_shards(folder)["test"]),
    }
    assert "not counted on this page: test." in hub.files("me/clips")["README.md"].decode()
    loaded = load_dataset("me/clips", cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 1, "test": 3}


@pytest.mark.parametrize("own", [b"# Mine\n", None])
def test_a_card_that_a_person_wrote_or_changed_stays(own, hub, folder, tmp_path, capsys):
    publish(folder, "me/clips")
    repository, first = hub.repositories["me/clips"], hub.files("me/clips")["README.md"]
    assert publish(folder, "me/clips", license="mit").own_card is False  # nobody has changed it
    written = hub.files("me/clips")["README.md"]
    assert written != first and b"license: mit" in written
    own = own or written.replace(b"## Use", b"Filmed by us.\n\n## Use")
    repository.commit(repository.commits[repository.head] | {"README.md": hub.put(own)})
    write_shards(ROWS[:1], tmp_path / "train")
    assert cli.main(["data", "push", str(tmp_path / "train"), "me/clips"]) == 0
    assert hub.files("me/clips")["README.md"] == own
    out = capsys.readouterr().out
    assert "1 rows in 1 shards" in out and "left as it is: README.md, which a person has written or changed" in out


def test_a_dry_run_and_the_help_say_what_is_replaced(folder, capsys):
    assert cli.main(["data", "push", str(folder), "me/clips", "--dry_run"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "an earlier upload has there of test, train is removed, other splits stay" in told and "README.md" in told
    assert cli.main(["data", "push", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "those of the splits in FOLDER alone" in told and "README.md where a person has" in told


def test_rows_with_problems_are_not_pushed(hub, tmp_path, capsys):
    write_shards([row(0), row(1, answer="C", solution="C")], tmp_path / "rows")
    assert cli.main(["data", "push", str(tmp_path / "rows"), "me/clips"]) == 1
    out, err = capsys.readouterr()
    assert "1  answer" in out and "field 'answer' must be the letter of an option" in out
    assert "1 problems (1 answer); nothing was uploaded" in err and hub.requests == []


def test_tables_that_are_no_shards_are_named_and_stay(hub, folder, capsys):
    """Training reads this test split beside the shards, and whoever loads the upload would not have it."""
    (folder / "test-00000-of-00002.parquet").rename(folder / "test.parquet")
    (folder / "test-00001-of-00002.parquet").unlink()
    told = f"not uploaded, as it is no shard: {folder / 'test.parquet'}"
    assert cli.main(["data", "push", str(folder), "me/clips", "--dry_run"]) == 0
    assert told in capsys.readouterr().out.replace("\n", "")
    assert cli.main(["data", "push", str(folder), "me/clips"]) == 0
    assert told in capsys.readouterr().out and "data/test.parquet" not in hub.files("me/clips")


def test_media_are_looked_for_where_a_root_is_named(hub, folder, tmp_path):
    with pytest.raises(PublishError, match=r"8 problems \(8 file\)"):
        publish(folder, "me/clips", media_root=tmp_path)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("repository", "key", "error"),
    [
        ("clips", KEY, "'clips' is no id of a repository; write OWNER/NAME"),
        ("me/a--b", KEY, "'me/a--b' is no id of a repository; write OWNER/NAME"),  # which the Hub's own client refuses
        ("me/clips", "hf_other", "the Hub refuses it (HTTP 401): is there a key that may write"),
    ],
)
def test_what_the_hub_refuses_is_told_without_the_key(hub, folder, capsys, monkeypatch, repository, key, error):
    monkeypatch.setenv("HF_TOKEN", key)
    assert cli.main(["data", "push", str(folder), repository]) == 2
    out, err = capsys.readouterr()
    assert error in err and key not in out + err and not hub.repositories


def test_a_hub_that_is_not_there_is_told(folder, capsys):
    assert cli.main(["data", "push", str(folder), "me/clips", "--json"]) == 2
    assert "cannot upload to me/clips: HF_HUB_OFFLINE is set" in capsys.readouterr().err


def test_the_command_prints_json(hub, folder, capsys):
    assert cli.main(["data", "push", str(folder), "me/clips", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rows"] == 8 and told["url"].startswith(hub.endpoint) and "README.md" in told["files"]
