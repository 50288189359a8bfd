"""The command line `maple-trl`, one file per command."""

from maple_trl.cli.command import build_parser, main


__all__ = ["build_parser", "main"]
