"""For which GPUs the tests compile the kernels ahead of time.

Each takes minutes of a core: nothing is compiled unless ``KDKERNELS_TEST_TARGETS`` asks for it. The
gate asks for one of each maker, who changes a kernel for ``all``.
"""

import os

import pytest

GATE = ["sm_90", "gfx942"]
TARGETS = {"": [], "gate": GATE, "all": [*GATE, "sm_80"]}[
    os.environ.get("KDKERNELS_TEST_TARGETS", "")
]
if_asked = pytest.mark.skipif(
    not TARGETS,
    reason="minutes of a core: KDKERNELS_TEST_TARGETS=gate pytest, as .ci/run does, or =all",
)
