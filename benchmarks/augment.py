"""CPU time of augmenting one batch, by part, with timm's Pillow RandAugment on the same images as the yardstick.

One thread. Rounds are interleaved and the minimum and the median of each part are reported, so that other load on the
machine meets all of them; every round uses new positions, hence other operations.

    python benchmarks/augment.py --out augment.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform

from efftrain_ds.core.batch import Batch
from efftrain_ds.data.augment import BatchMixer, RandAugment, RandomErasing, horizontal_flip, normalize

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photographs(count: int, side: int) -> torch.Tensor:
    """[count, 3, side, side] uint8 images with the 1/f spectrum of photographs."""
    frequency = (torch.fft.fftfreq(side)[:, None] ** 2 + torch.fft.fftfreq(side)[None] ** 2).sqrt()
    frequency[0, 0] = 1 / side
    noise = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))
    image = torch.fft.ifft2(torch.fft.fft2(noise) / frequency).real
    image = image / image.std((1, 2, 3), keepdim=True)
    return (image * 40 + 120).clamp(0, 255).to(torch.uint8)


def parts(images: torch.Tensor) -> dict[str, Callable[[np.ndarray], object]]:
    """What is timed, by name; each takes the positions of the round."""
    ra, erasing, mixer = RandAugment(), RandomErasing(0.25), BatchMixer()
    floats = normalize(images, MEAN, STD, torch.float32)
    labels = torch.arange(len(images))
    # timm's RandAugment without the level at which its Posterize fails under Pillow 13.
    pillow = rand_augment_transform("rand-m9-mstd0.5-inc1-n2", {"img_mean": (124, 116, 104), "magnitude_max": 9.9})
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    return {
        "flip": lambda positions: horizontal_flip(images, positions, 0),
        "RandAugment m9 n2": lambda positions: ra(images, positions, 0),
        "  its draw": lambda positions: ra.draw(positions, 0),
        "normalise": lambda positions: normalize(images, MEAN, STD, torch.float32),
        "erasing": lambda positions: erasing(floats, positions, 0),
        "mixup / cutmix": lambda positions: mixer(Batch(floats, labels), 0, int(positions[0]), 0),
        "timm + Pillow RandAugment": lambda positions: [pillow(picture) for picture in pictures],
    }


def measure(side: int, count: int, rounds: int) -> dict[str, dict[str, float]]:
    """CPU milliseconds a batch of each part: minimum and median over the rounds."""
    timed = parts(photographs(count, side))
    times: dict[str, list[float]] = {name: [] for name in timed}
    for index in range(-3, rounds):
        positions = np.arange(count) + (index + 3) * count
        for name, run in timed.items():
            start = time.process_time()
            run(positions)
            if index >= 0:
                times[name].append((time.process_time() - start) * 1e3)
    return {name: {"min": min(values), "median": statistics.median(values)} for name, values in times.items()}


def main() -> None:
    """Measure, print the table, write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="samples a batch")
    parser.add_argument("--rounds", type=int, default=100, help="rounds at 32 px; a tenth of it at 224 px")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        side: measure(side, arguments.batch, max(rounds, 5))
        for side, rounds in ((32, arguments.rounds), (224, arguments.rounds // 10))
    }
    print(f"CPU ms for a batch of {arguments.batch}, 1 thread: minimum (median)")
    print(f"{'':28s}" + "".join(f"{f'{side} px':>20s}" for side in result))
    for name in result[32]:
        cells = [f"{result[side][name]['min']:.2f} ({result[side][name]['median']:.2f})" for side in result]
        print(f"{name:28s}" + "".join(f"{cell:>20s}" for cell in cells))
    if arguments.out is not None:
        about = {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
        record = {"unit": "CPU ms per batch", "batch": arguments.batch, "about": about, "results": result}
        arguments.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
