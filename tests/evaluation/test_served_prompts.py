"""When the frames of a video are shown reaches a server's model, in each form in which they are sent."""

import numpy as np
import pytest

from maple_trl.evaluation.served_prompts import TIMES_UNKNOWN, MessageEncoder, video_blocks
from maple_trl.omni.media.clips import PromptMedia, VideoClip
from maple_trl.omni.media.sampling import even_count


def clip(seconds, fps):
    """A clip as the loader gives it: with the last frame again where their number is odd."""
    frames = np.random.default_rng(0).integers(256, size=(len(seconds), 28, 28, 3), dtype=np.uint8)
    return VideoClip(np.stack(even_count(list(frames))), np.array(even_count(list(seconds))), fps, 9.0, "v.mp4")


def sent(form, *clips):
    content = [*({"type": "video"} for _ in clips), {"type": "text", "text": "When?"}]
    encoder = MessageEncoder(form) if form else MessageEncoder()
    return encoder.encode("key", [{"role": "user", "content": content}], PromptMedia(videos=clips))


def shown(prompt):
    """The texts of a message, and `#` for a picture or video."""
    return [block.get("text", "#") for block in prompt.messages[0]["content"]]


@pytest.mark.parametrize("form", ["timed_images", None])
def test_each_frame_stands_behind_its_time(form):
    even = ["<0.0 seconds>", "#", "<0.5 seconds>", "#", "<3.0 seconds>", "#", "<3.3 seconds>", "#", "When?"]
    prompt = sent(form, clip([0, 0.5, 3, 3.3], 1.0))
    assert shown(prompt) == even and prompt.options == {} and prompt.notes == ()
    assert shown(sent(form, clip([0, 0.5, 3], 1.0))) == [*even[:6], "When?"]  # and not the last one again
    assert shown(sent(form, clip([1.0], 1.0))) == ["<1.0 seconds>", "#", "When?"]


def test_times_are_left_out_where_that_is_asked_for():
    assert shown(sent("images", clip([0, 0.5, 3], 1.0))) == ["#", "#", "#", "When?"]


def test_a_server_is_told_the_rate_and_the_number_of_a_videos_frames():
    """vLLM takes frames for one a second, and the first 32 of them, where a request says nothing."""
    long = clip(np.arange(40) / 4, 4.0)
    prompt = sent("video_url", long)
    assert prompt.options == {"media_io_kwargs": {"video": {"num_frames": 40, "fps": 4.0}}} and prompt.notes == ()
    assert prompt.messages[0]["content"][0]["video_url"]["url"].count(",") == 40
    slow = sent("video_url", clip(np.arange(40) / 4, 2.0))
    assert slow.messages == prompt.messages and slow.digest != prompt.digest
    both = sent("video_url", long, clip([0, 0.25], 4.0))
    assert both.options == prompt.options and both.notes == ()
    differing = sent("video_url", long, clip([0, 0.5], 2.0))
    assert differing.options == {"media_io_kwargs": {"video": {"num_frames": 40}}}
    assert differing.notes == (TIMES_UNKNOWN,)


def test_a_trial_of_a_server_has_no_text_beside_its_frames():
    """Else its tokens would be counted for those of frames that the server has dropped."""
    frames = np.zeros((2, 28, 28, 3), dtype=np.uint8)
    for form in ("timed_images", "images"):
        assert [block["type"] for block in video_blocks(frames, form)] == ["image_url", "image_url"]
