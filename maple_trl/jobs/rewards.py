"""The rewards of a training job: what `rewards` may say in a YAML file, how it is checked, and what is built from it."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from maple_trl.jobs.errors import SetupError
from maple_trl.messages import did_you_mean
from maple_trl.records.options import KEY_NAMES, not_deciding


if TYPE_CHECKING:
    from maple_trl.trainers.omni_grpo.config import OmniGRPOConfig

# Rewards that take parameters: a class stands behind their names.
MADE = ("length_reward", "answer_judge", "caption_judge", "stepwise_reasoning_judge")
# Functions that may be given parameters, and the class that takes them.
WITH_PARAMETERS = {
    "accuracy_reward": "AccuracyReward",
    "object_place_reward": "ObjectPlaceReward",
    "self_consistency_reward": "SelfConsistencyReward",
}
JUDGES = ("answer_judge", "caption_judge", "stepwise_reasoning_judge")

_COMMON = ("reward", "name", "tags", "rows", "contrastive")
# What `name` and the rest of an entry say about parameters of a judge's class.
_NOT_OF_A_FILE = {"self", "scorer", "name", "loader", "kwargs"}
# Parameters that say how fast an answer comes, and not what it is. Those of a server say so themselves.
_SPEED = {"local": {"device", "batch_size"}, "contrastive": {"device", "batch_size", "cache_size"}}
_WATCHING = {"max_failure_rate", "min_requests"}


# What a file may say


def read_entries(rewards: Any, place: str = "rewards") -> list[str | dict[str, Any]]:
    """
    Check the entries of `rewards` as far as that goes without reading keys and loading models.

    Args:
        rewards (`list`):
            Names, and mappings or their JSON: `reward` (a name, or one of `MADE`), and

            - `tags`, a list of modality tags, or `rows`, a mapping of one column to a list of values: rows that it is for;
            - `contrastive`, a mapping with `alpha`, `tau` and arguments of [`~maple_trl.rewards.BertScoreSimilarity`];
              the model `builtin:words` compares words and needs none;
            - `name`, by which it is logged;
            - for `accuracy_reward` `answer_format`, how completions mark their answer, and `text_scores`, which kinds of
              free-text answers are graded by word errors or ROUGE;
            - for `self_consistency_reward` `answer_format`;
            - for `object_place_reward` `object_weight` and `synonyms`;
            - for a judge `server`, a mapping of [`~maple_trl.chat.ChatOptions`], or `local`, one of arguments of
              [`~maple_trl.rewards.LocalScorer`];
            - parameters of the class.
        place (`str`, *optional*, defaults to `"rewards"`):
            What errors begin with.

    Raises:
        SetupError: naming the entry and its field.
    """
    if not isinstance(rewards, Sequence) or isinstance(rewards, str):
        raise SetupError(f"{place} must be a list of rewards, got {type(rewards).__name__}")
    entries = []
    for number, entry in enumerate(rewards, start=1):
        where = f"{place}, entry {number}"
        if isinstance(entry, str) and entry.lstrip().startswith("{"):
            entry = entry_of_json(entry, where)
        if isinstance(entry, Mapping):
            entry = dict(entry)
            _Entry(entry, where).check()
        elif not isinstance(entry, str) or not entry.strip():
            raise SetupError(
                f"{where} must be the name of a reward, or a mapping such as {{reward: accuracy_reward, tags: [V]}}; got "
                f"{type(entry).__name__}"
            )
        entries.append(entry)
    return entries


def entry_of_json(text: str, where: str) -> Any:
    """Read an entry that a command line gives as JSON; SetupError for a text that is none."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise SetupError(f"{where} is no JSON object: {error}") from error


