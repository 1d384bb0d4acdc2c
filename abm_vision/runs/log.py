"""Log the values of a run during training: one callback, for TensorBoard and any other logger.

A log is called with a name, a value, and the number of finished training steps, the arguments of
`SummaryWriter.add_scalar`: train/loss and train/lr at every step, test/top1 with `--eval-epochs`,
val/perplexity with `--eval-steps`.
For Weights & Biases: `log=lambda name, value, step: wandb.log({name: value}, step=step)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from abm_vision.abm.files import writing

Log = Callable[[str, float, int], object]
LOGS = ("tensorboard",)


@contextmanager
def opened(kind: str | None, folder: Path) -> Iterator[Log | None]:
    """Open the log that is named on the command line, in a folder of that name in the run's; None for none.

    Nothing is written before the first value.

    Raises:
        ValueError: TensorBoard is not installed.
    """
    if kind is None:
        yield None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(f"--log {kind} needs it: pip install {kind}") from error
    with ExitStack() as stack:
        writers: list[SummaryWriter] = []

        def log(name: str, value: float, step: int) -> None:
            if not writers:
                with writing(folder):
                    # Hides what an interrupted run has written for this step and later ones.
                    writer = SummaryWriter(str(folder / kind), purge_step=step)
                    writers.append(stack.enter_context(writer))
            writers[0].add_scalar(name, value, step)

        yield log
