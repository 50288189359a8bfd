"""Copies of clips with a tag's signals alone: tracks, forms that browsers play, bounds, and the folder they lie in."""

import os
import subprocess
import sys
import threading

import av
import numpy as np
import pytest
from media_files import picture, tone, write_audio, write_video
from PIL import Image

from maple_trl.data.review.copies import write_copy
from maple_trl.data.review.scratch import scratch_folder
from maple_trl.data.review.shelf import ClipShelf
from maple_trl.omni.errors import MediaError


def tracks(path):
    with av.open(str(path)) as container:
        return {stream.type: stream.codec_context.name for stream in container.streams}


def frames(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def loudness(path):
    with av.open(str(path)) as container:
        sound = np.concatenate([frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)])
    full = np.iinfo(sound.dtype).max if sound.dtype.kind == "i" else 1.0
    return float(np.sqrt(np.mean((sound / full) ** 2)))


@pytest.fixture
def media(tmp_path):
    folder = tmp_path / "media"
    folder.mkdir()
    wave = tone(1.0, 16000)
    write_video(folder / "clip.mp4", audio=wave)
    write_video(folder / "silent.mp4")
    write_video(folder / "clip.mkv", codec="mpeg4", audio=wave, audio_codec="pcm_s16le")
    write_audio(folder / "loud.wav", wave)
    return folder


@pytest.fixture
def shelf(media, tmp_path):
    return ClipShelf(media, tmp_path / "copies")


def test_tracks_are_taken_over_as_they_are(media, tmp_path):
    """The pictures of a copy are the clip's own, byte for byte; nothing is encoded anew."""
    for video, audio in ((True, True), (True, False), (False, True)):
        source, target = media / "clip.mp4", tmp_path / f"{video}{audio}.mp4"
        write_copy(target, source if video else None, source if audio else None)
        assert tracks(target) == ({"video": "h264"} if video else {}) | ({"audio": "aac"} if audio else {})
        if video:
            assert all(np.array_equal(a, b) for a, b in zip(frames(target), frames(source), strict=True))
        if audio:
            assert loudness(target) == pytest.approx(loudness(source), rel=1e-6)
        with av.open(str(target)) as container:
            assert float(container.duration) / av.time_base == pytest.approx(1.0, abs=0.15)


def test_what_browsers_do_not_play_is_encoded(media, tmp_path):
    write_copy(tmp_path / "copy.mp4", media / "clip.mkv", media / "clip.mkv")
    assert tracks(tmp_path / "copy.mp4") == {"video": "h264", "audio": "aac"}
    one, other = frames(tmp_path / "copy.mp4"), frames(media / "clip.mkv")
    assert len(one) == len(other) and np.mean(np.abs(one[9].astype(int) - other[9])) < 12
    assert loudness(tmp_path / "copy.mp4") == pytest.approx(loudness(media / "clip.mkv"), rel=0.2)


def test_sound_of_a_file_of_its_own(shelf, media):
    row = {"video": "silent.mp4", "audio": "loud.wav"}
    assert tracks(shelf.clip(row, "VA")) == {"video": "h264", "audio": "aac"}
    assert tracks(shelf.clip(row, "A")) == {"audio": "aac"}
    assert tracks(shelf.clip(row, "V")) == {"video": "h264"}
    write_audio(media / "odd.wav", tone(1.0, 13_000), 13_000)
    assert 0.25 < loudness(shelf.clip({"audio": "odd.wav"}, "A")) < 0.45
    assert 0.25 < loudness(shelf.clip(row, "VA")) < 0.45, "a sine of amplitude 0.5"


@pytest.mark.parametrize("turned", [0, 90, 180, 270])
def test_a_turned_clip_stands_upright(tmp_path, turned):
    """Copied or encoded, a player shows it as it was meant."""
    for codec in ("libx264", "mpeg4"):
        source = write_video(tmp_path / f"{codec}{turned}.mp4", codec=codec, rotation=turned, size=(48, 64))
        target = tmp_path / f"copy-{codec}{turned}.mp4"
        write_copy(target, source, None)

        def upright(path):
            with av.open(str(path)) as container:
                frame = next(container.decode(video=0))
                return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)

        one, other = upright(target), upright(source)
        assert one.shape == other.shape and np.mean(np.abs(one.astype(int) - other)) < 12
        if codec == "mpeg4":
            assert turned in (0, 180) or one.shape[:2] == (64, 48)


