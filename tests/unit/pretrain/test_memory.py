import subprocess
import sys

import numpy as np

from pretrain.memory import resident_peak

MIB = 1 << 20
ASKS = "from pretrain.memory import resident_peak; print(resident_peak())"


def test_the_peak_stays_when_memory_is_given_back() -> None:
    before = resident_peak()
    np.ones(before // 8 + 64 * MIB // 8)
    assert resident_peak() >= before + 64 * MIB


def test_the_peak_of_who_started_a_process_is_not_its_own() -> None:
    np.ones(512 * MIB // 8)
    assert resident_peak() > 512 * MIB
    asked = subprocess.run([sys.executable, "-c", ASKS], capture_output=True, text=True, check=True)
    assert int(asked.stdout) < 256 * MIB
