#!/usr/bin/env python3
"""Write docs/models.md: parameters and MACs of every backbone, counted here, beside the published figures.

Nothing is trained or downloaded; the models are built without weights. With ``--check`` nothing is written; the exit
code is 1 when the file on disk is not what would be written.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from generated_page import run

from efftrain_ds.cost.macs import module_macs, parameter_count
from efftrain_ds.models.adapters import accepts_sizes, create_model

OUTPUT = Path(__file__).resolve().parent.parent / "docs" / "models.md"

SOURCES = {
    "torchvision": "torchvision's documentation of the weights (num_params, GFLOPS)",
    "convnext": "github.com/facebookresearch/ConvNeXt, README.md",
    "deit": "github.com/facebookresearch/deit, README_deit.md (parameters); timm's model cards (GMACs)",
    "deit3": "github.com/facebookresearch/deit, README_revenge.md",
    "pvt": "github.com/whai362/PVT, classification/README.md (parameters; for b2 also GFLOPs); Papers with Code, page "
    "of arXiv 2106.13797 (GFLOPs of b0, b1, b3)",
    "swin": "github.com/microsoft/Swin-Transformer, README.md",
    "caformer": "github.com/sail-sg/metaformer, README.md",
    "volo": "github.com/sail-sg/volo, README.md (parameters); timm's model cards (GMACs)",
    "cswin": "github.com/microsoft/CSWin-Transformer, README.md",
}
"""Where the published figures were read."""


@dataclass(frozen=True)
class Row:
    """One backbone with its published figures.

    Attributes:
        name: for ``efftrain.model.name``.
        params: published parameters in millions, as printed; "" where none was found.
        macs: published MACs of one image in 10^9 ("FLOPs" in most of the sources), as printed; "" where none was found.
        source: key of `SOURCES`.
        side: image side in pixels.
        note: key of `NOTES` where the counts differ by more than the rounding of the published figure.
    """

    name: str
    params: str
    macs: str
    source: str
    side: int = 224
    note: str = ""


ROWS = (
    Row("resnet18", "11.689512", "1.81", "torchvision"),
    Row("resnet50", "25.557032", "4.09", "torchvision"),
    Row("convnext_tiny", "28", "4.5", "convnext", note="rounding"),
    Row("convnext_small", "50", "8.7", "convnext"),
    Row("convnext_base", "89", "15.4", "convnext"),
    Row("convnext_large", "198", "34.4", "convnext"),
    Row("deit_tiny_patch16_224", "5", "1.3", "deit", note="rounding"),
    Row("deit_small_patch16_224", "22", "4.6", "deit"),
    Row("deit_base_patch16_224", "86", "", "deit", note="rounding"),
    Row("deit3_small_patch16_224", "22.0", "4.6", "deit3", note="rounding"),
    Row("deit3_medium_patch16_224", "38.8", "8.0", "deit3"),
    Row("deit3_base_patch16_224", "86.6", "17.5", "deit3", note="rounding"),
    Row("deit3_large_patch16_224", "304.4", "61.6", "deit3"),
    Row("pvt_v2_b0", "3.7", "0.6", "pvt"),
    Row("pvt_v2_b1", "14.0", "2.1", "pvt"),
    Row("pvt_v2_b2", "25.4", "4.04", "pvt", note="counter"),
    Row("pvt_v2_b3", "45.2", "6.9", "pvt"),
    Row("pvt_v2_b4", "62.6", "", "pvt"),
    Row("pvt_v2_b5", "82.0", "", "pvt"),
    Row("swin_tiny_patch4_window7_224", "28", "4.5", "swin"),
    Row("swin_small_patch4_window7_224", "50", "8.7", "swin"),
    Row("swin_base_patch4_window7_224", "88", "15.4", "swin"),
    Row("swin_base_patch4_window12_384", "88", "47.1", "swin", 384),
    Row("swin_large_patch4_window7_224", "197", "34.5", "swin"),
    Row("caformer_s18", "26", "4.1", "caformer"),
    Row("caformer_s36", "39", "8.0", "caformer"),
    Row("caformer_m36", "56", "13.2", "caformer"),
    Row("caformer_b36", "99", "23.2", "caformer"),
    Row("volo_d1_224", "27", "6.9", "volo"),
    Row("volo_d2_224", "59", "", "volo"),
    Row("volo_d3_224", "86", "", "volo"),
    Row("volo_d4_224", "193", "", "volo"),
    Row("volo_d5_224", "296", "72.4", "volo", note="counter"),
    Row("cswin_tiny_224", "23", "4.3", "cswin", note="rounding"),
    Row("cswin_small_224", "35", "6.9", "cswin", note="cswin"),
    Row("cswin_base_224", "78", "15.0", "cswin", note="rounding"),
    Row("cswin_base_384", "78", "47.0", "cswin", 384, note="rounding"),
    Row("cswin_large_224", "173", "31.5", "cswin", note="cswin"),
    Row("cswin_large_384", "173", "96.8", "cswin", 384, note="cswin"),
)

NOTES = {
    "rounding": "printed rounded up or down, not to the nearest; our count is the model's",
    "counter": "their tool counts a little more than the products of matrices and convolutions",
    "cswin": "the authors' released code, counted with our counter, gives exactly our parameters and MACs for every "
    "size; why their table says otherwise is not established",
}

HEAD = """\
<!-- Made by tools/make_model_table.py; do not edit by hand. -->