def test_what_a_tag_gives_is_said(shelf, media):
    row = {"video": "clip.mp4", "subtitle": "spoken"}
    given = {tag: shelf.signals(row, tag) for tag in ("V", "A", "S", "VA", "VAS")}
    assert {tag: found.clip for tag, found in given.items()} == {
        "V": "video",
        "A": "audio",
        "S": None,
        "VA": "video",
        "VAS": "video",
    }
    assert {tag for tag, found in given.items() if found.subtitle == "spoken"} == {"S", "VAS"}
    assert all(not found.problems for found in given.values())
    silent = shelf.signals({"video": "silent.mp4"}, "VA")
    assert silent.clip == "video" and silent.problems == ("no-audio-track: the row has no sound",)
    assert tracks(shelf.clip({"video": "silent.mp4"}, "VA")) == {"video": "h264"}
    alone = shelf.signals({"video": "silent.mp4"}, "A")
    assert alone.clip is None and alone.problems == ("no-audio-track: the row has no sound",)
    with pytest.raises(MediaError, match="nothing to play for A"):
        shelf.clip({"video": "silent.mp4"}, "A")
    assert "the row has no video" in shelf.signals({}, "V").problems[0]
    assert "the row has no subtitle" in shelf.signals({"video": "clip.mp4"}, "VS").problems[0]
    gone = shelf.signals({"video": "gone.mp4", "audio": "lost.wav"}, "VA")
    assert gone.clip is None and len(gone.problems) == 2


def test_a_subtitle_is_the_text_that_a_model_is_fed(shelf, media):
    (media / "words.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\n<i>It is</i> mine.\n\n", encoding="utf-8")
    assert shelf.subtitle({"subtitle": "words.srt"}) == "It is mine."
    assert shelf.subtitle({"subtitle": "It is mine."}) == "It is mine." and shelf.subtitle({"subtitle": None}) is None
    for name in ("clip.mp4", "notes.txt", "../words.srt"):
        with pytest.raises(MediaError):
            shelf.subtitle({"subtitle": name})


def test_the_subtitle_of_a_part_of_a_clip_is_what_a_model_is_fed(shelf, media):
    cues = ("00:00:00,000 --> 00:00:00,200\nred", "00:00:00,200 --> 00:00:00,400\ngreen")
    (media / "words.srt").write_text("\n\n".join(f"{number}\n{cue}" for number, cue in enumerate(cues, 1)))
    (media / "frames.sub").write_text("{0}{5}red\n")

    def row(start, subtitle="words.srt"):
        block = {"type": "video", "video": "clip.mp4", "video_start": start, "video_end": None}
        return {"prompt": [{"role": "user", "content": [block]}], "subtitle": subtitle}

    assert shelf.subtitle(row(0.2)) == "green" and shelf.signals(row(0.3), "S").subtitle == "green"
    assert shelf.subtitle(row(None)) == shelf.subtitle(row(0.2) | {"video": "clip.mp4"}) == "red\ngreen"
    silent = shelf.signals(row(0.5), "S")
    assert silent.subtitle is None and "no cue is shown from 0.5 s to the end" in silent.problems[0]
    with pytest.raises(MediaError, match="numbers of frames"):
        shelf.subtitle(row(0.2, "frames.sub"))


def test_a_picture_is_upright_and_tells_nothing_else(shelf, media):
    image = Image.fromarray(picture(1, 40, 60))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a secret place"
    image.save(media / "photo.jpg", exif=exif)
    copy = shelf.image({"image": "photo.jpg"})
    with Image.open(copy) as made:
        assert made.size == (40, 60) and not made.getexif() and made.format == "JPEG"
    assert b"secret" in (media / "photo.jpg").read_bytes() and b"secret" not in copy.read_bytes()
    with pytest.raises(MediaError, match="no picture: name it in field 'video'"):
        shelf.image({"image": "clip.mp4"})


