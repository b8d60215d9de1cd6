"""ViT-3D: the plain vision transformer on cubic patches that DCFormer is compared with.

Pre-norm blocks, learned positions, a class token that takes part in the attention and is not returned. The names of the
state dict and the order of the patches are those of the published code; its feed-forward width of 4 (where 4 times the
width was meant) is not repeated.

Source: "An Image is Worth 16x16 Words" (arXiv 2010.11929), here for volumes. Shapes: B batch, N patches, C = `dim`
channels; D, H, W voxels of the volume, d, h, w of a patch, D', H', W' the number of patches.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEAD_WIDTH = 64


class Patchify(nn.Module):
    """[B, 1, D, H, W] -> [B, H' * W' * D', h * w * d]: patches and voxels in the published axis order (H, W, D)."""

    def __init__(self, patch_size: tuple[int, int, int]):
        super().__init__()
        self.patch_size = patch_size

    def forward(self, volume: Tensor) -> Tensor:
        height, width, depth = self.patch_size
        x = volume.squeeze(1).movedim(1, -1)  # [B, H, W, D]
        x = x.unflatten(3, (-1, depth)).unflatten(2, (-1, width)).unflatten(1, (-1, height))  # [B, H', h, W', w, D', d]
        return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)  # [B, H' * W' * D', h * w * d]


class Attention(nn.Module):
    """Multi-head self-attention with its norm; heads are 64 wide whatever the width of the model."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * heads * HEAD_WIDTH, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * HEAD_WIDTH, dim))

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1 + N, C] -> [B, 1 + N, C]."""
        qkv = self.to_qkv(self.norm(x))  # [B, 1 + N, 3 * heads * 64]
        query, key, value = qkv.unflatten(-1, (3, self.heads, HEAD_WIDTH)).permute(
            2, 0, 3, 1, 4
        )  # [B, heads, 1 + N, 64]
        mixed = F.scaled_dot_product_attention(query, key, value)  # [B, heads, 1 + N, 64]
        return self.to_out(mixed.transpose(1, 2).flatten(2))  # [B, 1 + N, C]


class FeedForward(nn.Module):
    """Point-wise expansion and contraction with its norm."""

    def __init__(self, dim: int, inner: int):
        super().__init__()
        # Layer 3 is the published drop-out of probability 0; the published keys count it.
        self.net = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, inner), nn.GELU(), nn.Identity(), nn.Linear(inner, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Transformer(nn.Module):
    """The blocks; each is an attention part and a feed-forward part, both with a residual connection."""

    def __init__(self, dim: int, depth: int, heads: int, inner: int):
        super().__init__()
        blocks = (nn.ModuleList([Attention(dim, heads), FeedForward(dim, inner)]) for _ in range(depth))
        self.layers = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, 1 + N, C] -> the input and the output of every block, each [B, 1 + N, C]."""
        hidden_states = [x]
        for attention, feed_forward in self.layers:
            x = x + attention(x)
            x = x + feed_forward(x)
            hidden_states.append(x)
        return hidden_states


class ViTEncoder(nn.Module):
    """Patch embedding, class token, positions and blocks (the part below the key prefix `encoder.`)."""

    def __init__(self, grid: tuple[int, int, int], patch_size: tuple[int, int, int], dim: int, *transformer_sizes: int):
        super().__init__()
        self.grid = grid  # (H', W', D')
        voxels = math.prod(patch_size)
        self.pos_embedding = nn.Parameter(0.02 * torch.randn(1, 1 + math.prod(grid), dim))
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.to_patch_embedding = nn.Sequential(
            Patchify(patch_size), nn.LayerNorm(voxels), nn.Linear(voxels, dim), nn.LayerNorm(dim)
        )
        self.transformer = Transformer(dim, *transformer_sizes)

    def forward(self, volume: Tensor) -> list[Tensor]:
        """[B, 1, D, H, W] -> depth + 1 hidden states [B, D' * H' * W', C]."""
        x = self.to_patch_embedding(volume)  # [B, H' * W' * D', C]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # [B, 1 + N, C]
        hidden_states = self.transformer(x + self.pos_embedding)  # depth + 1 of [B, 1 + N, C]
        return [self._depth_first(state[:, 1:]) for state in hidden_states]

    def _depth_first(self, x: Tensor) -> Tensor:
        """[B, H' * W' * D', C] -> [B, D' * H' * W', C], the token order of every encoder here."""
        return x.unflatten(1, self.grid).movedim(3, 1).flatten(1, 3)


class ViT3D(nn.Module):
    """The encoder: a volume in, the patch embeddings and the output of every block out.

    Args:
        input_size: (H, W, D) of the volumes in voxels, fixed by the learned positions.
        patch_size: (H, W, D) of a patch, each a divisor of the input size.
        dim: width C.
        depth: number of blocks.
        heads: attention heads of width 64.
        mlp_dim: inner width of the feed-forward part, 4 * dim unless given.
    Attributes:
        channels: width of each hidden state.
    Raises:
        ValueError: the patches do not tile the volume.
    """

    def __init__(
        self,
        input_size: tuple[int, int, int],
        patch_size: tuple[int, int, int],
        dim: int,
        depth: int,
        heads: int = 8,
        mlp_dim: int | None = None,
    ):
        super().__init__()
        self.input_size, patch_size = tuple(input_size), tuple(patch_size)
        if any(size % patch for size, patch in zip(self.input_size, patch_size, strict=True)):
            raise ValueError(f"ViT3D: patch_size {patch_size} does not divide input_size {self.input_size} (H, W, D)")
        grid = tuple(size // patch for size, patch in zip(self.input_size, patch_size, strict=True))
        self.channels = (dim,) * (depth + 1)
        self.encoder = ViTEncoder(grid, patch_size, dim, depth, heads, mlp_dim or 4 * dim)

    def token_grid(self, level: int) -> tuple[int, int, int]:
        """(D', H', W') of the patches; the same at every level."""
        height, width, depth = self.encoder.grid
        return depth, height, width

    def num_tokens(self, level: int) -> int:
        """Number of patches; the same at every level."""
        return math.prod(self.token_grid(level))

    def forward(self, volume: Tensor) -> list[Tensor]:
        """Encode volumes.

        Args:
            volume: [B, 1, D, H, W] in [0, 1], of `input_size`.
        Returns:
            depth + 1 hidden states [B, D' * H' * W', C], the patch embeddings first, D' slowest and W' fastest.
        Raises:
            ValueError: another shape.
        """
        height, width, depth = self.input_size
        if volume.ndim != 5 or volume.shape[1:] != (1, depth, height, width):
            expected = f"[B, 1, {depth}, {height}, {width}]"
            raise ValueError(f"ViT3D: expected volumes {expected}, found shape {tuple(volume.shape)}")
        return self.encoder(volume)
