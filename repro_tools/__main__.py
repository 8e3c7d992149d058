from repro_tools.cli import main

raise SystemExit(main())
