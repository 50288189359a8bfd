"""What an AVATAR run tells of replay and hints: metrics of each rollout, and notes at its end."""

from __future__ import annotations

import torch
from torch import Tensor

from maple_trl.algorithms import informative_groups
from maple_trl.trainers.avatar.mixed_rollout import MixedRollout
from maple_trl.trainers.common.run_summary import Note, make_note, plural
from maple_trl.trainers.common.tag_metrics import totals_by_tag


class AccountsMixin:
    """Keeps account of what [`~maple_trl.AvatarTrainer`] replays and hints at."""

    def fired(self) -> list[Note]:
        """Return what the run replayed and hinted at, with what its parent tells."""
        found, counts = super().fired(), self.tally.counts
        if counts["replayed"]:
            text = f"{plural(counts['replayed'], 'completion')} replayed beside {counts['generated']} generated"
            found.append(make_note("replayed", counts["replayed"], text, generated=counts["generated"]))
        if counts["hinted"] and self.memory.hints is not None:
            known = self.memory.hints.metrics()
            given, withdrawn = int(known["hint/given"]), int(known["hint/withdrawn"])
            text = (
                f"hints shown {plural(counts['hinted'], 'time')}, {plural(given, 'hint')} given to prompts that were stuck and "
                f"{withdrawn} withdrawn"
            )
            found.append(make_note("hinted", counts["hinted"], text, given=given, withdrawn=withdrawn))
        return found

    def left_out(self) -> list[Note]:
        """Return whether replay or hints never fired and what could not be stored, with what its parent tells."""
        found, counts, args = super().left_out(), self.tally.counts, self.args
        if args.replayed_generations and counts["rollouts"] and not counts["replayed"]:
            since = "a prompt's are replayed from its second visit on"
            if args.replay_scope != "prompt":
                of_tags = args.replay_scope == "tiers" and args.batching == "stratified"
                since = f"a rollout replays what earlier ones{' of its tags' if of_tags else ''} stored"
            text = (
                f"replay never fired: nothing was replayed in {plural(counts['rollouts'], 'rollout')}, with "
                f"{plural(len(self.memory.buffer), 'completion')} in the buffer ({since})"
            )
            found.append(make_note("replay_never_fired", 0, text, of=counts["rollouts"]))
        if args.hints and counts["rollouts"] and not counts["hinted"]:
            text = (
                f"hints never fired: no prompt was shown with its hint in {plural(counts['rollouts'], 'rollout')} (hint_visits="
                f"{args.hint_visits}, hint_below={args.hint_below:g})"
            )
            found.append(make_note("hints_never_fired", 0, text, of=counts["rollouts"]))
        if self.memory.unstorable:
            text = f"{plural(self.memory.unstorable, 'completion')} without a reward or a token could not be stored for replay"
            found.append(make_note("unstorable", self.memory.unstorable, text))
        return found

    def _log_rollout(self, rollout: MixedRollout, advantages: Tensor) -> None:
        fresh, replayed, shape = rollout.fresh, rollout.replayed, (-1, rollout.group_size)
        everyone = torch.where(rollout.own, rollout.past, rollout.rewards.double()).view(shape)
        fresh_only, mixed = ~rollout.informative, ~informative_groups(everyone)
        rewards = rollout.rewards
        task = rewards if self._task_reward is None else rollout.scores[:, self._task_reward]
        places = rollout.wanted * rollout.group_size  # of the round that replays
        strangers = replayed & ~rollout.own
        self.tally.counts.update(
            rollouts=1,
            replayed=int(replayed.sum()),
            hinted=int(rollout.hinted.sum()),
            generated=int(fresh.sum()),
        )
        self._log_all(
            {
                "replay/zero_variance_fresh": float(fresh_only.float().mean()),
                "replay/zero_variance_mixed": float(mixed.float().mean()),
                "replay/hit_rate": rollout.filled(self.args.replayed_generations),
                "replay/of_other_prompts": float(strangers.sum()) / places,
                "replay/share": float(replayed.sum()) / places,
                "replay/generated": float(fresh.sum()),
                "rewardless": float(not (task.nan_to_num(nan=0.0) > 0).any()),
            }
        )
        if self.memory.hints is not None:
            self._log_all({"hint/rate": float(rollout.hinted.float().mean())})
        prompt_tags = rollout.tags.view(shape)[:, 0]
        self._means["train"].add(totals_by_tag("zero_variance_mixed", mixed.float(), prompt_tags))
        if self.args.tag_aware:
            return  # the rest is told already
        values = {"reward": rewards}
        if task is not rewards:
            values["accuracy"] = task
        values |= {"advantage_mean": advantages, "advantage_square": advantages.square()}
        for name, value in values.items():
            self._means["train"].add(totals_by_tag(name, value[fresh], rollout.tags[fresh]))
        self._means["train"].add(totals_by_tag("zero_variance", fresh_only.float(), prompt_tags))
