"""``kdkernels train``: from a teacher, a student and images to a better student.

``config`` has the options, ``data`` and ``augment`` the images, ``models`` what is trained,
``distill`` what is minimised, ``trainer`` the loop, ``evaluation`` how good it is, ``checkpoints``
what survives, ``callbacks`` who is told, ``experiment`` the runs and their controls, ``report``
what they come to; ``export``, ``search`` and ``cli`` the commands. Only this package needs the
extra ``train``.
"""

from kdkernels.train.callbacks import Callback
from kdkernels.train.config import Config
from kdkernels.train.evaluation import evaluate
from kdkernels.train.trainer import Result, Trainer

__all__ = ["Callback", "Config", "Result", "Trainer", "evaluate"]
