"""`python -m flexgen.catalog`: the families and known sizes of models."""

import sys

from flexgen.catalog import main

sys.exit(main())
