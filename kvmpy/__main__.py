"""`python -m kvmpy`: the same as the command `kvmpy`."""

import sys

from kvmpy.cli import main

sys.exit(main())
