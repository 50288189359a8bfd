"""Algorithms as pure arithmetic and small stateful objects, apart from any trainer."""
