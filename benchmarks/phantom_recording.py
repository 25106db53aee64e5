"""How many times faster than real time a phantom is recorded, and in how much memory.

Run with ``OMP_NUM_THREADS=1 python benchmarks/phantom_recording.py``.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np

from braindecode_vis.parts.phantom import (
    PhantomConfig,
    make_drive,
    make_person,
    make_sensor_system,
    simulate_continuous,
)

SCHEDULES = {
    "eeg63": (0.2, 0.1),
    "eeg64-biosemi": (0.3, 0.3),
    "eeg32-emotiv": (0.2, 0.1),
    "meg-ctf272": (1.5, 0.5),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=120, help="length of each recording")
    seconds = parser.parse_args().seconds
    generator = np.random.default_rng(0)
    images = generator.integers(0, 255, (512, 96, 96, 3), dtype=np.uint8)
    start = time.perf_counter()
    drive = make_drive(images, generator.standard_normal((512, 256)), [str(row) for row in range(512)])
    print(f"stimulus drive: {512 / (time.perf_counter() - start):.0f} images per second")
    person = make_person(PhantomConfig(), 0, drive)
    for name, (interval, duration) in SCHEDULES.items():
        start = time.perf_counter()
        machine = make_sensor_system(name)
        onsets = np.arange(1.0, seconds - 2, interval)
        rows = generator.integers(0, 512, len(onsets))
        n_samples = round(seconds * machine.sfreq)
        next(simulate_continuous(person, machine, onsets, rows, duration, n_samples))
        prepared = time.perf_counter()
        for _ in simulate_continuous(person, machine, onsets, rows, duration, n_samples):
            pass
        speed = seconds / (time.perf_counter() - prepared)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"{name}: {speed:.0f} x real time ({machine.n_channels} channels at {machine.sfreq:.0f} Hz), "
            f"prepared in {prepared - start:.1f} s, {peak:.0f} MiB resident at most so far"
        )


if __name__ == "__main__":
    main()
