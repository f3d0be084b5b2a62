"""The general kernel of the Triton backend, by Triton's interpreter: the tests of the objectives
and of the teachers, at sizes of one block and of several.

They run in the process that ``test_triton.py`` speaks of, where is also what it compiles to.
"""

import math

import pytest
import test_divergences as divergences
import test_dkd as dkd
import test_objectives as objectives
import test_teachers as teachers
import torch
from comparing import assert_same_bits, value_and_grad
from test_numerics import GRAD_BOUND, inputs
from test_triton import interpreted

from kdkernels import TopKTeacher, backends, kd_loss
from kdkernels.backends import triton_general

INF, NAN = math.inf, math.nan
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"), interpreted]
F32 = torch.float32
others = pytest.mark.parametrize("dtype", [t for t in GRAD_BOUND if t != F32], ids=str)
SEVERAL_BLOCKS = 300
# One term that takes the general kernel, and changes nothing.
GENERAL = {"num_classes": 12}


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_objective(name):
    objectives.test_objective("triton", F32, 10, name)
    objectives.test_objective("triton", F32, SEVERAL_BLOCKS, name)


@others
def test_every_dtype(dtype):
    objectives.test_objective("triton", dtype, 3, "nkd")
    objectives.test_several_temperatures("triton", dtype, 3)
    teachers.test_softcap_scale_and_bias("triton", dtype, 3)


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_masked_classes(name):
    objectives.test_masked_classes("triton", name)


@pytest.mark.parametrize("margin", [40.0, 300.0])
def test_a_label_that_is_all_there_is(margin):
    for sure in ("student", "teacher"):
        for name in ("nkd", "wsld"):
            objectives.check_a_sure_label("triton", margin, 7, sure, name, F32)


@pytest.mark.parametrize("case", range(12))
def test_options_go_together(case):
    names, combined = list(objectives.OBJECTIVES), objectives.COMBINED
    ensemble = [None, "probs", "losses", "logits"][(case // 2) % 4]
    name = names[(case + case // 4) % 4]
    objectives.test_options_go_together(combined[case % 6], name, ensemble, "triton")
