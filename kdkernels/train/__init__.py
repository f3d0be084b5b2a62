"""``kdkernels train``: a teacher, a student alone and the same student distilled, on real images.

``cli`` has the options, ``compare`` the experiment, ``trainer`` the loop that every run shares,
``data`` and ``models`` what goes into it, ``checkpoints``, ``plots`` and ``progress`` what comes
out. Only this package needs scikit-learn, matplotlib and rich: ``pip install 'kdkernels[train]'``.
"""


class TrainError(Exception):
    """A failure that the user is told in one line, without a traceback."""

    exit_code = 1


class SetupError(TrainError):
    """Nothing was trained: an option, a missing package or the run folder is in the way."""

    exit_code = 2
