"""BootPIG in PyTorch, after the paper's equations: what our implementation is compared with.

Two of diffusers' UNets, hooks that collect what enters each self-attention layer of the one, and an
attention processor of its own in the other. Nothing is batched or shared that need not be: samples
and references go one by one. Everything runs in float64, so a difference is the other side's.
"""

import dataclasses
import itertools
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

# Of each reference, by the layer's name: [b, n, d].
Features = dict[str, Tensor]


@dataclasses.dataclass
class ReferenceSelfAttention:
    """A diffusers attention processor for `attn1` of the Base UNet: Eq. 2, 3 and 5-8.

    It is plain self-attention for samples without references.
    """

    references: list[Tensor]
    keep: list[bool]
    key_scale: float
    strategy: str

    def __call__(self, attn: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        assert not any(value is not None for value in kwargs.values())
        return torch.stack(
            [
                self.pooled(attn, f, [features[b] for features in self.references])
                if self.keep[b]
                else self.rsa(attn, f)
                for b, f in enumerate(hidden_states)
            ]
        )

    def rsa(self, attn: Any, f: Tensor, *f_refs: Tensor) -> Tensor:
        """Eq. 3, and Eq. 2 where there is no reference; `f` is [n, d]."""
        q = attn.to_q(f)
        k = attn.to_k(torch.cat([f, *(self.key_scale * f_ref for f_ref in f_refs)]))
        v = attn.to_v(torch.cat([f, *f_refs]))
        heads = []
        for q_h, k_h, v_h in zip(*(x.chunk(attn.heads, dim=-1) for x in (q, k, v)), strict=True):
            heads.append(torch.softmax(q_h @ k_h.T / q_h.shape[-1] ** 0.5, dim=-1) @ v_h)
        linear, dropout = attn.to_out
        return dropout(linear(torch.cat(heads, dim=-1)))

    def pooled(self, attn: Any, f: Tensor, f_refs: list[Tensor]) -> Tensor:
        """Eq. 5-8, and the other poolings of Fig. 6 and the release."""
        if self.strategy == "concat":
            return self.rsa(attn, f, *f_refs)
        o = self.rsa(attn, f)
        o_refs = torch.stack([self.rsa(attn, f, f_ref) for f_ref in f_refs])
        n = torch.linalg.vector_norm(o_refs - o, dim=-1)
        if self.strategy == "softmax":
            p = torch.exp(n) / torch.exp(n).sum(dim=0)
            return o + (p[..., None] * (o_refs - o)).sum(dim=0)
        if self.strategy == "average":
            return o_refs.mean(dim=0)
        assert self.strategy == "argmax"
        return torch.stack([o_refs[i, token] for token, i in enumerate(n.argmax(dim=0))])


class TorchBootPIG:
    """The Base UNet `theta` and the Reference UNet `phi`; both are changed in place."""

    def __init__(self, base: UNet2DConditionModel, reference: UNet2DConditionModel):
        self.base = base.double()
        self.reference = reference.double()
        self.stock_processors = dict(base.attn_processors)
        self.collected: Features = {}
        for name, layer in reference.named_modules():
            if name.endswith(".attn1"):

                def collect(_: Any, args: tuple[Tensor, ...], name: str = name) -> None:
                    self.collected[name] = args[0]

                layer.register_forward_pre_hook(collect)

    def features(self, latents: Tensor, t: Tensor, text: Tensor) -> Features:
        """What enters each `attn1` of the Reference UNet, in execution order."""
        self.collected = {}
        self.reference(latents, t, text)
        return self.collected

    def predict(
        self,
        latents: Tensor,
        t: Tensor,
        text: Tensor,
        references: list[Features],
        *,
        keep: list[bool] | None = None,
        key_scale: float = 1.0,
        strategy: str = "softmax",
    ) -> Tensor:
        """The Base UNet's prediction; without `references` that of stock Stable Diffusion."""
        processors = dict(self.stock_processors)
        for name in processors if references else ():
            layer = name.removesuffix(".processor")
            if layer.endswith(".attn1"):
                processors[name] = ReferenceSelfAttention(
                    [features[layer] for features in references],
                    keep or [True] * len(latents),
                    key_scale,
                    strategy,
                )
        self.base.set_attn_processor(processors)
        return self.base(latents, t, text).sample

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The paper's setting, by our names: of theta the `attn1`, of phi what got a gradient."""
        named = itertools.chain(
            ((f"base.{name}", p) for name, p in self.base.named_parameters() if ".attn1." in name),
            ((f"reference.{name}", p) for name, p in self.reference.named_parameters()),
        )
        return {name: parameter for name, parameter in named if parameter.grad is not None}


@dataclasses.dataclass(frozen=True)
class Process:
    """The noising process with Stable Diffusion's betas, and what the network predicts."""

    beta_start: float
    beta_end: float
    prediction_type: str

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, shaped to multiply [b, c, h, w]."""
        betas = np.linspace(self.beta_start**0.5, self.beta_end**0.5, 1000) ** 2
        alphas_cumprod = torch.from_numpy(np.cumprod(1 - betas))[t].reshape(-1, 1, 1, 1)
        return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()

    def noised(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha_t x + sigma_t eps."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha * x + sigma * noise

    def truth(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The noise (Eq. 1), or the velocity alpha_t eps - sigma_t x."""
        alpha, sigma = self.alpha_sigma(t)
        return noise if self.prediction_type == "epsilon" else alpha * noise - sigma * x


def nchw(x: Any) -> Tensor:
    """An NHWC array in PyTorch's layout and float64."""
    return torch.from_numpy(np.moveaxis(np.asarray(x, np.float64), -1, -3).copy())


def tensor(x: Any) -> Tensor:
    """An array without spatial axes, in float64."""
    return torch.from_numpy(np.asarray(x, np.float64))


def loss(
    model: TorchBootPIG,
    process: Process,
    encoded: Any,
    empty_text: Any,
    draws: Any,
    *,
    reference_timestep: str | int,
    reference_key_scale: float,
) -> Tensor:
    """Eq. 1 for each sample, with dropped references (§3.3) and dropped captions (Algorithm 1)."""
    t = torch.from_numpy(np.array(draws.t, np.int64))
    x = nchw(encoded.target.mean) + nchw(encoded.target.std) * nchw(draws.target_posterior)
    r = nchw(encoded.reference.mean) + nchw(encoded.reference.std) * nchw(draws.reference_posterior)
    t_reference = t if reference_timestep == "same" else torch.zeros_like(t)
    if reference_timestep == "same":
        r = process.noised(r, nchw(draws.reference_noise), t)
    text = tensor(encoded.text)
    features = model.features(
        r, t_reference, text if encoded.reference_text is None else tensor(encoded.reference_text)
    )
    seen = [
        caption if keep else tensor(empty_text)
        for caption, keep in zip(text, np.asarray(draws.keep_caption), strict=True)
    ]
    noise = nchw(draws.target_noise)
    prediction = model.predict(
        process.noised(x, noise, t),
        t,
        torch.stack(seen),
        [features],
        keep=np.asarray(draws.keep_reference).tolist(),
        key_scale=reference_key_scale,
    )
    return ((process.truth(x, noise, t) - prediction) ** 2).mean(dim=(1, 2, 3))


def sample(
    model: TorchBootPIG,
    process: Process,
    scheduler: Any,
    initial_latents: Any,
    text: Any,
    empty_text: Any,
    reference_latents: Any,
    reference_text: Any,
    reference_noise: Any,
    *,
    image_guidance_scale: float,
    guidance_scale: float,
    strategy: str,
    key_scale: float,
) -> Tensor:
    """Eq. 4 at each timestep of one of diffusers' schedulers, each sample with its own references.

    `reference_latents` is [b, K, h, w, c]; `reference_noise` has a leading axis for the steps.
    """
    x, text = nchw(initial_latents), tensor(text)
    empty = tensor(empty_text).expand_as(text)
    with torch.no_grad():
        for i, step in enumerate(scheduler.timesteps):
            t = step.repeat(len(x))
            references = [
                model.features(
                    process.noised(
                        nchw(reference_latents[:, k]), nchw(reference_noise[i][:, k]), t
                    ),
                    t,
                    tensor(reference_text),
                )
                for k in range(reference_latents.shape[1])
            ]
            how: dict[str, Any] = {"key_scale": key_scale, "strategy": strategy}
            u_sa = model.predict(x, t, empty, [])
            u_rsa = model.predict(x, t, empty, references, **how)
            u_rsa_text = model.predict(x, t, text, references, **how)
            guided = (
                u_sa + image_guidance_scale * (u_rsa - u_sa) + guidance_scale * (u_rsa_text - u_rsa)
            )
            x = scheduler.step(guided, step, x).prev_sample
    return x