def what_is_learned(entries: Sequence[str | Mapping[str, Any]]) -> list[str | dict[str, Any]]:
    """
    Return the entries without what may change while a run is stopped and does not change what it learns.

    That is a server's address, rates and time-outs, devices, limits of failures.
    """
    from maple_trl.chat import ChatOptions

    found = []
    for entry in entries:
        if isinstance(entry, Mapping):
            kept = {name: value for name, value in entry.items() if name not in _WATCHING}
            for part, ways in {"server": not_deciding(ChatOptions), **_SPEED}.items():
                if isinstance(kept.get(part), Mapping):
                    kept[part] = {name: value for name, value in kept[part].items() if name not in ways}
            entry = kept
        found.append(entry)
    return found


# What is built


def load_rewards(
    entries: Sequence[str | Mapping[str, Any]], args: OmniGRPOConfig | None = None, place: str = "rewards"
) -> list[Callable]:
    """
    Build the reward functions of a job.

    Args:
        entries (`Sequence`):
            What [`read_entries`] takes.
        args ([`OmniGRPOConfig`], *optional*):
            The job's configuration: where judges that are shown pictures find the clips, when they first ask for one.
        place (`str`, *optional*, defaults to `"rewards"`):
            What errors begin with.

    Raises:
        SetupError: for a name that leads to no function (listing those that there are), a key that cannot be read, and
            two rewards with one name; else as [`read_entries`].
    """
    from trl.trainer.utils import get_callable_name

    loader = None if args is None else args.media_loader
    found: list[Callable] = []
    for number, entry in enumerate(read_entries(entries, place), start=1):
        if isinstance(entry, str) and entry not in MADE:
            found.append(_find(entry))
            continue
        entry = {"reward": entry} if isinstance(entry, str) else entry
        found.append(_Entry(entry, f"{place}, entry {number}").build(loader))
    names = [get_callable_name(reward) for reward in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise SetupError(f"{place}: two rewards are called {twice!r}, and would be logged as one; give one a `name`")
    return found


def close_rewards(rewards: Sequence[Callable]) -> None:
    """Close connections, caches and models of the judges among reward functions, also of wrapped ones."""
    from maple_trl.rewards.judge import inner_judge

    for judge in map(inner_judge, rewards):
        if judge is not None:
            judge.close()


class _Entry:
    """
    One entry of `rewards` that is a mapping.

    Args:
        entry (`Mapping`): the entry.
        where (`str`): what errors begin with.
    """

    def __init__(self, entry: Mapping[str, Any], where: str):
        self.entry, self.where = entry, where
        self.reward = entry.get("reward")

    def check(self) -> None:
        """Raise SetupError for what is wrong."""
        if not isinstance(self.reward, str) or not self.reward.strip():
            raise SetupError(f"{self.where} needs `reward`: one of {', '.join(_known())}, or module:function")
        if self.reward not in _known() and ":" not in self.reward:
            raise SetupError(f"{self.where}: {_unknown_reward(self.reward)}")
        self.where += f" ({self.reward})"
        own = [*_parameters(self.reward), *(("server", "local") if self.reward in JUDGES else ())]
        self._check_fields(self.entry, [*_COMMON, *own], self.where)
        self._check_name()
        if "tags" in self.entry and "rows" in self.entry:
            raise SetupError(
                f"{self.where}: tags and rows cannot be used together; rows: {{tag: [...]}} says the same"
            )
        # Built with nothing behind it, so that the classes themselves say what is out of range.
        reward = self._make(_Nothing()) if self._is_made else _stand_in
        self._route(self._contrast(reward))

    def build(self, loader: Callable | None) -> Callable:
        """Build the reward function."""
        self.check()
        reward = self._make(None, loader) if self._is_made else self._guarded("", _find, self.reward)
        return self._route(self._contrast(reward))

    # Parts

    @property
    def _is_made(self) -> bool:
        """Whether a class makes the reward; a plain function that is given parameters is made, too."""
        return self.reward in MADE or any(name in self.entry for name in _parameters(self.reward))

    def _make(self, scorer: Any, loader: Any = None) -> Callable:
        """Make what `reward` names, for what takes parameters; `scorer`, if given, replaces the judge's own."""
        from maple_trl import rewards

        values = {name: self.entry[name] for name in _parameters(self.reward) if name in self.entry}
        if self.reward in WITH_PARAMETERS:
            reward = self._guarded("", getattr(rewards, WITH_PARAMETERS[self.reward]), **values)
            reward.__name__ = self.entry.get("name", self.reward)
            return reward
        if self.reward not in JUDGES:
            missing = [name for name in ("soft_limit", "hard_limit") if not _is_whole(values.get(name))]
            if missing:
                raise SetupError(f"{self.where}: {missing[0]} must be a whole number of tokens")
            reward = self._guarded("", rewards.REWARDS[self.reward], **values)
            if "name" in self.entry:
                reward.__name__ = self.entry["name"]
            return reward
        own = self._scorer()
        if values.get("frames"):
            values["loader"] = loader or _Nothing()
        if "name" in self.entry:
            values["name"] = self.entry["name"]
        return self._guarded("", rewards.REWARDS[self.reward], own if scorer is None else scorer, **values)

    def _scorer(self) -> Any:
        """Return the options of the judge's server, or its local scorer."""
        from maple_trl.chat import ChatOptions
        from maple_trl.rewards import LocalScorer

        given = [name for name in ("server", "local") if name in self.entry]
        if len(given) != 1:
            raise SetupError(
                f"{self.where} needs either `server` (model, base_url, …) or `local` (model, …): who is to judge"
            )
        (part,) = given
        kind = ChatOptions if part == "server" else LocalScorer
        values = self._mapping(part, list(inspect.signature(kind).parameters))
        if not values.get("model"):
            raise SetupError(f"{self.where}, {part}: model is missing")
        return self._guarded(f", {part}", kind, **values)

    def _contrast(self, reward: Callable) -> Callable:
        """Wrap the reward where the entry says `contrastive`."""
        if "contrastive" not in self.entry:
            return reward
        from maple_trl.rewards import BertScoreSimilarity, ContrastiveRewardWeighting
        from maple_trl.rewards.similarity import BUILTIN_SIMILARITY, word_similarity

        of_model = list(inspect.signature(BertScoreSimilarity).parameters)
        values = self._mapping("contrastive", ["alpha", "tau", *of_model])
        for name in ("alpha", "tau"):
            if isinstance(values.get(name), bool) or not isinstance(values.get(name), int | float):
                raise SetupError(f"{self.where}, contrastive: {name} must be a number")
        settings = {name: values[name] for name in of_model if name in values}
        if settings.get("model") == BUILTIN_SIMILARITY:
            if len(settings) > 1:
                idle = next(name for name in settings if name != "model")
                raise SetupError(f"{self.where}, contrastive: {idle} has no effect with {BUILTIN_SIMILARITY}")
            similarity = word_similarity
        else:
            similarity = self._guarded(", contrastive", BertScoreSimilarity, **settings)
        return self._guarded(
            ", contrastive",
            ContrastiveRewardWeighting,
            reward,
            values["alpha"],
            values["tau"],
            similarity,
            name=self.entry.get("name"),
        )

    def _route(self, reward: Callable) -> Callable:
        """Limit the reward to the rows that the entry names."""
        from maple_trl.rewards import for_rows, for_tags

        name = self.entry.get("name")
        if "tags" in self.entry:
            return self._guarded(", tags", for_tags, reward, self._values("tags", self.entry["tags"]), name)
        if "rows" in self.entry:
            rows = self.entry["rows"]
            if not isinstance(rows, Mapping) or len(rows) != 1:
                raise SetupError(f"{self.where}: rows must map one column to a list of values, e.g. {{kind: [when]}}")
            ((column, values),) = rows.items()
            return self._guarded(", rows", for_rows, reward, column, self._values("rows", values), name)
        return reward

    # Checks

    def _check_name(self) -> None:
        name = self.entry.get("name")
        if "name" in self.entry and (not isinstance(name, str) or not name.strip()):
            raise SetupError(f"{self.where}: name must be a text, by which the reward is logged")
        if name and not self._is_made and not {"tags", "rows", "contrastive"} & set(self.entry):
            raise SetupError(
                f"{self.where}: name has no effect on a function of its own; it is for judges, length_reward, and with tags, "
                "rows or contrastive"
            )

    def _mapping(self, part: str, known: Sequence[str]) -> dict[str, Any]:
        values = self.entry[part]
        if not isinstance(values, Mapping):
            raise SetupError(f"{self.where}: {part} must be a mapping of {', '.join(known[:3])}, …")
        self._check_fields(values, known, f"{self.where}, {part}")
        return dict(values)

    def _values(self, field: str, values: Any) -> list:
        if not isinstance(values, list) or any(isinstance(value, list | dict) for value in values):
            raise SetupError(f"{self.where}: {field} takes a list of values, e.g. [V, VA]")
        return values

    def _check_fields(self, values: Mapping, known: Sequence[str], where: str) -> None:
        for name in values:
            if name in known:
                continue
            if str(name).lower() in KEY_NAMES:  # its value is not shown
                raise SetupError(
                    f"{where}: {name!r} is no field: a key stands in no job's file. Name the environment variable that holds "
                    "it with api_key_env, or a file with api_key_file"
                )
            advice = did_you_mean(str(name), known, f"the fields are {', '.join(known)}")
            raise SetupError(f"{where}: unknown field {name!r}{advice}")

    def _guarded(self, part: str, make: Callable, *args: Any, **kwargs: Any) -> Any:
        """Make what `make` makes, with the entry's place in its errors."""
        try:
            return make(*args, **kwargs)
        except (ValueError, TypeError, ImportError) as error:
            raise SetupError(f"{self.where}{part}: {error}") from error


def _known() -> list[str]:
    from maple_trl.rewards import REWARDS

    return list(REWARDS)


def _unknown_reward(name: str) -> str:
    known = _known()
    advice = did_you_mean(name, known)
    return f"unknown reward {name!r}; there are {', '.join(known)}, or write module:function{advice}"


def _parameters(reward: str) -> list[str]:
    """Return the fields of an entry that are parameters of the class behind its reward."""
    from maple_trl import rewards

    if reward in WITH_PARAMETERS:
        return list(inspect.signature(getattr(rewards, WITH_PARAMETERS[reward])).parameters)
    if reward not in MADE:
        return []
    found = list(inspect.signature(rewards.REWARDS[reward]).parameters)
    if reward in JUDGES:
        found += inspect.signature(rewards.OpenAIJudge.__init__).parameters
    return [name for name in dict.fromkeys(found) if name not in _NOT_OF_A_FILE]


def _find(name: str) -> Callable:
    """Find the function that a name leads to: a known one, or `module:function`."""
    from maple_trl import ExtensionError
    from maple_trl.rewards import REWARDS

    try:
        if name in REWARDS:
            return REWARDS[name]
    except ExtensionError as error:
        raise SetupError(str(error)) from error
    module_name, _, function_name = name.partition(":")
    if not function_name:
        raise SetupError(_unknown_reward(name))
    if os.getcwd() not in sys.path:  # a console script's sys.path starts at its own folder
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (Exception, SystemExit) as error:  # the module is the user's: importing it can fail in any way
        raise SetupError(
            f"cannot load the reward {name!r}: {type(error).__name__}: {error}; name a function of yours as "
            "module:function, from the current folder or an installed package"
        ) from error
    if not callable(function):
        raise SetupError(f"the reward {name!r} is no function but {type(function).__name__}")
    return function


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _stand_in(**columns: Any) -> list[None]:
    """Stand in for a function while its entry is checked."""
    return [None] * len(columns["completions"])


@dataclasses.dataclass
class _Nothing:
    """Takes the place of a judge's server and clips while its entry is checked."""

    usage: Any = None

    def complete_many(self, requests: Sequence) -> list:
        raise NotImplementedError
