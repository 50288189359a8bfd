"""What is raised for a reward function that cannot be used."""


class RewardError(ValueError):
    """A reward function that fails, or does not give a reward for each completion. The message says which, and how."""
