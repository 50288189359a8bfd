"""What `python -m maple_trl.cli` runs."""

from maple_trl.cli import main


raise SystemExit(main())
