"""What is published of a run: its model card, its files, and what must not leave the machine."""
