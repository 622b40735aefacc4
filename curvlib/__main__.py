"""Let ``python -m curvlib`` run the command line."""

import sys

from curvlib.cli import main

sys.exit(main())
