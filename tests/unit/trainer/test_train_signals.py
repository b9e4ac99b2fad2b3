"""The first signal asks, the second one ends, and handlers are put back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from efftrain_ds.train_signals import StopSignals


def test_first_signal_only_asks(capfd):
    asked = []
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals(lambda: asked.append(1), lambda name: f"{name}: saving") as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked == [1]
        assert signals.count == 1
    assert signal.getsignal(signal.SIGTERM) is before
    assert "SIGTERM: saving" in capfd.readouterr().err


def test_after_saving_signals_do_nothing():
    before = signal.getsignal(signal.SIGTERM)
    try:
        with StopSignals(lambda: None, str) as signals:
            signals.ignore()
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_what_a_launcher_passes_on_at_once_is_the_same_request():
    asked = []
    with StopSignals(lambda: asked.append(1), str) as signals:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.count == 2
    assert asked == [1]


def test_second_signal_ends_at_once():
    code = (
        "import os, signal\n"
        "from efftrain_ds import train_signals\n"
        "from efftrain_ds.train_signals import StopSignals\n"
        "with StopSignals(lambda: None, str):\n"
        "    train_signals.PATIENCE_S = 0\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('still here')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGTERM
    assert "still here" not in done.stdout
    assert "ending at once" in done.stderr
