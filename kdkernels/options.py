"""The options of the loss: which there are, and that each is what it must be.

``kd_loss`` documents them. Bad values raise here, before any tensor has been looked at.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from kdkernels import backends
from kdkernels.divergences import DIVERGENCES, FORWARD_KL, PerRow, Term

# Beyond these T² and 1/T leave the numbers that float32 logits can be divided by.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6
# Of the options that belong to one divergence or another.
DEFAULTS = {
    "beta": 0.5,
    "skew": 0.1,
    "divergence_alpha": 0.5,
    "dkd_alpha": 1.0,
    "dkd_beta": 8.0,
    "nkd_gamma": 1.5,
    "wsld_alpha": 2.25,
    "dist_beta": 1.0,
}
SHARES = ("beta", "skew")  # in [0, 1], and may be given per row
REDUCTIONS = ("mean", "sum", "none")
ENSEMBLES = ("probs", "losses", "logits")


class Options(NamedTuple):
    """The checked options of one loss: all that does not change from call to call."""

    temperature: float
    alpha: float
    ignore_index: int
    label_smoothing: float
    reduction: str
    distill_ignored: bool
    divergence: tuple[Term, ...] = FORWARD_KL
    teacher_temperature: float | None = None  # None: the same as the student's
    scale_by_t2: bool = True
    temperatures: tuple[float, ...] = ()  # where several are averaged or summed
    temperature_reduction: str = "mean"
    standardize: bool = False
    taid: float | None = None  # the teacher's share
    agreement: float = 0.0
    entropy_gap: float = 0.0
    agreement_reduction: str | None = None  # of these two; None: reduction
    intra_class: float = 0.0  # the part of DIST that lies across the batch
    ensemble: str = "probs"
    teacher_weights: tuple[float, ...] = ()  # none: all the same
    softcap: float | None = None
    student_scale: float = 1.0
    teacher_scale: float = 1.0
    z_loss: float = 0.0
    num_classes: int | None = None
    metrics: bool = False

    @property
    def features(self) -> frozenset[str]:
        """What is asked for beside the forward KL at one temperature times T², in words."""
        asked = {
            f"divergence {term.name}": self.divergence != FORWARD_KL for term in self.divergence
        }
        asked |= {
            "a teacher_temperature of its own": self.teacher_temperature is not None,
            "scale_by_t2=False": not self.scale_by_t2,
            "several temperatures": bool(self.temperatures),
        }
        for name in ("standardize", "agreement", "entropy_gap", "z_loss", "metrics"):
            asked[name] = bool(getattr(self, name))
        for name in ("taid", "num_classes"):
            asked[name] = getattr(self, name) is not None
        asked["logit_softcap"] = self.softcap is not None
        asked["logit_scale"] = (self.student_scale, self.teacher_scale) != (1.0, 1.0)
        return frozenset(name for name, is_asked in asked.items() if is_asked)

    @property
    def special(self) -> bool:
        """Whether a row takes more than one look (kdkernels/backends/plan.py)."""
        if any(DIVERGENCES[term.name].alone and term.name != "dkd" for term in self.divergence):
            return True
        if any(term.name == "dist" for term in self.divergence):
            return True
        return any(getattr(self, name) != usual for name, usual in _OF_ONE_LOOK.items())


# What may be something else than this only where a row takes more than one look.
_OF_ONE_LOOK = {
    name: Options._field_defaults[name]
    for name in Options._fields[Options._fields.index("temperatures") :]
}


class Prepared(NamedTuple):
    """What ``kd_loss`` and the module hand on: the options, and those that are tensors."""

    options: Options
    special: bool  # of the options; here, as every call asks
    features: frozenset[str]
    tensors: PerRow
    inplace: bool
    return_terms: bool | str
    backend: str | None


def _number(name: str, value: Any, expected: str) -> float:
    # bool is an int to Python; a tensor would make the GPU wait for the host.
    if not isinstance(value, (bool, Tensor)) and hasattr(value, "__float__"):
        try:
            return float(value)
        except (TypeError, OverflowError):  # an array of several numbers; 10**400
            pass
    raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")


def _finite(name: str, value: Any, least: float = -math.inf) -> float:
    expected = "a finite number" if least == -math.inf else f"a finite number >= {least:g}"
    number = _number(name, value, expected)
    if not (math.isfinite(number) and number >= least):
        raise ValueError(f"{name} must be {expected}, got {number}")
    return number


def _positive(name: str, value: Any) -> float:
    number = _number(name, value, "a finite number > 0")
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"{name} must be a finite number > 0, got {number}")
    return number


def _temperature(name: str, value: Any) -> float:
    temperature = _positive(name, value)
    if not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
        raise ValueError(
            f"{name} must be between {MIN_TEMPERATURE} and {MAX_TEMPERATURE}, got {temperature}"
        )
    return temperature


def _share(name: str, value: Any) -> float:
    share = _number(name, value, "a number in [0, 1]")
    if not 0 <= share <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {share}")
    return share


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ValueError(f"{name} must be one of {known}, got {value!r}")
    return str(value)


def _switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def _temperatures(value: Any, mixture: tuple[Term, ...]) -> tuple[float, ...]:
    if value is None:
        return (DIVERGENCES[mixture[0].name].temperature,)
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        if not value:
            raise ValueError("temperature must name at least one temperature, got an empty list")
        return tuple(_temperature("temperature", t) for t in value)
    return (_temperature("temperature", value),)


def _mixture(divergence: Any, parameters: dict[str, float]) -> tuple[Term, ...]:
    """The terms of a name, or of a mapping of names to weights (as its items)."""
    known = f"one of {tuple(DIVERGENCES)} or a mapping of these to weights"
    if isinstance(divergence, str):
        divergence = ((divergence, 1.0),)
    pairs = isinstance(divergence, tuple) and all(isinstance(item, tuple) for item in divergence)
    if not pairs:
        raise TypeError(f"divergence must be {known}, got {type(divergence).__name__}")
    if not divergence:
        raise ValueError("divergence must name at least one divergence, got an empty mapping")
    terms = []
    for name, weight in divergence:
        if name not in DIVERGENCES:
            raise ValueError(f"divergence must be {known}, got {name!r}")
        weight = _finite(f"the weight of {name!r} in divergence", weight)
        _, _, option, second, *_ = DIVERGENCES[name]
        parameter = 0.0 if option is None else parameters[option]
        if name == "renyi" and not parameter > 0:
            raise ValueError(f"divergence_alpha must be > 0 with 'renyi', got {parameter}")
        terms.append(Term(name, weight, parameter, 0.0 if second is None else parameters[second]))
    terms.sort(key=lambda term: term.name != "dkd")
    return tuple(terms)


def check_is_used(option: str, mixture: tuple[Term, ...]) -> None:
    """No option is taken and then ignored."""
    users = [n for n, d in DIVERGENCES.items() if option in (d.option, d.second)]
    if not any(term.name in users for term in mixture):
        asked = " + ".join(repr(term.name) for term in mixture)
        raise ValueError(
            f"{option} is for divergence {' or '.join(map(repr, users))}, and divergence is {asked}"
        )


def _parameters(given: dict[str, Any]) -> dict[str, float]:
    checked = {}
    for name, value in given.items():
        if name in SHARES:
            checked[name] = _share(name, value)
        else:
            least = -math.inf if name == "divergence_alpha" else 0.0
            checked[name] = _finite(name, value, least)
    return checked


# What does not go together, by the names of the two options. Each is true of the checked options.
def _conflicts(o: Options) -> list[tuple[bool, str, str]]:
    names = [term.name for term in o.divergence]
    labelled = next((n for n in names if DIVERGENCES[n].labelled), None)
    of_labels = f"divergence={labelled!r}"
    several = "several temperatures"
    other_teacher = o.teacher_temperature is not None
    return [
        (labelled is not None and o.distill_ignored, of_labels, "distill_ignored"),
        ("dkd" in names and o.label_smoothing > 0, of_labels, "label_smoothing"),
        ("dkd" in names and o.z_loss > 0, of_labels, "z_loss"),
        (labelled is not None and other_teacher, of_labels, "teacher_temperature"),
        (bool(o.temperatures) and other_teacher, several, "teacher_temperature"),
        (o.intra_class > 0 and o.reduction == "none", "dist_gamma", "reduction='none'"),
        (o.intra_class > 0 and bool(o.temperatures), "dist_gamma", several),
        (o.intra_class > 0 and o.standardize, "dist_gamma", "standardize"),
        (o.intra_class > 0 and o.taid is not None, "dist_gamma", "taid"),
    ]


def _check(options: Options) -> Options:
    names = [term.name for term in options.divergence]
    if "dkd" in names and len(names) > 1:
        other = options.divergence[1].name
        raise ValueError(
            f"divergence 'dkd' and {other!r} cannot be mixed in one pass; add two losses"
        )
    for together, first, second in _conflicts(options):
        if together:
            raise ValueError(f"{first} and {second} do not go together")
    return options


def _pair(name: str, value: Any) -> tuple[float, float]:
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"{name} must be one number or (student, teacher), got {value!r}")
        return _positive(name, value[0]), _positive(name, value[1])
    return _positive(name, value), _positive(name, value)


def _count(name: str, value: Any, least: int) -> int:
    if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    number = int(value.__index__())
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def _ignore_index(value: Any) -> int:
    if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
        raise TypeError(f"ignore_index must be an int, got {type(value).__name__}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"ignore_index must fit into 64 bits, got {value}")
    return int(value)


def _agreement_reduction(value: Any, reduction: str) -> str | None:
    if value is None or value == reduction:
        return None
    if (value, reduction) != ("sum", "mean"):
        raise ValueError(
            'agreement_reduction must be None, or "sum" beside reduction="mean", got '
            f"{value!r} beside {reduction!r}"
        )
    return "sum"


def _weights(value: Any) -> tuple[float, ...]:
    if value is None:
        return ()
    if not isinstance(value, tuple):
        raise TypeError(f"teacher_weights must be a list of numbers, got {type(value).__name__}")
    weights = tuple(_finite("teacher_weights", w, 0.0) for w in value)
    if not sum(weights) > 0:
        raise ValueError(f"teacher_weights must not all be 0, got {list(weights)}")
    return weights


def _check_options(
    *,
    temperature: Any,
    alpha: Any,
    ignore_index: Any,
    label_smoothing: Any,
    reduction: Any,
    distill_ignored: Any,
    inplace: Any,
    return_terms: Any,
    backend: Any,
    divergence: Any,
    teacher_temperature: Any,
    scale_by_t2: Any,
    temperature_reduction: Any,
    standardize: Any,
    taid: Any,
    agreement: Any,
    entropy_gap: Any,
    agreement_reduction: Any,
    dist_gamma: Any,
    ensemble: Any,
    teacher_weights: Any,
    logit_softcap: Any,
    logit_scale: Any,
    z_loss: Any,
    num_classes: Any,
    **parameters: Any,
) -> Options:
    numbers = _parameters(parameters)
    mixture = _mixture(divergence, numbers)
    for option, value in numbers.items():
        if value != DEFAULTS[option]:
            check_is_used(option, mixture)
    temperatures = _temperatures(temperature, mixture)
    if teacher_temperature is not None:
        teacher_temperature = _temperature("teacher_temperature", teacher_temperature)
    if (teacher_temperature,) == temperatures:
        teacher_temperature = None
    intra_class = _finite("dist_gamma", dist_gamma, 0.0)
    is_dist = any(term.name == "dist" for term in mixture)
    if intra_class not in (0.0, 1.0) and not is_dist:
        raise ValueError(f"dist_gamma is for divergence 'dist', and divergence is {divergence!r}")
    student_scale, teacher_scale = _pair("logit_scale", logit_scale)
    if _switch("inplace", inplace) and is_dist and intra_class > 0:
        raise ValueError("dist_gamma and inplace do not go together")
    if type(return_terms) is not bool and return_terms != "metrics":
        raise TypeError(f'return_terms must be True, False or "metrics", got {return_terms!r}')
    if backend is not None and backend not in backends.NAMES:
        raise ValueError(f"backend must be None or one of {backends.NAMES}, got {backend!r}")
    return _check(
        Options(
            temperatures[0],
            _share("alpha", alpha),
            _ignore_index(ignore_index),
            _share("label_smoothing", label_smoothing),
            _one_of("reduction", reduction, REDUCTIONS),
            _switch("distill_ignored", distill_ignored),
            mixture,
            teacher_temperature,
            _switch("scale_by_t2", scale_by_t2),
            temperatures if len(temperatures) > 1 else (),
            _one_of("temperature_reduction", temperature_reduction, ("mean", "sum")),
            _switch("standardize", standardize),
            None if taid is None else _share("taid", taid),
            _finite("agreement", agreement),
            _finite("entropy_gap", entropy_gap),
            _agreement_reduction(agreement_reduction, reduction),
            intra_class if is_dist else 0.0,
            _one_of("ensemble", ensemble, ENSEMBLES),
            _weights(teacher_weights),
            None if logit_softcap is None else _positive("logit_softcap", logit_softcap),
            student_scale,
            teacher_scale,
            _finite("z_loss", z_loss, 0.0),
            None if num_classes is None else _count("num_classes", num_classes, 1),
            return_terms == "metrics",
        )
    )


@functools.lru_cache(maxsize=256, typed=True)
def _cached_check_options(
    names: tuple[str, ...], *values: Any
) -> tuple[Options, bool, frozenset[str]]:
    options = _check_options(**dict(zip(names, values, strict=True)))
    return options, options.special, options.features


def prepare(given: dict[str, Any]) -> Prepared:
    """The options of ``kd_loss`` by name, checked, and apart from them those that are tensors.

    Raises:
        TypeError, ValueError: naming the option that is wrong.
    """
    given = dict(given)
    tensors = split_tensors(given)
    try:
        checked = _cached_check_options(tuple(given), *given.values())
    except TypeError:  # an unhashable value, or one of the wrong type: let the check name it
        options = _check_options(**given)
        checked = options, options.special, options.features
    return Prepared(*checked, tensors, given["inplace"], given["return_terms"], given["backend"])


# As kd_loss has them: the order of its signature.
OPTION_NAMES = (
    "temperature",
    "alpha",
    "ignore_index",
    "label_smoothing",
    "reduction",
    "distill_ignored",
    "inplace",
    "return_terms",
    "backend",
    "divergence",
    "beta",
    "skew",
    "divergence_alpha",
    "dkd_alpha",
    "dkd_beta",
    "nkd_gamma",
    "wsld_alpha",
    "dist_beta",
    "dist_gamma",
    "teacher_temperature",
    "temperature_reduction",
    "scale_by_t2",
    "standardize",
    "taid",
    "agreement",
    "entropy_gap",
    "agreement_reduction",
    "teacher_weights",
    "ensemble",
    "logit_softcap",
    "logit_scale",
    "logit_bias",
    "z_loss",
    "num_classes",
)


@functools.lru_cache(maxsize=256, typed=True)
def _prepare_hashable(*given: Any) -> Prepared:
    return prepare(dict(zip(OPTION_NAMES, given, strict=True)))


def prepare_plain(given: tuple[Any, ...]) -> Prepared:
    """:func:`prepare` of values that hold no tensor, which a function is called with every time."""
    try:
        return _prepare_hashable(*given)
    except TypeError:  # an unhashable value, or one of the wrong type
        return prepare(dict(zip(OPTION_NAMES, given, strict=True)))


def split_tensors(given: dict[str, Any]) -> dict[str, Tensor]:
    """Takes the tensors out of ``given``, where a number that is allowed stays in their place."""
    tensors: dict[str, Tensor] = {}
    for name in SHARES:
        if isinstance(given[name], Tensor):
            tensors[name], given[name] = given[name], 0.5
    if isinstance(given["temperature"], Tensor):
        tensors["temperature"], given["temperature"] = given["temperature"], 1.0
    elif isinstance(given["temperature"], list):
        given["temperature"] = tuple(given["temperature"])
    divergence = given["divergence"]
    if isinstance(divergence, Mapping):
        tensors |= {name: w for name, w in divergence.items() if isinstance(w, Tensor)}
        given["divergence"] = tuple(
            (name, 1.0 if isinstance(w, Tensor) else w) for name, w in divergence.items()
        )
    weights = given["teacher_weights"]
    if isinstance(weights, Tensor):
        weights = weights.tolist()
    given["teacher_weights"] = tuple(weights) if isinstance(weights, list) else weights
    if isinstance(given["logit_scale"], list):
        given["logit_scale"] = tuple(given["logit_scale"])
    bias = given.pop("logit_bias", None)
    for side, of_side in zip(("student", "teacher"), _both(bias), strict=True):
        if of_side is not None:
            tensors[f"{side}_bias"] = of_side
    return tensors


def _both(bias: Any) -> tuple[Any, Any]:
    if isinstance(bias, (tuple, list)):
        if len(bias) != 2:
            raise ValueError(
                f"logit_bias must be a Tensor or (student, teacher), got {len(bias)} values"
            )
        return bias[0], bias[1]
    return bias, bias
