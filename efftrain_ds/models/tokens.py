"""A learned selection of tokens in timm's Vision Transformers: after the position embedding, before the first block.

Source: SViTE+ (Chen et al., NeurIPS 2021, arXiv 2106.04533): one linear layer gives every token a score; Gumbel noise
on the scores lets training try other choices, and a straight-through softmax of temperature tau brings it a gradient.

Shape legend: B images, n tokens (P of them prefix tokens: class, distillation, registers), k kept tokens, D width.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ModelError
from ..core.rng import torch_rng

SELECTS = ("gather", "mask")


def kept_tokens(keep: float, tokens: int, prefix: int = 0) -> int:
    """Tokens that a share `keep` of `tokens` leaves: rounded half up, at least one beside the `prefix` tokens."""
    share = Fraction(str(keep))
    return _kept(share.numerator, share.denominator, tokens, prefix)


def _kept(numerator: int, denominator: int, tokens: int, prefix: int) -> int:
    # whole numbers only: exact, and a compiler follows it where the number of tokens varies
    return min(tokens, max(prefix + 1, (2 * tokens * numerator + denominator) // (2 * denominator)))


class TokenSelector(nn.Module):
    """Keeps the best tokens of every image. Stands where timm's ViT has ``patch_drop``.

    "gather" takes the k - P best patches and all prefix tokens, in their order, so the blocks see [B, k, D]. "mask" is
    what the SViTE+ code does: the k best of all n tokens stay, prefix tokens that are not among them too (so k to
    k + P tokens), the others become zeros and stay in the sequence.

    In training the choice is by noisy scores, from torch's generator of the device, and every kept token is multiplied
    by a factor of value 1 whose gradient is that of ``softmax((score + noise) / tau)``. In evaluation the choice is by
    the scores alone; equal scores go to the earlier token.

    Attributes:
        scorer: Linear(D, 1). `efftrain_dense` keeps weight masks off it. (Its bias moves all scores alike, so it has
            no effect; it is there because the published model has it.)
        tau: temperature, a scalar tensor: setting it in place compiles nothing again. It never changes which tokens
            are kept.
        noise: factor of the Gumbel noise, set in the same way. At 0 training makes the choice that evaluation makes.
        entropy: of the softmax of the scores without noise and temperature over an image's candidates, mean of the
            last batch in training, in nats: log of the number of candidates means that the scorer has no preference.
        select: "gather" or "mask".
        prefix: P.
    """

    tau: Tensor
    noise: Tensor
    entropy: Tensor

    def __init__(
        self,
        dim: int,
        *,
        keep: float,
        select: str = "gather",
        prefix: int = 1,
        tau: float = 1.0,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if select not in SELECTS:
            raise ModelError(f'select is "{select}", allowed: {", ".join(SELECTS)}')
        # values of its own: the run's random numbers must not move
        self.scorer = nn.utils.skip_init(nn.Linear, dim, 1, device=device or "cpu", dtype=dtype)
        self.scorer.efftrain_dense = True  # type: ignore[assignment]
        place = None if device is not None and torch.device(device).type == "meta" else device  # buffers stay real
        self.register_buffer("tau", torch.tensor(float(tau), device=place), persistent=False)
        self.register_buffer("noise", torch.ones((), device=place), persistent=False)
        self.register_buffer("entropy", torch.zeros((), device=place), persistent=False)
        self.select, self.prefix = select, prefix
        self.keep = keep
        if not self.scorer.weight.is_meta:
            self.reset(seed)

    @property
    def keep(self) -> float:
        """Share of all tokens that is kept, prefix tokens included, in (0, 1].

        Setting another one drops the compiled code of the process, so set it between two steps.
        """
        return self._numerator / self._denominator

    @keep.setter
    def keep(self, value: float) -> None:
        if not 0 < value <= 1:
            raise ModelError(f"kept share of the tokens is {value}, allowed: above 0, at most 1")
        share = Fraction(str(value))
        before = self.__dict__.get("_numerator"), self.__dict__.get("_denominator")
        self._numerator, self._denominator = share.numerator, share.denominator
        if before not in ((None, None), share.as_integer_ratio()) and "torch._dynamo" in sys.modules:
            # each share is compiled for training and for evaluation; after 8 versions dynamo would compile no more
            torch.compiler.reset()

    def kept(self, tokens: int) -> int:
        """k for an image of `tokens` tokens, prefix tokens included."""
        return _kept(self._numerator, self._denominator, tokens, self.prefix)

    def extra_repr(self) -> str:
        """Settings for `print`."""
        return f"keep={self.keep:g}, select={self.select}, prefix={self.prefix}"

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Draw the scorer as timm draws linear layers: truncated normal of std 0.02, bias 0."""
        weight = torch.empty(self.scorer.weight.shape, dtype=torch.float32)
        nn.init.trunc_normal_(weight, std=0.02, generator=torch_rng("cpu", seed, "token_selector"))
        self.scorer.weight.copy_(weight)
        self.scorer.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """[B, n, D] -> [B, k, D] ("gather") or [B, n, D] ("mask")."""
        return self._gathered(x) if self.select == "gather" else self._masked(x)

    def _gathered(self, x: Tensor) -> Tensor:
        images, tokens, width = x.shape
        count = self.kept(tokens)
        best, weight = self._choose(self._scores(x)[:, self.prefix :], count - self.prefix)
        # in their own order: a model that keeps all tokens computes what it computes without a selector
        best = best.sort(dim=1).values
        first = torch.arange(self.prefix, device=x.device).expand(images, -1)
        starts = torch.arange(images, device=x.device).unsqueeze(1) * tokens
        rows = (torch.cat((first, best + self.prefix), dim=1) + starts).flatten()
        # whole rows of [B n, D]: a gather with an index for every element takes three times as long on a CPU
        chosen = x.reshape(-1, width).index_select(0, rows).view(images, count, width)
        if weight is None:
            return chosen
        return chosen * self._factor(torch.ones_like(best, dtype=torch.float32), weight.gather(1, best)).to(x.dtype)

    def _masked(self, x: Tensor) -> Tensor:
        best, weight = self._choose(self._scores(x), self.kept(x.shape[1]))
        hard = torch.zeros(x.shape[:2], dtype=torch.float32, device=x.device).scatter(1, best, 1.0)[:, self.prefix :]
        return x * self._factor(hard, None if weight is None else weight[:, self.prefix :]).to(x.dtype)

    def _factor(self, hard: Tensor, weight: Tensor | None) -> Tensor:
        """[B, P + c, 1] from [B, c]: values 1 and `hard`, gradients 0 and those of `weight`."""
        if weight is not None:
            hard = hard + (weight - weight.detach())
        first = torch.ones(hard.shape[0], self.prefix, dtype=hard.dtype, device=hard.device)
        return torch.cat((first, hard), dim=1).unsqueeze(-1)

    def _scores(self, x: Tensor) -> Tensor:
        """[B, n, D] -> [B, n] in fp32."""
        return self.scorer(x).squeeze(-1).float()

    def _choose(self, scores: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
        """The `count` best of [B, c]: indices [B, count], best first; in training the softmax [B, c] too."""
        if not self.training:
            return _best(scores, count), None
        noisy = scores + self.noise * _gumbel(scores)
        with torch.no_grad():
            log = scores.log_softmax(dim=1)
            self.entropy.copy_(-(log.exp() * log).sum(dim=1).mean())
        # ranked before the temperature: a cold softmax rounds small shares to equal zeros
        return _best(noisy.detach(), count), (noisy / self.tau).softmax(dim=1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Casts of the module leave the scalars in fp32 (bf16 has 0.1 wrong by 0.2 %)."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            now = self._buffers[name]
            if old is not None and now is not None and now.dtype != old.dtype:
                self._buffers[name] = old.to(now.device)
        return self


def _best(scores: Tensor, count: int) -> Tensor:
    """Indices [B, count] of the largest scores; stable, so equal scores give equal choices on every device."""
    if torch.compiler.is_exporting():  # ONNX has no stable sort, but its TopK takes the lower index of equal values
        return scores.topk(count, dim=1).indices
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :count]


def _gumbel(like: Tensor) -> Tensor:
    """Gumbel noise ``-log(e)`` with e exponentially distributed."""
    drawn = torch.empty_like(like).exponential_()
    return -drawn.clamp(min=torch.finfo(torch.float32).tiny).log()  # a drawn 0 would make NaN of the softmax


def insert_selector(model: nn.Module, keep: float, select: str = "gather", *, seed: int = 0) -> nn.Module:
    """Give a timm Vision Transformer a token selector, in place; ``patch_drop.scorer`` is new.

    Args:
        model: ViT, DeiT or distilled DeiT; may lie on the meta device (then the scorer has no values either).
        keep: share of all tokens that is kept, prefix tokens included.
        select: "gather" or "mask".
        seed: of the scorer's first weights.

    Raises:
        ModelError: says what it cannot take.
    """
    from timm.models.vision_transformer import VisionTransformer

    kind, plain = type(model).__name__, VisionTransformer.forward_features
    if not isinstance(model, VisionTransformer) or type(model).forward_features is not plain:
        raise ModelError(
            f"{kind}: tokens can be selected in timm's VisionTransformer (ViT, DeiT, also distilled) only, where they "
            "pass `patch_drop` in one sequence"
        )
    if isinstance(model.patch_drop, TokenSelector):
        raise ModelError(f"{kind}: has a token selector already")
    if not isinstance(model.patch_drop, nn.Identity):
        raise ModelError(
            f"{kind}.patch_drop: a {type(model.patch_drop).__name__} drops tokens at this place; build the model with "
            "patch_drop_rate 0"
        )
    masked = [n for n, m in model.named_modules() if getattr(m, "block_mask", None) is not None]
    if masked and select == "gather":
        raise ModelError(
            f"{masked[0]}: its block mask is made for tokens at fixed places, which selected tokens do not have"
        )
    check_keep(model, keep)
    sample = model.patch_embed.proj.weight if hasattr(model.patch_embed, "proj") else next(model.parameters())
    selector = TokenSelector(
        model.embed_dim,
        keep=keep,
        select=select,
        prefix=model.num_prefix_tokens,
        seed=seed,
        device=sample.device,
        dtype=sample.dtype,
    )
    model.patch_drop = selector.train(model.training)
    return model


def check_keep(model: nn.Module, keep: float) -> None:
    """Refuse a share that leaves no patch of an image of the size that a Vision Transformer was built for.

    Raises:
        ModelError: names the numbers.
    """
    prefix = model.num_prefix_tokens
    total = model.patch_embed.num_patches + prefix
    if Fraction(str(keep)) * total + Fraction(1, 2) < prefix + 1:
        raise ModelError(
            f"{type(model).__name__}: a share of {keep:g} of {total} tokens leaves no patch beside {prefix} class, "
            f"distillation or register tokens; allowed: at least {(prefix + 1) / total:.3f}"
        )


def selector_of(model: nn.Module) -> TokenSelector | None:
    """The selector of a model (also inside wrappers), or None."""
    return next((module for module in model.modules() if isinstance(module, TokenSelector)), None)
