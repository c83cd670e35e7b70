"""Classifier-free guidance: the paper's Eq. 4 with three branches, and the plain form with two.

Guidance is affine in the model outputs with weights that sum to one, so it means the same for noise
and for velocity predictions, and can be applied to either before the solver.
"""

import jax
from jaxtyping import Array, Float

# A scale may be a Python number or a traced scalar: a new value then needs no new compilation.
Scale = float | jax.Array


def guide(
    u_sa: Float[Array, "*shape"],
    u_rsa: Float[Array, "*shape"],
    u_rsa_text: Float[Array, "*shape"],
    image_guidance_scale: Scale,
    guidance_scale: Scale,
) -> Float[Array, "*shape"]:
    """Eq. 4: U_SA + eta_im (U_RSA - U_SA) + eta_txt (U_RSA,c - U_RSA).

    Repairs a misprint. Eq. 4 as printed subtracts U_RSA(x, t, f_ref, c) from itself, so that its
    last term is zero. The subtrahend here has no caption: the text below the equation says that the
    second evaluation sees "just image information" and only the last one images and captions, and
    the difference of those two is the direction of the text.

    Args:
        u_sa: U_SA(x, t), the Base UNet with the empty caption and without references.
        u_rsa: U_RSA(x, t, f_ref), with references and the empty caption.
        u_rsa_text: U_RSA(x, t, f_ref, c), with references and the caption.
        image_guidance_scale: eta_im; 5.0 in the paper.
        guidance_scale: eta_txt (printed as eta_text+im); 7.5 in the paper.

    Returns:
        The guided model output. Scales of one give `u_rsa_text`.
    """
    return u_sa + image_guidance_scale * (u_rsa - u_sa) + guidance_scale * (u_rsa_text - u_rsa)


def classifier_free_guidance(
    u_uncond: Float[Array, "*shape"],
    u_text: Float[Array, "*shape"],
    guidance_scale: Scale,
) -> Float[Array, "*shape"]:
    """U + eta (U_c - U), for text alone (Ho & Salimans, arXiv 2207.12598, in diffusers' scale).

    Args:
        u_uncond: the model output for the empty caption.
        u_text: the model output for the caption.
        guidance_scale: eta; one means no guidance.

    Returns:
        The guided model output.
    """
    return u_uncond + guidance_scale * (u_text - u_uncond)
