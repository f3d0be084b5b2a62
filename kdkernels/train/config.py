"""The configuration of a run: its options with defaults and limits, from TOML and to TOML."""

from __future__ import annotations

import copy
import inspect
import math
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from kdkernels.divergences import DIVERGENCES
from kdkernels.modules import FusedKDLoss
from kdkernels.train.errors import SetupError, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Count = Annotated[int, Field(ge=1, lt=2**31)]
Natural = Annotated[int, Field(ge=0, lt=2**31)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Magnitude = Annotated[int, Field(ge=0, lt=30)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Pixels = Annotated[int, Field(ge=0, le=256)]
Threads = Annotated[int, Field(ge=0, le=1024)]
Degrees = Annotated[float, Field(ge=0, le=180)]
Schedule = Literal["constant", "linear", "cosine", "step"]
CacheFormat = Literal["none", "float16", "float32"]
Ramp = list[tuple[NotNegative, float]]

# What FusedKDLoss takes and a configuration can say; the rest is the trainer's own business.
_OWN = (
    "reduction", "return_terms", "inplace", "group", "shift", "vocab_parallel", "ignore_index",
    "logit_bias",
)  # fmt: skip
LOSS_OPTIONS = {
    name: parameter.default
    for name, parameter in inspect.signature(FusedKDLoss).parameters.items()
    if name not in _OWN
}


def option(default: Any, help: str) -> Any:
    return Field(default, description=help)


class Section(BaseModel):
    """Options that belong together; unknown ones are rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Data(Section):
    name: Literal["mnist5k", "digits", "folder"] = option("mnist5k", "real images")
    folder: str = option("", "of name=folder: a folder per class, or train/ val/ test/ of such")
    size: Natural = option(0, "scale images to size x size pixels; 0: they are alike")
    channels: Literal[0, 1, 3] = option(0, "1 grey, 3 RGB, 0: as the images have them")
    corrupt: Literal["error", "skip"] = option("error", "fail on files that are no image, or not")
    validation: Share = option(0.15, "share of the images, stratified by class")
    test: Share = option(0.25, "share of the images, stratified by class")
    split_seed: Natural = option(0, "the split is the same for all seeds of the training")
    labelled: Natural = option(50, "labels of the student's owner; the teacher had all. 0: all")
    mean: list[float] = option([], "per channel, pixels in [0, 1]; []: of the training images")
    std: list[Positive] = option([], "per channel, pixels in [0, 1]; []: of the training images")
    workers: Natural = option(0, "processes that load batches")


class Augment(Section):
    crop: Pixels = option(2, "pixels by which images are moved at most, zeros coming in")
    flip: Share = option(0.0, "probability of a horizontal flip")
    rotation: Degrees = option(0.0, "degrees, at most")
    color: Share = option(0.0, "strength of brightness and contrast, saturation and hue in RGB")
    randaugment: Magnitude = option(0, "of RandAugment's two operations, to 29 (arXiv:1909.13719)")
    mixup: NotNegative = option(0.0, "alpha of the Beta distribution (arXiv:1710.09412); 0: none")
    cutmix: NotNegative = option(0.0, "alpha of the Beta distribution (arXiv:1905.04899); 0: none")
    fgsm: Share = option(0.0, "step along the sign of the gradient, in pixels (arXiv:1412.6572)")
    fgsm_share: Share = option(0.5, "share of a batch that is made adversarial")


class Model(Section):
    name: str = option(..., "built in, timm:NAME, hf:TYPE, hf:./FOLDER or package.module:function")
    options: dict[str, Any] = option({}, "keyword arguments of the model: dropout, width, ...")
    weights: str = option("", "safetensors file, or torch file of tensors; empty: none")

    @model_validator(mode="before")
    @classmethod
    def _defaults_are_of_one_model(cls, given: Any) -> Any:
        """Another model than the default has none of its options, which it may not even take."""
        usual = cls.model_fields["name"].default
        other = isinstance(given, dict) and given.get("name", usual) != usual
        return {"options": {}, **given} if other else given


class Student(Model):
    name: str = "mobilenet1"
    options: dict[str, Any] = {"stem_stride": 2}
    freeze: list[str] = option([], "modules to keep as they are, as paths or globs: stages.0.*")


class Teacher(Model):
    name: str = "resnet8"
    options: dict[str, Any] = {"stem_stride": 2}
    others: list[Model] = option([], "more teachers, of an ensemble")
    epochs: Natural = option(0, "of a teacher without weights; 0: as the student's")
    learning_rate: Positive = option(1e-2, "of a teacher without weights")
    cache: CacheFormat = option("none", "keep its logits of the training set; augments nothing")
    cache_top_k: Natural = option(0, "keep the k largest logits of an image only; 0: all")


class Distill(Section):
    hints: dict[str, str] = option({}, "FitNets (arXiv:1412.6550): student's module = teacher's")
    hint_weight: NotNegative = option(1.0, "of the mean squared distance")
    attention: dict[str, str] = option({}, "transfer (arXiv:1612.03928): student's = teacher's")
    attention_weight: NotNegative = option(1000.0, "of the squared distance, beta in the paper")
    learn_temperature: bool = option(False, "train the temperature, from loss.temperature on")


class Training(Section):
    epochs: Count = option(8, "passes over the training images; without a teacher as many steps")
    batch_size: Count = option(64, "images of an optimiser step, over all processes")
    accumulate: Count = option(1, "parts in which a batch is computed, to the same gradient")
    optimizer: Literal["sgd", "adam", "adamw"] = option("adamw", "sgd has Nesterov momentum")
    learning_rate: Positive = option(2e-2, "the highest of the schedule")
    momentum: Share = option(0.9, "of sgd")
    weight_decay: NotNegative = option(1e-2, "L2 of sgd and adam, decoupled in adamw")
    schedule: Schedule = option("cosine", "of the rate, to zero; step: a tenth at 50 % and 75 %")
    warmup: NotNegative = option(0.0, "epochs in which the learning rate rises to its highest")
    clip: NotNegative = option(0.0, "norm to which gradients are clipped; 0: not")
    amp: Literal["off", "bfloat16", "float16"] = option("off", "mixed precision")
    ema: Decay = option(0.0, "of the average of the weights that is evaluated and kept; 0: none")
    label_smoothing: Share = option(0.0, "of models without a teacher; the other: in loss")
    patience: Natural = option(0, "epochs without a better validation accuracy; 0: no end")
    nonfinite: Literal["stop", "skip"] = option("stop", "what a NaN or infinite loss does")
    checkpoint_every: Natural = option(0, "steps; 0: epochs only")
    keep: Count = option(2, "the last so many checkpoints stay")
    log_every: Count = option(10, "steps")
    device: str = option("auto", "cpu, cuda, ...; auto: the accelerator if there is one")
    threads: Threads = option(
        1, "of the CPU; small models gain little from more. 0: as PyTorch has"
    )


class Config(Section):
    """All options. Sections may be given as dictionaries: ``Config(training={"epochs": 3})``."""

    seeds: Count = option(3, "runs from different initial weights")
    first_seed: Natural = option(0, "seeds are this one and those that follow")
    baselines: bool = option(True, "also train the student without a teacher, two ways")
    wandb: str = option("", "project on Weights & Biases that is told as well; empty: none")
    data: Data = Data()
    augment: Augment = Augment()
    student: Student = Student()
    teacher: Teacher = Teacher()
    loss: dict[str, Any] = option({}, "arguments of FusedKDLoss")
    distill: Distill = Distill()
    schedules: dict[str, Ramp] = option({}, "[[epoch, value], ...] of a number in loss or distill")
    training: Training = Training()

    @field_validator("loss")
    @classmethod
    def _loss_is_one(cls, given: dict[str, Any]) -> dict[str, Any]:
        for name in given:
            if name not in LOSS_OPTIONS:
                reason = "is the trainer's own" if name in _OWN else "is unknown"
                raise ValueError(f"{name} {reason}{nearest(name, LOSS_OPTIONS)}")
        make_loss(given)
        return given

    @model_validator(mode="after")
    def _schedules_fit(self) -> Config:
        weights = {"hint_weight", "attention_weight"}
        known = weights | LOSS_OPTIONS.keys()
        for name, points in self.schedules.items():
            if name not in known:
                raise ValueError(f"schedules.{name} is unknown{nearest(name, known)}")
            epochs, values = [epoch for epoch, _ in points], [value for _, value in points]
            if not points or epochs != sorted(set(epochs)):
                raise ValueError(f"schedules.{name}: epochs must increase")
            if min(values) < 0:
                raise ValueError(f"schedules.{name}: values must not be negative")
            try:
                for value in values if name not in weights else ():
                    make_loss(self.loss | {name: value})
            except ValueError as error:
                raise ValueError(f"schedules.{name}: {error}") from error
        return self

    @model_validator(mode="after")
    def _parts_agree(self) -> Config:
        data, teacher, distill = self.data, self.teacher, self.distill
        caches, learns = teacher.cache != "none", distill.learn_temperature
        changes = self.augment.model_dump(exclude={"fgsm_share"})
        refused = {
            "data.validation and data.test leave nothing to train on": (
                data.validation + data.test >= 1
            ),
            "data.folder, size and channels need data.name=folder": (
                data.name != "folder" and bool(data.folder or data.size or data.channels)
            ),
            "teacher.cache needs images that stay as they are: augment.crop=0 ...": (
                caches and any(changes.values())
            ),
            "teacher.cache is of one teacher's logits: no others, hints or attention": (
                caches and bool(teacher.others or distill.hints or distill.attention)
            ),
            "training.warmup must be less than the epochs of student and teacher": (
                self.training.warmup >= min(self.training.epochs, teacher.epochs or math.inf)
            ),
            "schedules of a weight need the hints or the attention that it is of": (
                ("hint_weight" in self.schedules and not distill.hints)
                or ("attention_weight" in self.schedules and not distill.attention)
            ),
            "teacher.cache_top_k needs teacher.cache": bool(teacher.cache_top_k) and not caches,
            "a temperature is either learned or scheduled": learns
            and "temperature" in self.schedules,
            "a temperature that is learned starts from one number": (
                learns and not isinstance(make_loss(self.loss).temperature, (int, float))
            ),
        }
        for message, is_so in refused.items():
            if is_so:
                raise ValueError(message)
        return self


def make_loss(options: dict[str, Any]) -> FusedKDLoss:
    """FusedKDLoss as a configuration has it.

    Images without a label are distilled, unless ``distill_ignored`` says otherwise or the objective
    is one of the label (``"dkd"``).

    Raises:
        ValueError: what FusedKDLoss has to say of an option.
    """
    try:
        divergence = options.get("divergence", ())
        names = {divergence} if isinstance(divergence, str) else {*divergence}
        of_the_label = any(DIVERGENCES[name].labelled for name in names & DIVERGENCES.keys())
        given = {"distill_ignored": not of_the_label, **options}
        if isinstance(given.get("weight"), list):
            given["weight"] = torch.tensor([float(one) for one in given["weight"]])
        return FusedKDLoss(**given, return_terms=True)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(str(error)) from error


def load(path: Path | None = None, changes: dict[str, Any] | None = None) -> Config:
    """Read a TOML file, if any, and change it: ``{"training.epochs": "3"}``.

    Raises:
        SetupError: a file that cannot be read, an unknown key, a value that is not allowed.
    """
    content: dict[str, Any] = {}
    if path is not None:
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise SetupError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:  # TOML and UTF-8
            raise SetupError(f"{path} is not TOML: {error}") from error
    for key, value in (changes or {}).items():
        *sections, name = key.split(".", 1)
        table = content
        for section in sections:
            table = table.setdefault(section, {})
            if not isinstance(table, dict):
                raise SetupError(f"{section} must be a table, got {table!r}")
        table[name] = copy.deepcopy(value)
    try:
        content = tomllib.loads(tomli_w.dumps(content).encode().decode())
    except (TypeError, ValueError, RecursionError) as error:
        raise SetupError(f"an option is nothing that TOML can say: {error}") from error
    return checked(content)


def checked(content: dict[str, Any]) -> Config:
    """The configuration that ``content`` is; raises SetupError with all that is wrong with it."""
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        raise SetupError("\n".join(_in_words(one) for one in error.errors())) from error


def _in_words(error: Any) -> str:
    where = ".".join(map(str, error["loc"])) or "configuration"
    if error["type"] == "extra_forbidden":
        return f"unknown option {where}{nearest(where, [*options(), *Config.model_fields])}"
    given = "" if error["type"] == "value_error" else f", got {error['input']!r}"
    return f"{where}: {error['msg'].removeprefix('Value error, ')}{given}"


def parse(text: str, annotation: Any) -> Any:
    """A value on the command line: TOML, if it is any and the option is no text."""
    if annotation is str:
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def options() -> dict[str, tuple[Any, str]]:
    """All options by their full name, with their type and what help says of them."""
    found: dict[str, tuple[Any, str]] = {}
    for name, field in Config.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            for key, inner in section.model_fields.items():
                default = inner.get_default(call_default_factory=True)
                found[f"{name}.{key}"] = (inner.annotation, f"{inner.description} ({default!r})")
        else:
            found[name] = (field.annotation, f"{field.description} ({field.default!r})")
    for name, default in LOSS_OPTIONS.items():
        found[f"loss.{name}"] = (Any, f"of FusedKDLoss ({default!r})")
    return found


def dumps(config: Config) -> str:
    """The resolved configuration as TOML: every option, whether it was given or not."""
    return tomli_w.dumps(config.model_dump())
