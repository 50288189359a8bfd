"""RL post-training for language models that see video, hear audio and read subtitles."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar


__version__ = "0.1.0"

_EXPORTS = {
    "AvatarConfig": "maple_trl.trainers.avatar.config",
    "AvatarTrainer": "maple_trl.trainers.avatar.trainer",
    "MAPOConfig": "maple_trl.trainers.mapo.config",
    "MAPOTrainer": "maple_trl.trainers.mapo.trainer",
    "Modality": "maple_trl.modalities",
    "ModalityTag": "maple_trl.modalities",
    "OmniGRPOConfig": "maple_trl.trainers.omni_grpo.config",
    "OmniGRPOTrainer": "maple_trl.trainers.omni_grpo.trainer",
    "OmniPipeline": "maple_trl.evaluation.pipeline",
    "OmniSFTConfig": "maple_trl.trainers.omni_sft.config",
    "OmniSFTTrainer": "maple_trl.trainers.omni_sft.trainer",
}
__all__ = [
    "AvatarConfig",
    "AvatarTrainer",
    "MAPOConfig",
    "MAPOTrainer",
    "Modality",
    "ModalityTag",
    "OmniGRPOConfig",
    "OmniGRPOTrainer",
    "OmniPipeline",
    "OmniSFTConfig",
    "OmniSFTTrainer",
]

if TYPE_CHECKING:
    from importlib.metadata import EntryPoints

    from maple_trl.evaluation.pipeline import OmniPipeline
    from maple_trl.modalities import Modality, ModalityTag
    from maple_trl.trainers.avatar.config import AvatarConfig
    from maple_trl.trainers.avatar.trainer import AvatarTrainer
    from maple_trl.trainers.mapo.config import MAPOConfig
    from maple_trl.trainers.mapo.trainer import MAPOTrainer
    from maple_trl.trainers.omni_grpo.config import OmniGRPOConfig
    from maple_trl.trainers.omni_grpo.trainer import OmniGRPOTrainer
    from maple_trl.trainers.omni_sft.config import OmniSFTConfig
    from maple_trl.trainers.omni_sft.trainer import OmniSFTTrainer

# Modules that had another name before; it goes on leading to them.
_MOVED = {
    "data.hint_tables": "data.row_tables",
    "eval_job": "jobs.evaluate",
    "eval_judge": "jobs.scoring",
    "eval_models": "jobs.models",
    "evaluation.asking": "evaluation.base",
    "evaluation.clip_intervals": "metrics.clip_intervals",
    "evaluation.clips": "metrics.clips",
    "evaluation.eval_identity": "evaluation.identity",
    "evaluation.eval_options": "evaluation.options",
    "evaluation.eval_results": "evaluation.results",
    "evaluation.eval_sampling": "evaluation.sampling",
    "evaluation.eval_store": "records.evaluations",
    "evaluation.fed": "evaluation.inputs",
    "evaluation.gaps": "metrics.gaps",
    "evaluation.hf_metrics": "metrics.hf_metrics",
    "evaluation.intervals": "metrics.intervals",
    "evaluation.lmms_bridge": "integrations.lmms_bridge",
    "evaluation.lmms_model": "integrations.lmms_model",
    "evaluation.metrics": "metrics.accuracy",
    "evaluation.plots": "reports.plots",
    "evaluation.significance": "metrics.significance",
    "evaluation.spread": "metrics.spread",
    "job_args": "jobs.options",
    "job_checks": "jobs.checks",
    "job_data": "jobs.data",
    "job_rewards": "jobs.rewards",
    "job_tables": "jobs.tables",
    "omni.scopes": "modalities",
    "reports.hidden_states": "reports.embeddings",
    "reports.page": "reports.report",
    "reports.rollout_files": "records.rollouts",
    "rewards.signatures": "rewards.routing",
    "trainers.avatar_checks": "trainers.avatar.checks",
    "trainers.avatar_config": "trainers.avatar.config",
    "trainers.avatar_metrics": "trainers.avatar.metrics",
    "trainers.avatar_state": "trainers.avatar.state",
    "trainers.lookahead": "trainers.common.samplers",
    "trainers.mapo_config": "trainers.mapo.config",
    "trainers.omni_grpo_config": "trainers.omni_grpo.config",
    "trainers.omni_sft_config": "trainers.omni_sft.config",
    "trainers.quarantine_callback": "trainers.common.quarantine",
    "trainers.rollout_clock": "trainers.common.samplers",
    "trainers.rounds": "trainers.common.rollout",
    "trainers.rollout_state": "trainers.common.checkpoint",
    "trainers.stratified_sampler": "trainers.common.samplers",
    "trainers.tracking_callback": "integrations.tracking",
    "trainers.trl_bridge": "trainers.common.trl_compat",
}
# Into a folder, under the same name.
_INTO_FOLDERS = (
    ("", "jobs", "declared stages"),
    ("", "records", "run_folder"),
    ("omni", "omni.media", "clips containers decode decoder_process formats sampling subtitles tasks wire"),
    ("omni", "omni.media", "workers"),
    ("omni", "omni.prefix", "growing_cache packed_attention shared_prefill shared_prefix sharing"),
    ("trainers", "trainers.avatar", "gradient_terms replay_memory"),
    ("trainers", "trainers.common", "hinted_rows learning_checks media_config media_trainer quarantine"),
    ("trainers", "trainers.common", "resume_checks rollout_log rows run_errors"),
    ("trainers", "trainers.common", "run_summary tag_metrics updates"),
    ("trainers", "trainers.mapo", "zero_shot"),
)
_MOVED |= {
    f"{before}.{name}".lstrip("."): f"{now}.{name}" for before, now, names in _INTO_FOLDERS for name in names.split()
}


class _FormerNames(MetaPathFinder, Loader):
    """Finds a module under the name that it had before: the same object, not a second one."""

    def __init__(self, moved: dict[str, str]):
        self.moved = {f"{__name__}.{before}": f"{__name__}.{now}" for before, now in moved.items()}

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in self.moved else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self.moved[spec.name])
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = module.__spec__.loader_state  # its own, which the import system has just replaced


sys.meta_path.insert(0, _FormerNames(_MOVED))


def lazy_names(package: str, places: dict[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """
    Return `__getattr__` and `__dir__` for a package that imports its names when they are first used.

    Torch and TRL take seconds, which `maple-trl --help` should not.
    """

    def get(name: str) -> Any:
        if name in places:
            return getattr(importlib.import_module(places[name]), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get, lambda: sorted([*vars(sys.modules[package]), *places])


__getattr__, __dir__ = lazy_names(__name__, _EXPORTS)


_T = TypeVar("_T")


class ExtensionError(ValueError):
    """What an installed package adds cannot be used; the message says what it is, of which package, and why."""


class Registry(Mapping[str, _T]):
    """
    Everything of one kind by name: what is registered here, and what installed packages offer as entry points.

    Names are read from the packages' metadata; a package is imported when one of its names is asked for.

    Args:
        what (`str`): how errors call one of the kind.
        group (`str`): of the entry points.
        ours (`Mapping`, *optional*): those that are there from the beginning.
        fits (`Callable`, *optional*, defaults to `callable`): whether an object is of the kind.
    """

    def __init__(
        self, what: str, group: str, ours: Mapping[str, _T] | None = None, fits: Callable[[Any], bool] = callable
    ):
        self.what, self.group, self.fits = what, group, fits
        self._found: dict[str, _T] = dict(ours or {})

    def register(self, name: str, replace: bool = False) -> Callable[[_T], _T]:
        """
        Return a decorator that makes something known under a name.

        Args:
            replace (`bool`, *optional*, defaults to `False`): take the place of what has the name.

        Raises:
            ValueError: for a name that something has.
        """

        def add(found: _T) -> _T:
            if name in self._found and not replace:
                raise ValueError(
                    f"the {self.what} {name!r} is there already; choose another name, or say replace=True"
                )
            self._found[name] = found
            return found

        return add

    def find(self, name: str) -> _T:
        """
        Return what has a name.

        Raises:
            ValueError: where nothing has, listing the names that there are; an [`ExtensionError`] where it cannot be used.
        """
        try:
            return self[name]
        except KeyError:
            raise ValueError(f"Unknown {self.what} {name!r}; choose one of {', '.join(self)}") from None

    def __getitem__(self, name: str) -> _T:
        if name not in self._found:
            self._load(name)
        return self._found[name]

    def __contains__(self, name: object) -> bool:
        """Also load it: options are held against names before a run begins, which is the time to say what is wrong."""
        if not isinstance(name, str):
            return False
        self._load(name)
        return name in self._found

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())

    def _names(self) -> list[str]:
        return list(dict.fromkeys([*self._found, *sorted(_entry_points().select(group=self.group).names)]))

    def _load(self, name: str) -> None:
        for entry in _entry_points().select(group=self.group, name=name):
            told = f"the {self.what} {name!r} of the package {getattr(entry.dist, 'name', '')} ({entry.value})"
            try:
                offered = entry.load()
            except (Exception, SystemExit) as error:  # the module is the user's: importing it can fail in any way
                raise ExtensionError(f"{told} cannot be loaded: {type(error).__name__}: {error}") from error
            if not self.fits(offered):
                raise ExtensionError(f"{told} is none: it is {type(offered).__name__}")
            if self._found.setdefault(name, offered) is not offered:
                raise ExtensionError(f"{told}: there is another one of this name")


def _entry_points() -> EntryPoints:
    """Return what installed packages offer: read once, and again after something was installed or the path has changed."""
    return _read_entry_points(tuple((place, _changed_at(place)) for place in sys.path))


@lru_cache(maxsize=1)
def _read_entry_points(places: tuple[tuple[str, int], ...]) -> EntryPoints:
    from importlib.metadata import entry_points

    return entry_points()


def _changed_at(place: str) -> int:
    try:
        return os.stat(place or os.curdir).st_mtime_ns
    except OSError:
        return 0
