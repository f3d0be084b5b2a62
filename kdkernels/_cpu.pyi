# The compiled module, csrc/bindings.cpp. Only kdkernels/backends/{cpu,plan}.py call it.

from torch import Tensor

_Rows = tuple[int, int, int]

class Options:
    """What does not change from call to call."""

    def __init__(
        self,
        temperature: float,
        alpha: float,
        ignore_index: int,
        label_smoothing: float,
        reduction: int,
        distill_ignored: bool,
        teacher_temperature: float,
        soft_factor: float,
        mixture: list[tuple[int, float, float, float]],
    ) -> None: ...

class Plan:
    """What a row takes more than one look for; only kdkernels/backends/plan.py fills one in."""

    def add_terms(self, mixture: list[tuple[int, float, float, float, int, int]]) -> int: ...
    def add_pass(
        self,
        temperature: float,
        teacher_temperature: float,
        weight: float,
        added: bool,
        first: int,
        terms: int,
    ) -> None: ...
    def add_teacher(self, logits: int, dtype: int, rows: _Rows, weight: float) -> None: ...
    def set_logits(
        self,
        softcap: float,
        student_scale: float,
        teacher_scale: float,
        student_bias: int,
        teacher_bias: int,
        teacher_share: float,
    ) -> None: ...
    def set_rows(self, temperature: int, sample_weight: int, metrics: int) -> None: ...
    def set_top_k(self, values: int, indices: int, k: int, tail: int) -> None: ...
    def set_switches(
        self, standardize: bool, scale_by_t2: bool, sum_added: bool, ensemble: int
    ) -> None: ...

def run(
    options: Options,
    student: int,
    teacher: int,
    labels: int,
    weight: int,
    grad: int,
    loss: int,
    soft: int,
    hard: int,
    student_rows: _Rows,
    teacher_rows: _Rows,
    grad_rows: _Rows,
    rows: int,
    classes: int,
    student_dtype: int,
    teacher_dtype: int,
    labels_are_int64: bool,
    threads: int,
    of_rows: list[tuple[int, ...]],
    plan: Plan | None,
    z_loss: float,
    num_items: int,
) -> float: ...
def use_tensors(table: object, types: list[type]) -> None: ...
def is_plain(student: object, teacher: object, labels: object) -> bool: ...
def run_plain(
    options: Options,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    grad: Tensor | None,
    loss: Tensor,
    threads: int,
) -> float: ...
def compare_columns(
    student: int,
    teacher: int,
    active: int,
    grad: int,
    student_rows: tuple[int, int, int],
    teacher_rows: tuple[int, int, int],
    rows: int,
    classes: int,
    student_dtype: int,
    teacher_dtype: int,
    in_float64: bool,
    temperature: float,
    teacher_temperature: float,
    scale: float,
    threads: int,
) -> float: ...

class Memory:
    """Kept from one large gradient to the next; offers the buffer protocol."""

    def __init__(self, bytes: int) -> None: ...
    def __buffer__(self, flags: int) -> memoryview: ...

def release_memory() -> int: ...
def instruction_set() -> str: ...
def openmp_library() -> str: ...
