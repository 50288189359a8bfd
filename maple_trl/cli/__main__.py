from maple_trl.cli import main


raise SystemExit(main())
