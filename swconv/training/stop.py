"""Being asked to stop: SIGTERM and SIGUSR1, as schedulers send them some time before they kill. No torch: it listens early."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EXIT_CODE = 85                                                        # of a training that saved its state and can go on
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StoppedError(RuntimeError):
    """The training was asked to stop and saved its state; the same command goes on from there."""

    exit_code = EXIT_CODE


@contextmanager
def requests() -> Iterator[Callable[[], bool]]:
    """Note SIGTERM and SIGUSR1 instead of dying of them; gives a function that tells whether one came.

    For the main thread; what the signals did before, they do again afterwards.
    """
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in SIGNALS}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
