"""SU-Net: DiffuASR's noise predictor, a small convolutional U-Net over M item embeddings.

Each embedding of width d = r^2 is an r x r picture, and the M of them are the channels of one
image: convolutions mix items across channels. The layout is DDPM's U-Net (Ho et al. 2020, App. B)
with two residual blocks a level and attention in the middle; time and condition enter every
residual block as one vector.

The last convolution maps ``base`` channels to M: with base < M the output lies in a subspace of
base d of the M d dimensions. For r = 8 the deepest level is a single pixel, where the middle
attention is an affine map and a group of two channels normalises to +1 and -1. That is the released
architecture, kept as it is.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_simdiff.diffusion.denoisers import timestep_embedding

_EPS = 1e-6  # of the group normalisations


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with the conditioning vector added between them.

    Args:
        c_in (int): channels that come in.
        c_out (int): channels that go out.
        z_size (int): width of the conditioning vector.
        groups (int): of the normalisations.
        dropout_prob (float): before the second convolution.
    """

    def __init__(
        self, c_in: int, c_out: int, z_size: int, groups: int, dropout_prob: float
    ) -> None:
        super().__init__()
        self.norm_in = nn.GroupNorm(groups, c_in, eps=_EPS)
        self.conv_in = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.project = nn.Linear(z_size, c_out)
        self.norm_out = nn.GroupNorm(groups, c_out, eps=_EPS)
        self.dropout = nn.Dropout(dropout_prob)
        self.conv_out = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """[B, c_in, s, s], [B, Z] -> [B, c_out, s, s]."""
        h = self.conv_in(F.silu(self.norm_in(x)))
        h = h + self.project(F.silu(z))[:, :, None, None]
        h = self.conv_out(self.dropout(F.silu(self.norm_out(h))))
        return h + self.skip(x)


class AttentionBlock(nn.Module):
    """Single-head attention among the pixels of an image, added to it.

    Args:
        channels (int): of the image.
        groups (int): of the normalisation.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=_EPS)
        self.query = nn.Conv2d(channels, channels, 1)
        self.key = nn.Conv2d(channels, channels, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, s, s] -> [B, C, s, s]."""
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).mT for conv in (self.query, self.key, self.value))
        h = F.scaled_dot_product_attention(q, k, v)  # [B, s s, C], scale C^-1/2
        return x + self.out(h.mT.reshape(x.shape))


class Block(nn.Module):
    """A residual block and the attention that may follow it; arguments as there.

    Args:
        attends (bool): whether attention follows.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        z_size: int,
        groups: int,
        dropout_prob: float,
        attends: bool,
    ) -> None:
        super().__init__()
        self.residual = ResidualBlock(c_in, c_out, z_size, groups, dropout_prob)
        self.attention = AttentionBlock(c_out, groups) if attends else nn.Identity()

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """[B, c_in, s, s], [B, Z] -> [B, c_out, s, s]."""
        out: Tensor = self.attention(self.residual(x, z))
        return out


class SUNet(nn.Module):
    """eps_theta(x_t, t, c) of M noised item embeddings.

    Args:
        n_items (int): M, the channels of the image.
        width (int): d = r^2, the pixels of the image.
        base (int): channels of the first level.
        multipliers (list): channels of each level over ``base``; the picture halves between levels.
        n_blocks (int): residual blocks a level on the way down; one more on the way up.
        groups (int): of every normalisation.
        attention_at (list): picture sizes s at which each residual block is followed by attention.
        dropout_prob (float): inside the residual blocks.
    """

    def __init__(
        self,
        n_items: int,
        width: int,
        base: int,
        multipliers: list[int],
        n_blocks: int,
        groups: int,
        attention_at: list[int],
        dropout_prob: float,
    ) -> None:
        super().__init__()
        self.base, self.n_blocks = base, n_blocks
        z_size = 4 * base
        self.time = _two_layers(base, z_size)
        self.condition = _two_layers(width, z_size)

        def block(c_in: int, c_out: int, size: int) -> Block:
            return Block(c_in, c_out, z_size, groups, dropout_prob, attends=size in attention_at)

        channels, size = base, math.isqrt(width)
        skips = [channels]
        self.conv_in = nn.Conv2d(n_items, channels, 3, padding=1)
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        for level, multiplier in enumerate(multipliers):
            if level > 0:
                self.shrink.append(nn.Conv2d(channels, channels, 3, stride=2))
                skips.append(channels)
                size //= 2
            for _ in range(n_blocks):
                self.down.append(block(channels, base * multiplier, size))
                channels = base * multiplier
                skips.append(channels)
        self.middle_in = Block(channels, channels, z_size, groups, dropout_prob, attends=True)
        self.middle_out = Block(channels, channels, z_size, groups, dropout_prob, attends=False)
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for _ in range(n_blocks + 1):
                self.up.append(block(channels + skips.pop(), base * multiplier, size))
                channels = base * multiplier
            if level > 0:
                self.grow.append(nn.Conv2d(channels, channels, 3, padding=1))
                size *= 2
        self.norm_out = nn.GroupNorm(groups, channels, eps=_EPS)
        self.conv_out = nn.Conv2d(channels, n_items, 3, padding=1)

    def forward(self, x_t: Tensor, t: Tensor, c: Tensor) -> Tensor:
        """Predicted noise.

        Args:
            x_t (Tensor): noised embeddings, [B, M, d].
            t (LongTensor): steps in 1..T, [B].
            c (Tensor): condition vectors, [B, d].

        Returns:
            Tensor: [B, M, d].
        """
        # Papers that count steps from 0 feed t - 1.
        z = self.time(timestep_embedding(t - 1, self.base, endpoint=True)) + self.condition(c)
        h = self.conv_in(as_images(x_t))
        skips = [h]
        for number, block in enumerate(self.down):
            if number > 0 and number % self.n_blocks == 0:
                h = self.shrink[number // self.n_blocks - 1](F.pad(h, (0, 1, 0, 1)))
                skips.append(h)
            h = block(h, z)
            skips.append(h)
        h = self.middle_out(self.middle_in(h, z), z)
        for number, block in enumerate(self.up):
            if number > 0 and number % (self.n_blocks + 1) == 0:
                grow = self.grow[number // (self.n_blocks + 1) - 1]
                h = grow(F.interpolate(h, scale_factor=2.0))
            h = block(torch.cat([h, skips.pop()], 1), z)
        return as_vectors(self.conv_out(F.silu(self.norm_out(h))))


def as_images(x: Tensor) -> Tensor:
    """Entry k of a vector becomes pixel (k // r, k % r), [B, M, d] -> [B, M, r, r]."""
    size = math.isqrt(x.shape[2])
    return x.unflatten(2, (size, size))


def as_vectors(images: Tensor) -> Tensor:
    """The inverse of ``as_images``, [B, M, r, r] -> [B, M, d]."""
    return images.flatten(2)


def _two_layers(c_in: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(c_in, c_out), nn.SiLU(), nn.Linear(c_out, c_out))
