"""``kdkernels search``: temperature, alpha and learning rate by Optuna, on validation images."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdkernels.train.checkpoints import write
from kdkernels.train.config import Config, checked, dumps
from kdkernels.train.errors import NonFiniteError, SetupError, require
from kdkernels.train.experiment import Experiment


def search(config: Config, trials: int, folder: Path, say: Callable[[str], None] = print) -> Config:
    """Try until there are ``trials`` finished ones in ``folder``, which an earlier search may hold.

    Returns:
        The best configuration by the validation accuracy of the first seed's distilled student;
        ``best.toml`` in the folder.

    Raises:
        SetupError: the folder's search is another one, no trial is complete, and see Experiment.
    """
    optuna = require("optuna", "optuna", "search")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    backend = optuna.storages.journal.JournalFileBackend(str(folder / "study.journal"))
    study = optuna.create_study(
        study_name="kdkernels", direction="maximize", load_if_exists=True,
        storage=optuna.storages.JournalStorage(backend),
    )  # fmt: skip
    if {"temperature", "alpha"} & {*config.schedules} or config.distill.learn_temperature:
        raise SetupError("temperature or alpha is scheduled or learned: it cannot be searched for")
    if study.user_attrs.get("config", dumps(config)) != dumps(config):
        raise SetupError(f"{folder} has trials of another configuration: name a new folder")
    seed, first = config.first_seed, Experiment(config, folder, say)
    first.splits.test = first.splits.validation  # what is chosen by has seen no test image
    study.set_user_attr("config", dumps(config))
    teachers, _ = first.teachers(seed)

    def accuracy(trial: Any) -> float:
        values = {
            "temperature": trial.suggest_float("temperature", 1.0, 16.0, log=True),
            "alpha": trial.suggest_float("alpha", 0.1, 1.0),
            "learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True),
        }
        place = folder / f"trial{trial.number}"
        run = Experiment(_changed(config, values), place, lambda text: None)
        run.splits.test = run.splits.validation
        try:
            outcome = run.distilled(seed, teachers)
        except NonFiniteError as error:  # some learning rates are too high
            say(f"trial {trial.number}: {error}")
            raise optuna.TrialPruned() from error
        shutil.rmtree(place / f"seed{seed}" / "distilled" / "checkpoints")
        found = float(outcome.result["accuracy"])
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        say(f"trial {trial.number}: {shown}: validation accuracy {found:.2%}")
        return found

    complete = len(study.get_trials(states=[optuna.trial.TrialState.COMPLETE]))
    # A sampler that depends on where the search goes on: what it has tried it is told by the study.
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials))
    study.optimize(accuracy, n_trials=max(0, trials - complete))
    if not study.get_trials(states=[optuna.trial.TrialState.COMPLETE]):
        raise SetupError(f"of {trials} trials none is complete in {folder}")
    best = checked(_changed(config, study.best_params).model_dump())
    write(folder / "best.toml", dumps(best))
    return best


def _changed(config: Config, values: dict[str, float]) -> Config:
    loss = config.loss | {name: values[name] for name in ("temperature", "alpha")}
    training = config.training.model_copy(update={"learning_rate": values["learning_rate"]})
    return config.model_copy(update={"loss": loss, "training": training})
