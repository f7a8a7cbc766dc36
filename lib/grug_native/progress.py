"""The progress line of a run."""

import logging
from typing import final


@final
class ProgressLine:
    """Step, percentage, loss, learning rate, tokens per second and time left.

    A bar in a terminal or a notebook; elsewhere (nohup, a pipe, CI) a line of the log every ten seconds.
    """

    def __init__(self, num_steps: int, *, start_step: int = 0):
        """Shows the line.

        Args:
            num_steps: Steps of the whole run.
            start_step: Steps that were done before, in the run that this one resumes.
        """
        # Here and not above: choosing between a bar and log lines imports IPython.
        from tqdm_loggable.auto import tqdm
        from tqdm_loggable.tqdm_logging import tqdm_logging

        self._is_log = issubclass(tqdm, tqdm_logging)
        self._logger = logging.getLogger(tqdm_logging.__module__)
        self._previous_level = self._logger.level
        self._handler = None if self._logger.hasHandlers() else logging.StreamHandler()
        self._logger.setLevel(logging.INFO)
        if self._handler is not None:
            self._handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
            self._logger.addHandler(self._handler)
        self._num_steps = num_steps
        self._bar = tqdm(desc="train", total=num_steps, initial=start_step, unit="step", dynamic_ncols=True)

    def update(self, steps_done: int, *, loss: float, learning_rate: float, tokens_per_second: float) -> None:
        """Brings the line up to date; cheap enough for every step.

        Args:
            steps_done: Steps of the whole run that are done.
            loss: Nats per token.
            learning_rate: Of the step just done.
            tokens_per_second: Over all devices.
        """
        postfix = f"loss={loss:.4g}, lr={learning_rate:.2e}, {tokens_per_second:,.0f} tokens/s"
        if self._is_log:  # a bar shows the percentage itself
            postfix = f"{steps_done / self._num_steps:.1%}, {postfix}"
        self._bar.set_postfix_str(postfix, refresh=False)
        self._bar.update(steps_done - self._bar.n)

    def close(self) -> None:
        """Shows the last state and ends the line."""
        self._bar.close()
        self._logger.setLevel(self._previous_level)
        if self._handler is not None:
            self._logger.removeHandler(self._handler)
