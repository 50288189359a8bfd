"""A metric for `evaluate`, which copies the one script that has the name of its folder."""
