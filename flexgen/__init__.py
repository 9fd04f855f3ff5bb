"""flexgen: run language models that do not fit, at the throughput the hardware allows.

from flexgen import OptLM, Policy

with OptLM("demo", Policy(gpu_batch_size=8, weights={"cpu": 50, "disk": 50})) as model:
    ids = model.generate([[5, 6, 7]], max_new_tokens=8)
"""

from flexgen.engine import OptLM, Stats
from flexgen.policy import Auto, Policy, Share, Split, Tier
from flexgen.runtime.sampler import sample
from flexgen.workload import Workload

__all__ = ["Auto", "OptLM", "Policy", "Share", "Split", "Stats", "Tier", "Workload", "sample"]
