"""A plain DeepSpeed training script: deepspeed examples/train_plain.py --deepspeed_config examples/ds_config.json."""

import argparse

import deepspeed
import timm
import torch

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=-1)
parser.add_argument("--steps", type=int, default=20)
deepspeed.add_config_arguments(parser)
args = parser.parse_args()

torch.manual_seed(0)
model = timm.create_model(
    "vit_tiny_patch16_224",
    img_size=32,
    patch_size=4,
    embed_dim=48,
    depth=2,
    num_heads=3,
    num_classes=10,
    dynamic_img_size=True,
)
engine, optimizer, _, _ = deepspeed.initialize(args=args, model=model, model_parameters=model.parameters())
dtype = next(engine.module.parameters()).dtype

generator = torch.Generator().manual_seed(engine.global_rank)
for step in range(args.steps):
    labels = torch.randint(0, 10, (engine.train_micro_batch_size_per_gpu(),), generator=generator)
    images = torch.randn(len(labels), 3, 32, 32, generator=generator) + labels[:, None, None, None] / 5 - 1
    images, labels = images.to(engine.device, dtype), labels.to(engine.device)
    loss = torch.nn.functional.cross_entropy(engine(images).float(), labels)
    engine.backward(loss)
    engine.step()
    if engine.global_rank == 0:
        print(f"step {step} loss {loss.item():.4f} lr {engine.get_lr()[0]:.6f}", flush=True)
