"""CPU time of reading one sample: positioned reads through the index against webdataset's stream of the same shards.

Both deliver the undecoded image bytes and the label. Rounds are interleaved and the median of each is reported, so that
other load on the machine meets all of them. Files are in the page cache: this is the cost of the code, not of a disk.

    python benchmarks/reader.py --out reader.json
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import platform
import statistics
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import webdataset

from efftrain_ds.data.manifest import INDEX, ROW, Manifest, Shard
from efftrain_ds.data.order import SampleOrder
from efftrain_ds.data.reader import ShardReader


def write_shards(folder: Path, shards: int, samples: int, size: int) -> Manifest:
    """Shards of random payloads of about `size` bytes in the layout of ``efftrain shards build``.

    Plain ustar headers: webdataset's own writer adds an extended header to every member (a fractional time), which
    would double the parsing its reader is measured by.
    """
    rng = np.random.default_rng(0)
    rows, entries = [], []
    for number in range(shards):
        path = folder / f"shard-{number:03d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for k in range(samples):
                payload = rng.bytes(int(size * rng.uniform(0.5, 1.5)))
                for suffix, data in (("jpg", payload), ("cls", str(k % 1000).encode())):
                    info = tarfile.TarInfo(f"{number * samples + k:08d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        with tarfile.open(path) as tar:
            rows += [(number, m.offset_data, m.size, 0, 1, 1) for m in tar if m.name.endswith(".jpg")]
        data = path.read_bytes()
        entries.append(Shard(path.name, len(data), hashlib.sha256(data).hexdigest(), samples))
    table = np.array(rows, dtype=ROW)
    table["label"] = np.arange(len(table)) % samples % 1000
    (folder / INDEX).write_bytes(table.tobytes())
    return Manifest(folder, "train", tuple(map(str, range(1000))), tuple(entries), len(table), "")


def indexed(manifest: Manifest, ids: np.ndarray) -> int:
    """Read all samples in the given order, 128 at a time; returns the bytes read."""
    reader, total = ShardReader(manifest), 0
    for start in range(0, len(ids), 128):
        total += sum(len(payload) for payload, _ in reader.read(ids[start : start + 128]))
    reader.close()
    return total


def streamed(manifest: Manifest) -> int:
    """Read all samples with webdataset, in file order, without shuffling or decoding; returns the bytes read."""
    urls = [str(manifest.shard_path(i)) for i in range(len(manifest.shards))]
    total = 0
    for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False):
        total += len(sample["jpg"])
        int(sample["cls"])
    return total


def parsed(manifest: Manifest) -> int:
    """Read all samples with the standard library's tarfile in streaming mode; returns the bytes read."""
    total = 0
    for number in range(len(manifest.shards)):
        with tarfile.open(manifest.shard_path(number), "r|") as tar:
            for member in tar:
                data = tar.extractfile(member).read()
                total += len(data) if member.name.endswith(".jpg") else 0
                tar.members = []
    return total


def measure(candidates: dict[str, Callable[[], int]], samples: int, rounds: int) -> dict[str, dict[str, object]]:
    """CPU microseconds a sample of each candidate: median and all rounds, interleaved after one warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    sizes = {run() for run in candidates.values()}
    if len(sizes) != 1:
        raise RuntimeError(f"the candidates read different amounts: {sorted(sizes)} bytes")
    for _ in range(rounds):
        for name, run in candidates.items():
            start = time.process_time()
            run()
            times[name].append((time.process_time() - start) / samples * 1e6)
    return {
        name: {"median_us": round(statistics.median(t), 2), "rounds_us": [round(x, 2) for x in t]}
        for name, t in times.items()
    }


def main() -> int:
    """Run the comparison; the exit status is 1 if the indexed read costs more than a third of webdataset's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[93_000, 30_000, 1_000], help="mean payload in bytes")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--samples", type=int, default=250, help="samples of each shard")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    results, passed = [], True
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            manifest = write_shards(Path(folder), arguments.shards, arguments.samples, size)
            n = manifest.samples
            order = SampleOrder([s.n for s in manifest.shards], seed=0, streams=12, shuffle_block=4096)
            shuffled, natural = order.ids(0, n), np.arange(n)
            times = measure(
                {
                    "indexed, plan order": lambda m=manifest, ids=shuffled: indexed(m, ids),
                    "indexed, file order": lambda m=manifest, ids=natural: indexed(m, ids),
                    "tarfile stream": lambda m=manifest: parsed(m),
                    "webdataset": lambda m=manifest: streamed(m),
                },
                n,
                arguments.rounds,
            )
        ratio = times["indexed, plan order"]["median_us"] / times["webdataset"]["median_us"]
        passed &= ratio <= 1 / 3
        results.append({"payload_bytes": size, "samples": n, "cpu": times, "ratio_to_webdataset": round(ratio, 3)})
        columns = ", ".join(f"{name} {t['median_us']:.1f}" for name, t in times.items())
        print(f"{size} bytes: CPU us a sample: {columns}; indexed / webdataset = {ratio:.2f}")
    report = {
        "benchmark": "reader",
        "claim": "an indexed read costs at most 1/3 of webdataset's CPU time",
        "passed": passed,
        "webdataset": webdataset.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "rounds": arguments.rounds,
        "results": results,
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
