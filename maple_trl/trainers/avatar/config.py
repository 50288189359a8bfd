"""Configuration of AVATAR."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field, fields
from typing import Annotated

from maple_trl.algorithms.advantages import lifts_equal_rewards
from maple_trl.algorithms.experience import experience_bytes
from maple_trl.algorithms.replay import StratifiedReplayBuffer
from maple_trl.algorithms.replay_draws import DRAWS
from maple_trl.algorithms.replay_tiers import QUANTILES, SHARES
from maple_trl.algorithms.shaping import SHAPES
from maple_trl.omni.host_memory import readable
from maple_trl.trainers.avatar.replay_memory import REPLAY_SCOPES
from maple_trl.trainers.mapo.config import PRESETS, SURROGATES, MAPOConfig
from maple_trl.trainers.omni_grpo.config import OmniGRPOConfig


logger = logging.getLogger(__name__)

_NEUTRAL = {"modality_access": "required", "batching": "mixed", "advantage_scope": "group"}
_MIXABLE_LOSSES = ("dapo", "grpo", "dr_grpo", "cispo", "sapo")
# Clips that a loss does not read: sapo has none, cispo one of large ratios alone.
_UNREAD_CLIPS = {"sapo": ("replay_epsilon", "replay_epsilon_high"), "cispo": ("replay_epsilon",)}
_SHAPEABLE_LOSSES = (*_MIXABLE_LOSSES, "bnpo")


@dataclass
class AvatarConfig(MAPOConfig):
    r"""
    Configuration class for [`AvatarTrainer`].

    Adds to GRPO what AVATAR (arXiv 2508.03100) adds: replayed completions in each group, their baseline, the shaping of
    advantages over token positions, and hints. With `replayed_generations=0` and `tas_lambda=0` it is GRPO.

    What [`MAPOConfig`] varies can be varied here too, and does nothing by itself: `method="mapo"` switches MAPLE's method
    on, and each of its options can be set alone.

    Raises:
        ValueError: for options that contradict each other, naming the fields.
    """

    _VALID_DICT_FIELDS = [*MAPOConfig._VALID_DICT_FIELDS, "replay_shares"]
    _presets = {"avatar": _NEUTRAL, **PRESETS}

    method: str = field(
        default="avatar",
        metadata={
            "help": "Fills in what MAPLE varies where it is left at null: 'avatar' (nothing: mixed batches, advantages per group, "
            "TRL's loss), 'mapo' or 'mupo' (as in MAPOConfig)."
        },
    )
    loss_strata: str | None = field(
        default=None,
        metadata={
            "help": "Over which rows of an optimizer step the loss is a mean: 'tag' (a weighted sum over tags of the mean over "
            "each) or 'batch', fresh and replayed completions apart. Null: as method says; with 'avatar' TRL's loss_type "
            "says it, or 'batch' where curriculum, curriculum_granularity, dynamic_sampling or leftover is set."
        },
    )
    cast_lm_head_to_fp32: bool = field(
        default=False, metadata={"help": "Compute the LM head in float32, so that rollout and training agree."}
    )

    replayed_generations: int = field(
        default=4,
        metadata={
            "help": "How many of a group's num_generations completions are replayed from the buffer, as far as it holds so "
            "many that replay_scope allows; only the others are generated. 0: no replay."
        },
    )
    replay_scope: str = field(
        default="tiers",
        metadata={
            "help": "Which completions a group replays. 'tiers': of any prompts, by tier in proportion to replay_shares, so "
            "that hard prompts come back; each such completion passes its own prompt through the model and is held against "
            "that prompt's own baseline. 'prompt': those of its own prompt alone, for which tiers have no effect on a draw "
            "(an ablation, and for streamed rows). 'buffer': those of its own prompt, and where these do not suffice "
            "others by tier."
        },
    )
    replay_draw: str = field(
        default="uniform",
        metadata={
            "help": "Which completions of a tier (or of a prompt) are replayed. 'uniform': any; 'balanced': as many above as below "
            "their prompt's baseline, as far as there are; 'diverse': first those whose reward differs from the "
            "prompt's fresh ones (from its baseline, where the prompt is not visited); 'priority': with a chance in proportion "
            "to the size of the advantage."
        },
    )
    replay_alpha: float = field(
        default=1.0,
        metadata={"help": "Weight of the replayed completions' loss beside that of the fresh ones (AVATAR eq. 3)."},
    )
    replay_epsilon: float | None = field(
        default=None, metadata={"help": "Lower clip of replayed completions' ratios. Null: epsilon."}
    )
    replay_epsilon_high: float | None = field(
        default=None, metadata={"help": "Upper clip of replayed completions' ratios. Null: epsilon_high."}
    )
    replay_advantage_limit: float = field(
        default=5.0,
        metadata={
            "help": "Advantages of replayed completions are cut to this size, for nearly equal rewards blow up."
        },
    )
    replay_capacity: int = field(default=10_000, metadata={"help": "Completions that the buffer holds at most."})
    replay_shares: dict[str, float] | str | None = field(
        default=None,
        metadata={
            "help": "Share of the capacity of the tiers easy, medium and hard, as a mapping (in JSON on the command line). "
            "Null: 0.25, 0.35 and 0.40."
        },
    )
    replay_quantiles: list[float] | None = field(
        default=None,
        metadata={
            "help": "Share of the prompts that are Hard, and that of those that are Hard or Medium. Null: 0.4 and 0.75."
        },
    )
    replay_min_size: int = field(
        default=1, metadata={"help": "Nothing is replayed while the buffer holds fewer completions."}
    )
    replay_max_age: int | None = field(
        default=None,
        metadata={"help": "Completions written more than so many optimizer steps ago are dropped. Null: no limit."},
    )
    replay_retier: bool = field(
        default=False,
        metadata={
            "help": "Move stored completions along when their prompt changes its tier. Otherwise new ones alone go to the "
            "new tier, as in the paper."
        },
    )
    replay_recovery: str = field(
        default="refuse",
        metadata={
            "help": "A resumed run whose replay buffer is damaged or belongs to other data or another tokenizer: 'refuse', or "
            "go on with an 'empty' one."
        },
    )
    replay_gradient_steps: Annotated[int, "speed"] = field(
        default=10,
        metadata={
            "help": "At every so many optimizer steps, beginning with the second, log the norms of the gradients of the fresh and "
            "of the replayed completions' loss apart. Such a step takes two more backward passes and memory for two more "
            "gradients of the trained parameters; what is trained stays the same to the last bit. Left out where parameters "
            "are sharded (FSDP, DeepSpeed). 0: never."
        },
    )
    vcrs_window: int = field(
        default=20, metadata={"help": "A prompt's baseline is the mean of so many of its last on-policy rewards."}
    )
    tas_lambda: float = field(
        default=0.3,
        metadata={
            "help": "How much more the first and last tokens of a completion count than its middle. 0: all count alike. The "
            "default is that of AVATAR's authors."
        },
    )
    tas_shape: str = field(
        default="parabolic", metadata={"help": f"Weight over the tokens' positions: {', '.join(SHAPES)}."}
    )
    advantage_group: str = field(
        default="fresh",
        metadata={
            "help": "Whose rewards centre and scale those of the fresh completions: the group's 'fresh' ones, or 'mixed', all "
            "of the group that are of its prompt."
        },
    )
    advantage_scope: str | None = field(
        default=None,
        metadata={
            "help": "Centre and scale of a fresh completion's reward, as in MAPOConfig: 'group', 'tag', 'tag_whitened' or "
            "'batch'. All but 'group' and 'batch' need a tag in each row. Null: as method says, 'group' with 'avatar'."
        },
    )
    batching: str | None = field(
        default=None,
        metadata={
            "help": "'mixed': a rollout takes rows as they come; 'stratified': rows of one tag, in random order or as "
            "curriculum says. Null: as method says, 'mixed' with 'avatar'."
        },
    )
    hints: bool = field(
        default=False, metadata={"help": "Show the column 'hint' in prompts that are stuck. Needs replay."}
    )
    hint_visits: int = field(
        default=3,
        metadata={
            "help": "At so many visits in a row must a prompt have been stuck to get its hint. It is shown at the next visit: a "
            "run whose prompts don't come back so often is refused."
        },
    )
    hint_max_kl: float = field(
        default=0.01,
        metadata={
            "help": "Highest mean token KL, from the current policy to those that wrote a prompt's replayed completions, at "
            "which the policy counts as having stopped moving on it."
        },
    )
    hint_below: float = field(
        default=0.75,
        metadata={
            "help": "A prompt of the Hard tier is stuck while its mean reward is below this. (Tiers alone are relative: where "
            "all prompts are solved, all are Hard.)"
        },
    )
    hint_template: str = field(
        default="\nHint: {hint}",
        metadata={"help": "Text at the end of the last user message of such a prompt; must hold '{hint}'."},
    )

    def __post_init__(self):
        axes = (self.tag_weights, self.curriculum, self.dynamic_sampling)
        if self.method == "avatar" and self.loss_strata is None:
            scheduled = self.leftover != "fill" or self.curriculum_granularity == "cycle"
            if scheduled or any(axis != "none" for axis in axes):
                self.loss_strata = "batch"
        super().__post_init__()
        for name, choices in {
            "tas_shape": SHAPES,
            "advantage_group": ("fresh", "mixed"),
            "replay_recovery": ("refuse", "empty"),
            "replay_scope": REPLAY_SCOPES,
            "replay_draw": DRAWS,
        }.items():
            self._check_choice(name, choices)
        self._check_numbers()
        self._check_loss()
        self._check_unused()
        self.replay_shares = dict(SHARES) if self.replay_shares is None else self.replay_shares
        self.replay_quantiles = list(QUANTILES if self.replay_quantiles is None else self.replay_quantiles)
        self.new_buffer()
        self._check_replay_memory()

    def _check_replay_memory(self) -> None:
        """
        Check that stored completions, which are never let go for want of memory, will fit into what a run may keep.

        Raises:
            ValueError: when they may take more than `host_memory_bytes`; where that is not set a warning is logged.
        """
        share = self.host_share() if self.replayed_generations else None
        if share is None:
            return
        most = self.replay_capacity * experience_bytes(self.max_completion_length or 0)
        if most > share:
            text = (
                f"replay_capacity={self.replay_capacity} completions of max_completion_length={self.max_completion_length} tokens "
                f"may take {most} bytes ({readable(most)}) of each process, which has {share} ({readable(share)}) for all that "
                "it keeps: lower replay_capacity or raise host_memory_bytes"
            )
            if self.host_memory_bytes is not None:
                raise ValueError(text)
            logger.warning(text)

    @property
    def first_hinted_visit(self) -> int:
        """The visit of a prompt at which it can be shown with its hint at the earliest, counted from 1."""
        return max(self.hint_visits, 2) + 1  # nothing of a prompt is replayed at its first

    @property
    def tag_aware(self) -> bool:
        """Whether MAPO's schedule and loss are switched on, by `loss_strata`; each row needs a tag then."""
        return self.loss_strata is not None

    def _check_numbers(self) -> None:
        if not 0 <= self.replayed_generations < self.num_generations:
            raise ValueError(
                f"replayed_generations must be from 0 to num_generations - 1 ({self.num_generations - 1}), for a group needs "
                f"a fresh completion; got {self.replayed_generations}"
            )
        for name in ("replay_alpha", "tas_lambda", "hint_max_kl"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a finite number of at least 0, got {value}")
        for name in ("replay_epsilon", "replay_epsilon_high", "replay_advantage_limit"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number, got {value}")
        if self.replay_gradient_steps < 0:
            raise ValueError(f"replay_gradient_steps must be at least 0, got {self.replay_gradient_steps}")
        for name in ("vcrs_window", "hint_visits", "replay_min_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.replay_min_size > self.replay_capacity >= 1:
            raise ValueError(
                f"Nothing could ever be replayed: replay_min_size={self.replay_min_size} is more than replay_capacity="
                f"{self.replay_capacity}"
            )
        if not math.isfinite(self.hint_below):
            raise ValueError(f"hint_below must be a finite reward, got {self.hint_below}")
        if "{hint}" not in self.hint_template:
            raise ValueError(f"hint_template must hold '{{hint}}', got {self.hint_template!r}")

    @property
    def _purpose(self) -> str | None:
        """What the loss has beyond TRL's, `"replay"` or `"tas_lambda"`; `None` where it is TRL's."""
        return "replay" if self.replayed_generations else "tas_lambda" if self.tas_lambda else None

    def _check_loss_type(self) -> None:
        if self.loss_strata is not None:
            super()._check_loss_type()
        if self._purpose is None:
            OmniGRPOConfig._check_loss_type(self)
            return
        losses = _MIXABLE_LOSSES if self.replayed_generations else _SHAPEABLE_LOSSES
        if self.loss_strata is not None:
            losses = tuple(loss for loss in losses if loss in SURROGATES)
        if self.loss_type not in losses:
            raise ValueError(
                f"loss_type must be one of {', '.join(losses)} with {self._purpose}, got {self.loss_type!r}"
            )

    def _check_loss(self) -> None:
        purpose = self._purpose
        if purpose is None:
            return
        if self.use_liger_kernel:
            raise ValueError(f"use_liger_kernel computes a loss of its own, which knows no {purpose}: leave it False")
        if self.off_policy_mask_threshold is not None:
            raise ValueError(f"off_policy_mask_threshold cannot be used with {purpose}: leave it null")
        if not self.replayed_generations:
            return
        if self.scale_rewards not in ("group", True):
            raise ValueError(
                f"scale_rewards={self.scale_rewards!r} is replaced by advantage_scope; leave it at 'group'"
            )
        if self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError("multi_objective_aggregation must stay 'sum_then_normalize' with replay")
        if self.replay_scope == "buffer" and self.batching == "stratified":
            raise ValueError("replay_scope='buffer' brings other tags into a rollout: it needs batching='mixed'")
        if self.advantage_group == "mixed" and self.advantage_scope != "group":
            raise ValueError("advantage_group='mixed' is about a prompt's group: it needs advantage_scope='group'")
        if self.hints and self.revisit == "informative":
            raise ValueError(
                "revisit='informative' does not come back to prompts whose completions were all wrong, which hints are for: "
                "choose 'all' or 'unsolved'"
            )
        if self.advantage_group == "mixed" and self.dynamic_sampling != "none":
            raise ValueError(
                f"dynamic_sampling={self.dynamic_sampling!r} says which groups teach something before anything is replayed "
                "in them: it needs advantage_group='fresh'"
            )
        self._check_lone_completions()

    def _check_lone_completions(self) -> None:
        """Refuse groups whose only fresh completion is its own baseline: it would have no advantage, and train nothing."""
        fresh = self.num_generations - self.replayed_generations
        # In a mixed group the replayed completions of its own prompt are in the baseline too, where any are drawn.
        if fresh > 1 or self.advantage_group == "mixed" or lifts_equal_rewards(self.advantage_scope):
            return
        ways = [f"replayed_generations of at most {self.num_generations - 2}", "more num_generations"]
        if self.dynamic_sampling == "none":  # which goes with neither of these
            ways += ["advantage_scope='batch'"]
            ways += ["advantage_group='mixed'"] if self.advantage_scope == "group" else []
        raise ValueError(
            f"replayed_generations={self.replayed_generations} leaves {fresh} fresh completion of {self.num_generations}, and "
            f"advantage_scope={self.advantage_scope!r} compares at least 2 of a prompt: one alone has no advantage, and trains "
            f"nothing. Choose {', or '.join(ways)}"
        )

    def _check_unused(self) -> None:
        """Refuse options that would silently do nothing."""
        defaults = {f.name: f.default for f in fields(self)} | {"advantage_scope": _NEUTRAL["advantage_scope"]}
        names = [name for name in defaults if name.startswith("replay_")]
        scope = () if self.tag_aware else ("advantage_scope",)
        for name in (*names, "vcrs_window", "advantage_group", *scope, "hints"):
            off = name == "replay_alpha" and not self.replay_alpha  # says the same once more
            if getattr(self, name) != defaults[name] and not self.replayed_generations and not off:
                raise ValueError(f"{name}={getattr(self, name)!r} has no effect with replayed_generations=0")
        if self.difficulty != defaults["difficulty"] and not self.tag_aware:
            raise ValueError(
                f"difficulty={self.difficulty!r} has no effect without loss_strata: nothing asks how hard tags are"
            )
        if self.loss_aggregation != defaults["loss_aggregation"] and not self.tag_aware:
            raise ValueError(
                f"loss_aggregation={self.loss_aggregation!r} has no effect without loss_strata: loss_type says how the loss "
                "is averaged"
            )
        for name in ("hint_visits", "hint_max_kl", "hint_below", "hint_template"):
            if getattr(self, name) != defaults[name] and not self.hints:
                raise ValueError(f"{name}={getattr(self, name)!r} has no effect without hints=True")
        for name in _UNREAD_CLIPS.get(self.loss_type, ()):
            if getattr(self, name) is not None:
                raise ValueError(f"{name}={getattr(self, name)!r} has no effect with loss_type={self.loss_type!r}")
        if self.tas_shape != "parabolic" and not self.tas_lambda:
            raise ValueError(f"tas_shape={self.tas_shape!r} has no effect with tas_lambda=0")

    def new_buffer(self) -> StratifiedReplayBuffer:
        """
        Return an empty replay buffer with these options.

        Raises:
            ValueError: when the options contradict each other, in terms of the fields here.
        """
        if not isinstance(self.replay_shares, dict):
            raise ValueError(f"replay_shares must be a mapping of tiers to shares, got {self.replay_shares!r}")
        try:
            return StratifiedReplayBuffer(
                self.replay_capacity,
                self.replay_shares,
                tuple(self.replay_quantiles),
                self.replay_max_age,
                self.seed,
            )
        except ValueError as error:
            raise ValueError(f"replay_capacity, replay_shares, replay_quantiles or replay_max_age: {error}") from error
