"""`python -m bitvla`."""

import sys

from bitvla.cli import main

sys.exit(main())
