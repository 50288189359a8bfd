"""Judge of the steps of a reasoning (AVATAR, arXiv 2508.03100, section 4 and appendix B.1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from maple_trl.chat import ChatOptions, fence, image_block, text_block
from maple_trl.modalities import IMAGE_COLUMNS, Modality, ModalityTag
from maple_trl.omni.errors import MediaError
from maple_trl.omni.host_memory import host_memory
from maple_trl.rewards.answers import extract_answer, solution_text
from maple_trl.rewards.judge import OpenAIJudge, Question, Scorer
from maple_trl.rewards.judge_prompts import REASONING_AXES, SCALE, reasoning_system
from maple_trl.rewards.judge_texts import as_text, harmless, prompt_text, think_block


if TYPE_CHECKING:
    from maple_trl.omni.media.loader import MediaLoader

CUE_COLUMNS = {
    "audio_cues": "audio_cues",
    "visual_objects": "visual_objects",
    "spatial_locations": "spatial_locations",
    "caption": "caption",
}
_SEEN = ("visual_objects", "spatial_locations")
_PICTURE_BYTES = 64 << 20
SOLUTION = "solution"
_ANSWER = "final answer"  # what the completion says, beside the row's columns
_LONGEST_ANSWER = 1000


class StepwiseReasoningJudge(OpenAIJudge):
    r"""
    Grades the `<think>` block of a completion on up to four axes, each 0.0, 0.2, … 1.0; the reward is their mean.

    This is the fourth reward of AVATAR (arXiv 2508.03100), section 4.3.

    The axes are `audio_cues`, `visual_objects`, `spatial_locations` and `caption`.

    The judge sees the question, the row's cues, and the block; no `<answer>` of the completion (one inside the block is
    cut out) and no solution of the row. Thoughts that name an option are not changed, so that put no `solution` among
    the cues. (So that section has it, "independently of the final answer"; the criteria of appendix B.1 and the authors'
    released settings compare with the solution: `sees_solution`.)

    An axis is graded where the row has a cue for it; with pictures, what is seen is graded without one too. With
    `sees_solution` all axes are graded, in rows that have a solution. A row without anything to grade by is not scored. A
    completion without exactly one closed block earns 0.0, and so does one whose block has more than 16000 characters (see
    [`OpenAIJudge`] for what else is decided by rule).

    Args:
        scorer (`ChatOptions`, `ChatClient` or `LocalScorer`):
            Where answers come from.
        cue_columns (`Mapping[str, str]`, *optional*):
            Column by axis, text or a list of texts; default is for each axis the column of its name. Axes that are left
            out are not graded.
        frames (`int`, *optional*, defaults to 0):
            Pictures shown of the row's video, spread over it, if its tag (where it has one) holds `V`; for judges that
            take pictures. Above 0, the pictures of columns `image` and `images` are shown as well, all of them.
        loader (`MediaLoader`, *optional*):
            What reads the videos, or a function that makes it when it is first needed; needed for `frames`. Its
            `num_frames` limits how many there are.
        sees_solution (`bool`, *optional*, defaults to `False`):
            Show the row's `solution` and the completion's answer to the judge, which then grades audio grounding, visual
            identification, the accuracy of places and the rightness of the answer.
        free_grades (`bool`, *optional*, defaults to `False`):
            Take any number in `[0, 1]` as a grade, and not steps of 0.2 alone.
        max_pixels (`int`, *optional*, defaults to 448 x 448):
            Area of a picture.
        video_column, tag_column (`str`, *optional*, default to `"video"` and `"tag"`):
            The row's video and tag.
        **kwargs:
            As in [`OpenAIJudge`].

    Raises:
        ValueError: for an unknown axis, or frames without a loader; when called: for a data set with none of the columns.
    """

    default_name = "stepwise_reasoning_judge"

    def __init__(
        self,
        scorer: ChatOptions | Scorer,
        *,
        cue_columns: Mapping[str, str] | None = None,
        frames: int = 0,
        loader: MediaLoader | Callable[[], MediaLoader] | None = None,
        sees_solution: bool = False,
        free_grades: bool = False,
        max_pixels: int = 448 * 448,
        video_column: str = "video",
        tag_column: str = "tag",
        **kwargs: Any,
    ):
        super().__init__(scorer, **kwargs)
        given = cue_columns
        cue_columns = CUE_COLUMNS if cue_columns is None else cue_columns
        if not isinstance(cue_columns, Mapping):
            raise ValueError(f"cue_columns must map axes to columns, e.g. {CUE_COLUMNS}, got {cue_columns!r}")
        self.cue_columns = dict(cue_columns)
        unknown = [axis for axis in self.cue_columns if axis not in REASONING_AXES]
        if unknown or not self.cue_columns:
            raise ValueError(f"cue_columns must name axes of {', '.join(REASONING_AXES)}, got {unknown or 'none'}")
        for field, value, least in (("frames", frames, 0), ("max_pixels", max_pixels, 1)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{field} must be a whole number of at least {least}, got {value!r}")
        if frames and loader is None:
            raise ValueError(f"frames={frames} needs a MediaLoader as `loader`")
        for field, flag in (("sees_solution", sees_solution), ("free_grades", free_grades)):
            if not isinstance(flag, bool):
                raise ValueError(f"{field} must be true or false, got {flag!r}")
        self.sees_solution, self.free_grades = sees_solution, free_grades
        self.columns = (SOLUTION,) if sees_solution else ()
        self.scale = None if free_grades else SCALE
        self.frames, self.loader, self.max_pixels = frames, loader, max_pixels
        self.video_column, self.tag_column = video_column, tag_column
        self.named_columns = {f"cue_columns, {axis}": column for axis, column in (given or {}).items()}
        others = {"video_column": (video_column, "video"), "tag_column": (tag_column, "tag")}
        self.named_columns |= {name: column for name, (column, default) in others.items() if column != default}
        self.guideline = reasoning_system(tuple(REASONING_AXES), True, sees_solution, free_grades)
        self._pictures = host_memory().cache("judges", _PICTURE_BYTES)

    def check_columns(self, columns: Sequence[str]) -> None:
        """
        Check as other judges do, and that there is a column to grade by.

        Args:
            columns (`Sequence[str]`): of the data set.

        Raises:
            ValueError: naming the columns of which one must be there, or the argument whose column is not.
        """
        super().check_columns(columns)
        if not self.sees_solution and not self.frames and not set(self.cue_columns.values()) & set(columns):
            raise ValueError(
                f"one of the columns {', '.join(self.cue_columns.values())} must be there, by which reasoning is graded; name "
                "others with cue_columns, or show pictures (frames)"
            )

    def _check_columns(self, columns: Mapping[str, Any]) -> None:
        super()._check_columns(columns)
        if self.sees_solution:
            return
        if not self.frames and all(columns.get(column) is None for column in self.cue_columns.values()):
            raise ValueError(
                f"{self.__name__} needs one of the columns {', '.join(self.cue_columns.values())} in the dataset (or "
                f"`frames`); columns that came with this batch: {sorted(columns) or 'none'}"
            )

    def judged_text(self, text: str) -> str | None:
        """Return the think block in the `text` of a completion."""
        return think_block(text)

    def _ask(self, completion: str, row: Mapping[str, Any]) -> Question | float | None:
        if self.sees_solution:
            row = {**row, _ANSWER: extract_answer(completion)}
        return super()._ask(completion, row)

    def question(self, text: str, row: Mapping[str, Any]) -> Question | None:
        """Ask about thoughts (`text`) on a `row`; `None` for a row without a cue."""
        try:
            pictures = self._pictures_of(row)
        except MediaError:
            return None
        cues = {axis: as_text(row.get(column)) for axis, column in self.cue_columns.items()}
        solution = solution_text(row.get(SOLUTION)) if self.sees_solution else None
        if self.sees_solution:
            axes = tuple(axis for axis in REASONING_AXES if axis in cues and solution is not None)
        else:
            axes = tuple(
                axis for axis in REASONING_AXES if cues.get(axis) or (pictures and axis in cues and axis in _SEEN)
            )
        if not axes:
            return None
        parts = []
        asked = prompt_text(row.get("prompt") or "")
        if asked:
            parts.append(self._fenced("question", asked))
        parts += [self._fenced(f"notes_{axis}", cues[axis]) for axis in axes if cues[axis]]
        if solution is not None:
            parts.append(self._fenced("solution", solution))
        parts.append(fence("reasoning", harmless(text)))
        if solution is not None:
            parts.append(fence("answer", harmless(row.get(_ANSWER) or "", _LONGEST_ANSWER)))
        parts.append("Grade the reasoning and the answer." if self.sees_solution else "Grade the reasoning.")
        words = "\n\n".join(parts)
        # Servers of text models often take only a string.
        content = [*pictures, text_block(words)] if pictures else words
        system = reasoning_system(axes, bool(pictures), self.sees_solution, self.free_grades)
        return Question([{"role": "system", "content": system}, {"role": "user", "content": content}], axes)

    def _pictures_of(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return blocks with a row's pictures, and those of its first video; none where it has nothing to see that counts."""
        videos = _listed(row.get(self.video_column))[:1]
        images = [file for column in IMAGE_COLUMNS for file in _listed(row.get(column))]
        tag = row.get(self.tag_column)
        hidden = tag and Modality.VIDEO not in ModalityTag.parse(tag).modalities
        if not self.frames or not (videos or images) or hidden:
            return []
        blocks = [text_block(f"{len(images)} picture(s) of the question:")] if images else []
        for file, show in [
            *((image, self._image_blocks) for image in images),
            *((v, self._clip_blocks) for v in videos),
        ]:
            place = self._opened.resolve(file)  # MediaError for what is no path
            shown = self._pictures.get(place)
            if shown is None:  # the cache need not have room for it
                shown = self._pictures[place] = show(file)
            blocks += shown
        return blocks

    @property
    def _opened(self) -> MediaLoader:
        if callable(self.loader):
            self.loader = self.loader()
        return self.loader

    def _image_blocks(self, image: str) -> list[dict[str, Any]]:
        return [image_block(self._opened.image(image, max_pixels=self.max_pixels).pixels)]

    def _clip_blocks(self, video: str) -> list[dict[str, Any]]:
        clip = self._opened.video(video, max_pixels=self.max_pixels)
        count = min(self.frames, len(clip.frames))
        chosen = [round(i * (len(clip.frames) - 1) / max(count - 1, 1)) for i in range(count)]
        times = ", ".join(f"{clip.timestamps[i]:.1f}" for i in chosen)
        return [
            text_block(f"{count} pictures of the clip, at {times} seconds:"),
            *(image_block(clip.frames[i]) for i in chosen),
        ]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value] if value else []