def test_each_of_several_pictures_is_given(shelf, media):
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (60, 40), color).save(media / name)
    row = {"images": ["a.png", "gone.png", "b.png"], "image": None}
    found = shelf.signals(row, "V")
    assert found.images == (0, 2) and found.clip is None
    assert [problem.split(":")[0] for problem in found.problems] == ["not-found"]
    with Image.open(shelf.image(row, 2)) as copy:
        assert copy.getpixel((5, 5))[2] > 200
    with pytest.raises(MediaError, match=r"the row has 3 image\(s\)"):
        shelf.image(row, 3)
    assert shelf.signals(row, "A").images == () and "no sound" in shelf.signals(row, "A").problems[0]


def test_copies_stay_within_their_bound(media, tmp_path):
    shelf = ClipShelf(media, tmp_path / "copies")
    sizes = {tag: shelf.clip({"video": "clip.mp4"}, tag).stat().st_size for tag in ("V", "A", "VA")}
    bound = sizes["VA"] + sizes["A"] + 10
    shelf = ClipShelf(media, tmp_path / "bounded", bound)
    paths = {}
    for tag in ("A", "V", "A", "VA"):
        paths[tag] = shelf.clip({"video": "clip.mp4"}, tag)
        assert paths[tag].is_file()
        assert sum(path.stat().st_size for path in shelf.folder.iterdir()) <= bound
    assert {tag for tag, path in paths.items() if path.is_file()} == {"A", "VA"}, "the least recently asked for went"
    assert shelf.clip({"video": "clip.mp4"}, "V").is_file(), "and is made again"
    tiny = ClipShelf(media, tmp_path / "tiny", 1)
    for tag in ("V", "A", "VA"):
        assert tiny.clip({"video": "clip.mp4"}, tag).is_file() and len(list(tiny.folder.iterdir())) == 1


def test_a_clip_that_changes_is_copied_anew(shelf, media):
    before = shelf.clip({"video": "clip.mp4"}, "V")
    assert shelf.clip({"video": "clip.mp4"}, "V") == before
    write_video(media / "clip.mp4", frames=48)
    after = shelf.clip({"video": "clip.mp4"}, "V")
    assert after != before and len(frames(after)) == 48


def test_several_ask_at_once(shelf):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(shelf.clip({"video": "clip.mp4"}, "VA"))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1 and len(list(shelf.folder.iterdir())) == 1


def test_broken_clips_leave_nothing(shelf, media):
    (media / "cut.mp4").write_bytes((media / "clip.mp4").read_bytes()[:900])
    (media / "text.mp4").write_text("no clip")
    for name, reason in (("cut.mp4", "unreadable"), ("text.mp4", "not-media"), ("loud.wav", "no-video-track")):
        with pytest.raises(MediaError) as caught:
            shelf.clip({"video": name}, "V")
        assert caught.value.reason == reason
    assert list(shelf.folder.iterdir()) == []


def test_a_folder_goes_with_its_process(tmp_path):
    with scratch_folder(tmp_path / "cache") as folder:
        assert oct(folder.stat().st_mode & 0o777) == "0o700"
        with scratch_folder(tmp_path / "cache") as other:
            assert folder.is_dir() and other != folder, "that of a process that runs stays"
    assert list((tmp_path / "cache").iterdir()) == []
    code = f"""
import os, signal, sys
from pathlib import Path
from maple_trl.data.review.scratch import scratch_folder
with scratch_folder(Path({str(tmp_path / "cache")!r})) as folder:
    (folder / "clip.mp4").write_text("left")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": os.getcwd()}).returncode == -9
    (left,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    with scratch_folder(tmp_path / "cache"):
        assert not left.exists()
    assert list((tmp_path / "cache").iterdir()) == []
