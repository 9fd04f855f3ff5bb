"""`python -m flexgen.flex_opt`: the benchmark of FlexGen 0.1, with its flags and its log."""

import sys

from flexgen.flex_opt.benchmark import main

sys.exit(main())
