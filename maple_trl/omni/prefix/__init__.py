"""A group's prompt is computed once: packing, shared prefill, attention."""
