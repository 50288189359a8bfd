"""What is wrong with a job, and what would be right."""


class SetupError(ValueError):
    """The job is described wrongly: an unknown key, a data set or reward that is not there. The message says which."""
