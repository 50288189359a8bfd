"""What other tools call, and what calls them: lmms-eval, experiment trackers."""
