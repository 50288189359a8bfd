"""Data sets: the embedded seven-tag set and the code of the tiny omni model that goes with it."""

from maple_trl.data.synthetic import ATTRIBUTES, default_folder, load_seven_tags, right_letter, write_seven_tags


__all__ = ["ATTRIBUTES", "default_folder", "load_seven_tags", "right_letter", "write_seven_tags"]
