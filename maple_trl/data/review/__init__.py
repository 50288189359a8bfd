"""Review of a tagged set by people: a page, a log that is only added to, agreement, and the reviewed set."""
