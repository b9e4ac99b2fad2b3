"""``efftrain shards``: pack, index and audit shards."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..core.errors import ShardError
from ..data.audit import audit_shards, index_shards
from ..data.build import build_shards
from ..data.hub_source import hub_source
from ..data.rendition import DEFAULT_QUALITY
from ..data.sources import FolderSource, IdxSource, Source, torchvision_source
from ..data.tar_source import TarClassSource

FAILED_AUDIT = 2


def add_parser(subparsers: Any) -> None:
    """Register the verb ``shards`` with an `argparse` sub-parser collection."""
    parser = subparsers.add_parser("shards", help="pack, index and audit shards")
    verbs = parser.add_subparsers(dest="shards_verb", required=True, metavar="build|index|audit")
    _add_build(verbs)

    index = verbs.add_parser("index", help="make a manifest for shards that webdataset wrote")
    index.add_argument("folder", type=Path, help="folder of *.tar files")
    index.add_argument("--split", default="train", help="name of the split (default: train)")
    index.add_argument("--classes", type=Path, help="text file with one class name a line")
    _finish(index, _index)

    audit = verbs.add_parser("audit", help="compare a shard folder with its manifest")
    audit.add_argument("folder", type=Path, help="shard folder")
    audit.add_argument("--decode", action="store_true", help="also decode every image")
    _finish(audit, _audit)


def _add_build(verbs: Any) -> None:
    build = verbs.add_parser("build", help="pack images into shards; run it again to go on after an interruption")
    kind = build.add_mutually_exclusive_group(required=True)
    kind.add_argument("--folder", type=Path, help="folder with one subfolder of images for each class")
    kind.add_argument(
        "--tar-per-class",
        type=Path,
        metavar="PATH",
        help="archive of one tar file for each class, or folder of such files",
    )
    kind.add_argument("--hf", metavar="NAME", help="data set of Hugging Face datasets: saved folder or name")
    kind.add_argument("--torchvision", metavar="NAME", help="data set of torchvision, e.g. CIFAR10 (needs --root)")
    kind.add_argument("--idx-images", type=Path, metavar="FILE", help="IDX file of images (needs --idx-labels)")
    build.add_argument("--idx-labels", type=Path, metavar="FILE", help="IDX file of labels")
    build.add_argument("--classes", type=Path, help="text file with one class name a line, for --idx-images")
    build.add_argument("--root", type=Path, help="folder of the torchvision data set")
    build.add_argument("--hf-split", help="split of the data set of --hf (default: train, or test with --test)")
    build.add_argument("--hf-config", help="configuration of the data set of --hf, where it has several")
    build.add_argument("--image-column", metavar="NAME", help="column of the images (--hf; default: the only one)")
    build.add_argument("--label-column", metavar="NAME", help="column of the labels (--hf; default: the only one)")
    part = build.add_mutually_exclusive_group()
    part.add_argument("--train", dest="train", action="store_true", default=None, help="training part (default)")
    part.add_argument("--test", dest="train", action="store_false", help="held-out part (torchvision, hf)")
    build.add_argument("--download", action="store_true", help="let torchvision fetch missing files")
    build.add_argument("--out", type=Path, required=True, help="folder for the shards")
    build.add_argument("--split", help="name of the split (default: train, or val with --test)")
    size = build.add_mutually_exclusive_group()
    size.add_argument("--shard-mb", type=float, default=200.0, help="size of a shard in MB (default: 200)")
    size.add_argument("--samples-per-shard", type=int, help="samples of a shard, instead of its size")
    build.add_argument("--seed", type=int, default=0, help="seed of the order (default: 0)")
    build.add_argument("--workers", type=int, default=1, help="processes (default: 1)")
    build.add_argument(
        "--short-side",
        "--short_side",
        type=int,
        metavar="PX",
        help="make a rendition: resize images with a larger short side to so many pixels",
    )
    build.add_argument(
        "--quality",
        type=int,
        default=DEFAULT_QUALITY,
        help=f"JPEG quality of resized images (default: {DEFAULT_QUALITY})",
    )
    build.add_argument("--min-side", type=int, help="smallest side in pixels (default: 32 for files, else 8)")
    _finish(build, _build)


def _finish(parser: argparse.ArgumentParser, func: Callable[[argparse.Namespace], int]) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(func=func)


def _classes(path: Path | None) -> list[str] | None:
    if path is None:
        return None
    if not path.is_file():
        raise ShardError(f"{path}: no such file; --classes names a text file with one class name a line")
    return path.read_text().splitlines()


def _source(args: argparse.Namespace) -> Source:
    if args.folder is not None:
        return FolderSource(args.folder)
    if args.tar_per_class is not None:
        return TarClassSource(args.tar_per_class)
    if args.hf is not None:
        split = args.hf_split or ("test" if args.train is False else "train")
        return hub_source(args.hf, split=split, config=args.hf_config, image=args.image_column, label=args.label_column)
    if args.torchvision is not None:
        if args.root is None:
            raise ShardError("--torchvision needs --root, the folder of the data set")
        train = args.train is not False
        return torchvision_source(args.torchvision, args.root, train=train, download=args.download)
    if args.idx_labels is None:
        raise ShardError("--idx-images needs --idx-labels")
    return IdxSource(args.idx_images, args.idx_labels, _classes(args.classes))


def _build(args: argparse.Namespace) -> int:
    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done}/{total} shards", end="\n" if done == total else "", file=sys.stderr, flush=True)

    report = build_shards(
        _source(args),
        args.out,
        split=args.split or ("val" if args.train is False else "train"),
        shard_bytes=round(args.shard_mb * 1e6),
        samples_per_shard=args.samples_per_shard,
        seed=args.seed,
        workers=args.workers,
        min_side=args.min_side,
        short_side=args.short_side,
        quality=args.quality,
        progress=progress,
    )
    if args.json:
        print(json.dumps(asdict(report), indent=1))
        return 0
    print(
        f"{report.folder}: {report.packed} images in {report.shards} shards, {report.bytes / 1e6:.1f} MB "
        f"({report.reused} shards kept from an earlier run)"
    )
    if report.rejected:
        reasons = ", ".join(f"{reason} {count}" for reason, count in report.reasons.items())
        print(f"{report.rejected} of {report.source} images rejected ({reasons}), see rejected.jsonl")
    if report.duplicates:
        print(f"{report.duplicates} images occur more than once, see duplicates.jsonl")
    if report.rendition is not None:
        resized, r = report.kinds.get("resized", 0), report.rendition
        print(
            f"rendition: {resized} images resized to short side {r.short_side}, JPEG quality {r.quality} ({r.encoder})"
        )
    print(f"data set {report.digest[:16]}")
    return 0


def _index(args: argparse.Namespace) -> int:
    manifest = index_shards(args.folder, split=args.split, classes=_classes(args.classes))
    if args.json:
        shape = {"samples": manifest.samples, "shards": len(manifest.shards), "classes": len(manifest.classes)}
        print(json.dumps({"folder": str(manifest.folder), "digest": manifest.digest, **shape}, indent=1))
    else:
        print(
            f"{manifest.folder}: {manifest.samples} images in {len(manifest.shards)} shards, "
            f"{len(manifest.classes)} classes, data set {manifest.digest[:16]}"
        )
    return 0


def _audit(args: argparse.Namespace) -> int:
    report = audit_shards(args.folder, decode=args.decode)
    if args.json:
        print(json.dumps({"ok": report.ok, **asdict(report)}, indent=1))
    else:
        for finding in report.findings:
            print(finding)
        verdict = "no findings" if report.ok else f"{len(report.findings)} findings"
        print(f"{report.folder}: {report.samples} images in {report.shards} shards, {verdict}")
    return 0 if report.ok else FAILED_AUDIT
