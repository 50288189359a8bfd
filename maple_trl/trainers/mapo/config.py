"""Configuration of modality-aware policy optimization."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Annotated

from maple_trl.algorithms.advantages import SCOPES, lifts_equal_rewards
from maple_trl.algorithms.aggregation import AGGREGATIONS
from maple_trl.algorithms.curriculum import CURRICULA, FIXED_CURRICULA
from maple_trl.algorithms.difficulty import DIFFICULTIES
from maple_trl.algorithms.sampling import DYNAMIC_SAMPLING, REVISITS
from maple_trl.algorithms.schedule import GRANULARITIES, LEFTOVERS
from maple_trl.algorithms.weights import HISTORIES
from maple_trl.modalities import ModalityTag
from maple_trl.trainers.omni_grpo.config import OmniGRPOConfig


PRESETS = {
    "mapo": {
        "modality_access": "required",
        "batching": "stratified",
        "advantage_scope": "tag",
        "loss_strata": "tag",
    },
    "mupo": {"modality_access": "all", "batching": "mixed", "advantage_scope": "group", "loss_strata": "batch"},
}
SURROGATES = ("dapo", "cispo", "sapo", "vespo")
_AGGREGATION_OF_LOSS = {"grpo": "sample", "bnpo": "token", "dr_grpo": "prompt", "luspo": "prompt"}


@dataclass
class MAPOConfig(OmniGRPOConfig):
    r"""
    Configuration class for [`MAPOTrainer`].

    Adds to [`OmniGRPOConfig`] what MAPLE (arXiv 2602.11596) varies. `method` chooses the modality-aware method or the
    modality-unaware baseline by filling in `modality_access`, `batching`, `advantage_scope` and `loss_strata` where they
    are left at `None`.

    Raises:
        ValueError: for options that contradict each other, naming the fields.
    """

    _VALID_DICT_FIELDS = [*OmniGRPOConfig._VALID_DICT_FIELDS, "zero_shot_accuracy"]
    _presets = PRESETS

    method: str = field(
        default="mapo",
        metadata={
            "help": "Fills in the fields that are left at null: 'mapo' (each row its tag's signals, one tag a batch, "
            "advantages scaled within tags, the loss a sum of means over tags) or 'mupo' (every row all its signals, mixed "
            "batches, advantages per group, the loss one mean)."
        },
    )
    modality_access: str | None = field(
        default=None,
        metadata={"help": "What a row is fed: 'required' (the signals of its tag) or 'all'. Null: as method says."},
    )
    batching: str | None = field(
        default=None,
        metadata={"help": "'stratified': one tag a rollout; 'mixed': rows as they come. Null: as method says."},
    )
    advantage_scope: str | None = field(
        default=None,
        metadata={
            "help": "Centre and scale of a reward: 'group' (its prompt's mean and deviation), 'tag' (its prompt's mean, its "
            "tag's deviation), 'tag_whitened' (both its tag's), 'batch' (both the rollout's) or one of your own. Null: as method says."
        },
    )
    loss_strata: str | None = field(
        default=None,
        metadata={
            "help": "'tag': the loss is the weighted sum over tags of the mean over a tag's rows; 'batch': the mean over all "
            "rows. Null: as method says."
        },
    )
    loss_aggregation: str = field(
        default="sample",
        metadata={
            "help": "The mean over rows: 'token' (all tokens alike), 'sample' (mean over a completion, then over "
            "completions) or 'prompt' (sum over tokens / (completions x max_completion_length))."
        },
    )
    leftover: str = field(
        default="fill",
        metadata={
            "help": "A tag's last rows that are fewer than a batch: 'fill' takes further rows of the tag again (not in "
            "epochs that leave out prompts), 'mixed' puts those of all tags together at the end of the epoch, in batches that "
            "weigh as much as others: one mean, in which each row has its tag's weight."
        },
    )
    task_reward: str | None = field(
        default=None,
        metadata={
            "help": "Name of the reward function, with values in [0, 1], that says whether a task is solved: difficulty and "
            "accuracy come from it. Null: accuracy_reward, or the only one where difficulty is needed."
        },
    )
    difficulty: str = field(
        default="binary",
        metadata={
            "help": "KL divergence from a tag's rewards to near-perfect ones: 'binary' counts rewards equal to 1, "
            "'continuous' takes the histogram of rewards in [0, 1]."
        },
    )
    tag_weights: str = field(
        default="none",
        metadata={"help": "'none': every tag weighs 1; 'adaptive': sigmoid of how hard a tag is against the history."},
    )
    weight_history: str = field(
        default="pooled",
        metadata={
            "help": "What a tag's difficulty is held against: 'pooled' (all tags' past) or 'per_tag' (its own)."
        },
    )
    kl_window: int | None = field(
        default=None, metadata={"help": "Length of that history in KL values. Null: those of an epoch."}
    )
    curriculum: str = field(
        default="none",
        metadata={
            "help": "Order of stratified batches: 'none' (random), 'static' (one signal, two, three) or 'adaptive' (hardest "
            "tag first, by recent KL; tags not trained on yet by zero-shot accuracy), or one of your own."
        },
    )
    curriculum_granularity: str | None = field(
        default=None,
        metadata={
            "help": "'epoch': orders all batches of an epoch; 'cycle': orders rounds of one batch per tag. Null: 'epoch' with "
            "curriculum 'none' and 'static', otherwise 'cycle' (many updates in a row on the hardest tag, at the highest "
            "weight, cost accuracy)."
        },
    )
    curriculum_window: int = field(
        default=5, metadata={"help": "How many of a tag's last KL values make its priority."}
    )
    zero_shot_accuracy: dict[str, float] | str | None = field(
        default=None,
        metadata={
            "help": "Accuracy per tag before training, in [0, 1], as a mapping (in JSON on the command line), for the first "
            "epoch of the adaptive curriculum. Null: measured by a pass before training."
        },
    )
    zero_shot_questions: int = field(
        default=64, metadata={"help": "Most training prompts of each tag in that measurement."}
    )
    dynamic_sampling: str = field(
        default="none",
        metadata={
            "help": "Prompts whose completions were all rewarded alike leave the batch: 'none', 'early' (from the first step on) "
            "or 'mid' (from the second epoch on)."
        },
    )
    revisit: str = field(
        default="all",
        metadata={
            "help": "Which prompts later epochs visit under dynamic_sampling: 'all', 'unsolved' (those whose completions all "
            "had a task_reward of 1 rest for revisit_after epochs; those that were all wrong come again) or 'informative' "
            "(those that were all rewarded alike, right or wrong, do not come again)."
        },
    )
    revisit_after: int = field(
        default=1, metadata={"help": "How many epochs a solved prompt rests under revisit='unsolved'."}
    )
    refill_rounds: int = field(
        default=0,
        metadata={
            "help": "How often further prompts of the tag are drawn to fill a batch that lost groups. 0: never."
        },
    )
    gradient_probe: Annotated[int, "speed"] = field(
        default=0,
        metadata={
            "help": "Coordinates of the gradient from which its variance over steps is estimated, per tag. 0: off."
        },
    )
    gradient_probe_pattern: Annotated[str | None, "speed"] = field(
        default=None, metadata={"help": "Regular expression: the probe looks at parameters with such names alone."}
    )
    gradient_probe_window: Annotated[int, "speed"] = field(
        default=100, metadata={"help": "Steps over which the probe averages (exponentially)."}
    )
    cast_lm_head_to_fp32: bool = field(
        default=True, metadata={"help": "Compute the LM head in float32, so that rollout and training agree."}
    )

    def __post_init__(self):
        self._check_choice("method", tuple(self._presets))
        for name, value in self._presets[self.method].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.curriculum_granularity is None:
            self.curriculum_granularity = self._usual_granularity
        super().__post_init__()
        self._check_axes()

    @property
    def tag_aware(self) -> bool:
        """Whether tags decide which rows come when and what they weigh; each row needs one then."""
        return True

    def _check_axes(self) -> None:
        """Check MAPLE's options, alone and against each other."""
        for name, choices in {
            "batching": ("stratified", "mixed"),
            "advantage_scope": SCOPES,
            **({} if self.loss_strata is None else {"loss_strata": ("tag", "batch")}),
            "loss_aggregation": AGGREGATIONS,
            "leftover": LEFTOVERS,
            "difficulty": DIFFICULTIES,
            "tag_weights": ("none", "adaptive"),
            "weight_history": HISTORIES,
            "curriculum": CURRICULA,
            "curriculum_granularity": GRANULARITIES,
            "dynamic_sampling": DYNAMIC_SAMPLING,
            "revisit": REVISITS,
        }.items():
            self._check_choice(name, choices)
        for name, least in {
            "kl_window": 2,
            "curriculum_window": 1,
            "zero_shot_questions": 1,
            "refill_rounds": 0,
            "revisit_after": 1,
            "gradient_probe": 0,
            "gradient_probe_window": 2,
        }.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self._check_tags()
        if self.tag_aware:
            self._check_stratified_loss()
            self._check_loader()
        self._check_dynamic_sampling()
        self._check_unused_axes()

    @property
    def _usual_granularity(self) -> str:
        return "cycle" if self.orders_by_difficulty else "epoch"

    @property
    def orders_by_difficulty(self) -> bool:
        """Whether the curriculum looks at how hard tags are."""
        return self.curriculum not in FIXED_CURRICULA

    def _check_tags(self) -> None:
        if self.tag_weights == "adaptive" and self.loss_strata != "tag":
            raise ValueError("tag_weights='adaptive' weighs the tags of the loss: it needs loss_strata='tag'")
        if self.curriculum != "none" and self.batching != "stratified":
            raise ValueError(
                f"curriculum={self.curriculum!r} orders batches of one tag: it needs batching='stratified'"
            )
        if self.refill_rounds and self.dynamic_sampling == "none":
            raise ValueError(
                "refill_rounds fills batches that lost groups: it needs dynamic_sampling 'early' or 'mid'"
            )
        if self.revisit != "all" and self.dynamic_sampling == "none":
            raise ValueError(
                f"revisit={self.revisit!r} chooses what epochs that drop groups visit: it needs dynamic_sampling 'early' or "
                "'mid'"
            )
        if self.zero_shot_accuracy is None:
            return
        if not isinstance(self.zero_shot_accuracy, dict):
            raise ValueError(
                f"zero_shot_accuracy must be a mapping of tags to accuracies, got {self.zero_shot_accuracy!r}"
            )
        seen = set()
        for tag, accuracy in self.zero_shot_accuracy.items():
            try:
                known = ModalityTag.parse(tag)
            except ValueError as error:
                raise ValueError(f"zero_shot_accuracy: {error}") from error
            if known in seen:
                raise ValueError(f"zero_shot_accuracy: tag {known} is given twice")
            seen.add(known)
            if isinstance(accuracy, bool) or not isinstance(accuracy, int | float) or not 0 <= accuracy <= 1:
                raise ValueError(f"zero_shot_accuracy: {tag} must have an accuracy from 0 to 1, got {accuracy!r}")

    def _check_loss_type(self) -> None:
        if self.loss_type in _AGGREGATION_OF_LOSS:
            raise ValueError(
                f"loss_type={self.loss_type!r} chooses how the loss is averaged, which loss_aggregation does here: set "
                f"loss_aggregation={_AGGREGATION_OF_LOSS[self.loss_type]!r} and leave loss_type at 'dapo' (the clipped "
                "objective)"
            )
        if self.loss_type not in SURROGATES:
            raise ValueError(f"loss_type must be one of {', '.join(SURROGATES)}, got {self.loss_type!r}")

    def _check_stratified_loss(self) -> None:
        if self.scale_rewards not in ("group", True):
            raise ValueError(
                f"scale_rewards={self.scale_rewards!r} is replaced by advantage_scope; leave it at 'group'"
            )
        if self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError("multi_objective_aggregation must stay 'sum_then_normalize': advantage_scope normalises")
        if self.steps_per_generation % self.gradient_accumulation_steps:
            raise ValueError(
                f"steps_per_generation ({self.steps_per_generation}) must be a multiple of gradient_accumulation_steps "
                f"({self.gradient_accumulation_steps}): an optimizer step takes its rows from one rollout"
            )

    def _check_dynamic_sampling(self) -> None:
        if self.dynamic_sampling == "none":
            return
        if self.entropy_coef or self.use_adaptive_entropy or (self.loss_type == "sapo" and self.beta):
            raise ValueError(
                "entropy_coef, use_adaptive_entropy and beta with loss_type='sapo' average over full batches, which "
                "dynamic_sampling does not keep: switch one of the two off"
            )
        if lifts_equal_rewards(self.advantage_scope):
            raise ValueError(
                f"dynamic_sampling drops prompts whose completions were all rewarded alike, but with advantage_scope="
                f"{self.advantage_scope!r} those have a gradient too: choose 'tag' or 'group', or dynamic_sampling='none'"
            )
        if self.fp16:
            raise ValueError("fp16's gradient scaler fails on the steps that dynamic_sampling leaves empty: use bf16")

    def _check_unused_axes(self) -> None:
        """Refuse options that would silently do nothing."""
        defaults = {f.name: f.default for f in fields(self)}
        defaults["curriculum_granularity"] = self._usual_granularity
        by_difficulty = self.curriculum if self.orders_by_difficulty else "adaptive"
        for name, other, value in (
            ("revisit_after", "revisit", "unsolved"),
            ("kl_window", "tag_weights", "adaptive"),
            ("weight_history", "tag_weights", "adaptive"),
            ("curriculum_window", "curriculum", by_difficulty),
            ("zero_shot_accuracy", "curriculum", by_difficulty),
            ("zero_shot_questions", "curriculum", "adaptive"),
            ("curriculum_granularity", "batching", "stratified"),
            ("leftover", "batching", "stratified"),
        ):
            if getattr(self, name) != defaults[name] and getattr(self, other) != value:
                raise ValueError(f"{name}={getattr(self, name)!r} has no effect without {other}={value!r}")
        for name in ("gradient_probe_pattern", "gradient_probe_window"):
            if getattr(self, name) != defaults[name] and not self.gradient_probe:
                raise ValueError(f"{name} has no effect without gradient_probe, the number of coordinates")
        if self.gradient_probe_pattern is not None:
            try:
                re.compile(self.gradient_probe_pattern)
            except re.error as error:
                raise ValueError(f"gradient_probe_pattern is no regular expression: {error}") from error

    def _check_loader(self) -> None:
        """Refuse options that would undo what the schedule does."""
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must stay False: rewards and evaluation need every column")
        if self.ignore_data_skip:
            raise ValueError(
                "ignore_data_skip must stay False: the schedule knows where it stands, nothing is skipped"
            )
