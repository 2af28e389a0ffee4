from recbole_simdiff.cli import main

raise SystemExit(main())
