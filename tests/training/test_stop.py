"""Being asked to stop: noted while one listens, deadly again afterwards."""

import os
import signal

import pytest

from swconv.training import stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_request_is_noted_and_does_not_kill(number):
    before = signal.getsignal(number)
    with stop.requests() as asked:
        assert not asked()
        os.kill(os.getpid(), number)
        assert asked()
    assert signal.getsignal(number) is before
