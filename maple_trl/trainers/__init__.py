"""Trainers: subclasses of TRL's."""
