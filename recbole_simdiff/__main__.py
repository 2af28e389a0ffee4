from recbole_simdiff.cli.main import main

raise SystemExit(main())
