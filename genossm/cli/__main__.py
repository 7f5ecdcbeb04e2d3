"""`python -m genossm.cli`: the `genossm` command where the script is not on the path."""

import sys

from genossm.cli import main

sys.exit(main())
