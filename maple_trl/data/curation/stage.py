"""A stage: a function from a row to rows, and what decides its result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maple_trl.data.curation.asking import Ask, Asker, Planner, Told
from maple_trl.data.curation.asr import Transcriber
from maple_trl.data.curation.config import CurationConfig
from maple_trl.data.curation.prompts import Prompt
from maple_trl.files import digest
from maple_trl.omni.media.loader import MediaLoader
from maple_trl.omni.media.sampling import MediaLimits


Row = dict[str, Any]


@dataclass
class Outcome:
    """
    What became of a row.

    Attributes:
        rows: what goes on.
        dropped: what does not: its name, reason and detail.
        notes: what else is counted.
    """

    rows: list[Row] = field(default_factory=list)
    dropped: list[tuple[str, str, str]] = field(default_factory=list)
    notes: Counter = field(default_factory=Counter)

    def drop(self, name: str, reason: str, detail: str = "") -> None:
        """Leave something out by name."""
        self.dropped.append((name, reason, detail[:500]))


class Tools:
    """
    What the functions of stages work with.

    Args:
        config (`CurationConfig`): all settings.
        source_root (`Path`): folder of the clips.
        asker (`Asker` or `Planner`): asks, or counts.
    """

    def __init__(self, config: CurationConfig, source_root: Path, asker: Asker | Planner):
        self.config, self.source_root, self.asker = config, source_root, asker
        self._loader: MediaLoader | None = None
        self.transcriber = Transcriber(config.split.asr) if config.split.asr else None

    @property
    def root(self) -> Path:
        """The output folder, below which all files lie that rows name after the split."""
        return Path(self.config.output)

    @property
    def planning(self) -> bool:
        """Whether nothing is sent, and no file made."""
        return isinstance(self.asker, Planner)

    @property
    def loader(self) -> MediaLoader:
        """What reads the source."""
        if self._loader is None:
            split = self.config.split
            limits = MediaLimits(
                num_frames=split.frames,
                max_frames=max(64, split.frames),
                min_pixels=min(4 * 28 * 28, split.max_pixels),
                max_pixels=split.max_pixels,
                max_seconds=self.config.source.max_seconds,
            )
            self._loader = MediaLoader(self.source_root, limits, cache_bytes=1 << 20, workers=split.workers)
        return self._loader

    async def ask(self, stage: str, endpoint: str, ask: Ask, outcome: Outcome) -> Told:
        """Ask a server, and note a repair."""
        told = await self.asker.ask(stage, endpoint, ask)
        outcome.notes["repaired"] += told.repaired and told.problem is None
        return told

    def close(self) -> None:
        """Close connections and decoders."""
        self.asker.close()
        if self._loader is not None:
            self._loader.close()


@dataclass(frozen=True)
class Stage:
    """
    One stage.

    Attributes:
        name: of its command line word, its log and its counts.
        after: the stage whose rows it takes.
        work: from a row to an [`Outcome`].
        name_of: a row's name in what is told of it.
        units: from the rows of the stage before to its own.
        prompts, endpoints, decides: all besides a row that its outcome follows from.
        intact: whether what an outcome names is still there.
        join: from the rows of all its outcomes to those that go on, and those that do not.
    """

    name: str
    after: str | None
    work: Callable[[Row, Tools], Awaitable[Outcome]]
    name_of: Callable[[Row], str] = lambda row: row["clip"]
    units: Callable[[Sequence[Row], CurationConfig], list[Row]] = lambda rows, config: list(rows)
    prompts: tuple[Prompt, ...] = ()
    endpoints: Callable[[CurationConfig], Sequence[str]] = lambda config: ()
    decides: Callable[[CurationConfig], Any] = lambda config: None
    intact: Callable[[Sequence[Row], Path], bool] = lambda rows, root: True
    join: Callable[[list[Row], CurationConfig], Outcome] = lambda rows, config: Outcome(rows)

    def identity(self, config: CurationConfig) -> list[Any]:
        """Return all besides a row that its outcome follows from."""
        options = dict(config.endpoints())
        servers = [[name, options[name].model, dict(options[name].sampling)] for name in self.endpoints(config)]
        return [self.name, [prompt.digest for prompt in self.prompts], servers, self.decides(config)]

    def key(self, unit: Row, identity: list[Any]) -> str:
        """Return the digest under which the outcome of a row is kept."""
        return digest([identity, unit])