# Backbones

Every backbone of this table takes several image sizes in one run, as EfficientTrain needs. A change of the size never
replaces a parameter: the optimizer and its ZeRO partitions keep every tensor that they were made for.

- ResNet, ConvNeXt, PVT v2, CAFormer: sides that are multiples of 32; nothing depends on the size.
- ViT, DeiT, DeiT III: multiples of the patch. The position embedding keeps its full grid and is resampled in each
  forward (by timm: bicubic, antialiased). VOLO: multiples of 16, in the same way (`efftrain_ds.models.volo`).
- Swin: multiples of 32. Windows scale with the image (side / 32 for the models below); the table of position biases
  keeps its full size and is resampled in each forward (bilinear, antialiased; `efftrain_ds.models.swin`).
- CSWin: multiples of 32. Stripes are 1, 2, side / 32 and side / 32 positions wide; nothing else depends on the size.
  timm has none, so it is written here (`efftrain_ds.models.cswin`); its parameters have the names of the authors'
  released checkpoints.

The trainer adapts these models by itself. In a loop of your own, build with
`efftrain_ds.models.adapters.create_model(name, ..., dynamic=True)`, or call `adapters.accept_sizes(model)` on timm's
VOLO or Swin before `efftrain_ds.initialize`. To use CSWin's names with `timm.create_model`, import
`efftrain_ds.models.cswin` first. Models that cannot change their size (Swin V2, BEiT, MaxViT, ...) are refused before
training starts, with the reason.

- Swin in EfficientTrain's released code: at each switch the bias tables themselves are resampled (bilinear), and the
  moments of the optimizer with them. Here the full table stays the parameter and the smaller ones are computed from
  it, so no moment has to be resampled, and a checkpoint of any stage has the same shapes. Which of the two trains
  better was not measured.
- Batch normalisation (ResNet): running statistics depend on the size of the images, so an evaluation right after a
  switch says little. Every rank has its own; those of the first rank are exported.

## Supernets

`efftrain.model.name` may also be a supernet for the method `elasticvit`: `elasticvit` (ElasticViT's convolution and
transformer stages), `elastic_autoformer_tiny`, `elastic_autoformer_small`, `elastic_autoformer_base` (AutoFormer's
plain vision transformers), or `elastic_vit` with a space of your own in `efftrain.model.kwargs`. The method card
`efftrain_ds/methods/elasticvit/README.md` has their arguments.

## Parameters and MACs

With 1,000 classes, for one image of the given side. MACs are multiply-accumulate operations of matrix products and
convolutions (most of the sources print them as "FLOPs"). "Published" is as printed by the source; "-" where none was
found.

"""


def counted(row: Row) -> tuple[int, int]:
    """(parameters, forward MACs of one image) of a backbone with 1,000 classes."""
    with torch.device("meta"):
        model = create_model(row.name, resolution=row.side, num_classes=1000, dynamic=True)
    assert accepts_sizes(model)[0]
    return parameter_count(model), module_macs(model.eval(), row.side)


def off(published: str, count: float) -> bool:
    """True where a count differs from a published figure by more than the rounding of its last digit."""
    digits = len(published.partition(".")[2])
    return bool(published) and abs(float(published) - count) > 0.5 * 10**-digits + 1e-9


def line(row: Row) -> str:
    """The row of the table."""
    params, macs = counted(row)
    published = [f"{value} {unit}" if value else "-" for value, unit in ((row.params, "M"), (row.macs, "G"))]
    note = f"{row.source}; {row.note}" if row.note else row.source
    cells = [f"`{row.name}`", str(row.side), f"{params:,}", published[0], f"{macs / 1e9:.3f} G", published[1], note]
    return f"| {' | '.join(cells)} |"


def render(rows: Sequence[Row] = ROWS) -> str:
    """The whole page."""
    lines = ["| `efftrain.model.name` | Side | Parameters | Published | MACs | Published | Source; note |"]
    lines += ["|---|---|---|---|---|---|---|", *(line(row) for row in rows), "", "Sources:", ""]
    lines += [f"- {key}: {text}." for key, text in SOURCES.items()]
    lines += ["", "Notes, where a count and a published figure differ by more than the rounding of its last digit:", ""]
    lines += [f"- {key}: {text}." for key, text in NOTES.items()]
    return HEAD + "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Write the page, or compare it with ``--check``."""
    return run(
        render,
        OUTPUT,
        "tools/make_model_table.py",
        "Write docs/models.md: parameters and MACs.",
        argv,
    )


if __name__ == "__main__":
    sys.exit(main())
