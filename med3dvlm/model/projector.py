"""Projectors: hidden states of the image encoder in, image tokens of the language model out.

Five kinds, chosen by `mm_projector_type`. `linear`, `mlp` and `mhsa` map every token of the last hidden state;
`low_high_mlp` and `mixer` take the last two hidden states and put the tokens of the finer one first. None has a
residual connection.

Source: Med3DVLM (arXiv 2503.20047), section on the dual-stream MLP-Mixer projector; MLP-Mixer (arXiv 2105.01601). Names
of the state dict as in the published checkpoints. Shapes: B batch, N tokens, C channels of the encoder, H hidden size
of the language model; "low" is the finer (last but one) level of the encoder, "high" the coarser (last) one.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_SIZES = {  # what each kind takes of a configuration, besides `hidden_size`
    "linear": ("mm_hidden_size",),
    "mlp": ("mm_hidden_size", "mm_mlp_depth"),
    "low_high_mlp": ("low_input_size", "high_input_size", "mm_mlp_depth"),
    "mixer": ("low_input_size", "low_output_size", "high_input_size", "high_output_size", "mm_mlp_depth"),
    "mhsa": ("mm_hidden_size",),
}
PROJECTORS = tuple(_SIZES)


def build_projector(config) -> nn.Module:
    """Build the projector that a configuration names.

    Args:
        config: any object with `mm_projector_type`, `hidden_size` (H) and, where the kind uses them,
            `mm_hidden_size` (C of the last hidden state; linear, mlp, mhsa), `mm_mlp_depth` (linear layers per MLP),
            `num_heads` (mhsa, 8 where absent), `low_input_size` and `high_input_size` ([tokens, channels]; for
            low_high_mlp also the channels alone), `low_output_size` and `high_output_size` (mixer: tokens after each
            layer).
    Returns:
        A module whose `forward` takes [low, high] where `takes_two_streams(config)`, else the last hidden state, and
        returns [B, projector_tokens(...), H].
    Raises:
        ValueError: unknown kind, or sizes that are missing or contradict each other.
    """
    kind, hidden_size = config.mm_projector_type, config.hidden_size
    missing = [name for name in _SIZES.get(kind, ()) if getattr(config, name, None) is None]
    if missing:
        raise ValueError(f"{kind} projector: the configuration does not say {', '.join(missing)}")
    if kind == "linear":
        return LinearProjector(config.mm_hidden_size, hidden_size)
    if kind == "mlp":
        return MLPProjector(config.mm_hidden_size, hidden_size, config.mm_mlp_depth)
    if kind == "mhsa":
        return AttentionProjector(config.mm_hidden_size, hidden_size, getattr(config, "num_heads", 8))
    if kind == "low_high_mlp":
        low, high = _channels(config.low_input_size), _channels(config.high_input_size)
        return LowHighMLPProjector(low, high, hidden_size, config.mm_mlp_depth)
    if kind == "mixer":
        low = (config.low_input_size, config.low_output_size)
        high = (config.high_input_size, config.high_output_size)
        return MixerProjector(low, high, hidden_size, config.mm_mlp_depth)
    raise ValueError(f"unknown mm_projector_type {kind!r}; known: {', '.join(PROJECTORS)}")


def takes_two_streams(config) -> bool:
    """Whether the projector takes [low, high], the last two hidden states, instead of the last one alone."""
    return config.mm_projector_type in ("low_high_mlp", "mixer")


def projector_tokens(config, low_tokens: int, high_tokens: int) -> int:
    """Number of image tokens for an encoder whose last two hidden states have low_tokens and high_tokens tokens."""
    if config.mm_projector_type == "mixer":
        return config.low_output_size[-1] + config.high_output_size[-1]
    if config.mm_projector_type == "low_high_mlp":
        return low_tokens + high_tokens
    return high_tokens


def check_projector_sizes(config, encoder: nn.Module) -> None:
    """Raise ValueError when the config's projector sizes aren't those of the encoder's last two hidden states."""
    top = len(encoder.channels) - 1
    low, high = ([encoder.num_tokens(level), encoder.channels[level]] for level in (top - 1, top))
    if config.mm_projector_type == "mixer":
        expected = {"low_input_size": low, "high_input_size": high}
    elif config.mm_projector_type == "low_high_mlp":
        expected = {"low_input_size": low[1], "high_input_size": high[1]}
    else:
        expected = {"mm_hidden_size": high[1]}
    for key, size in expected.items():
        found = getattr(config, key)
        if (_channels(found) if isinstance(size, int) else found) != size:
            raise ValueError(
                f"{key}: expected {size} for a {config.mm_projector_type} projector on {config.vision_tower} with "
                f"input_size {config.input_size} (height, width, depth), found {found}"
            )


def _channels(size: int | list[int]) -> int:
    """Channels of a stream, given as their number or as [tokens, channels]."""
    return size if isinstance(size, int) else size[-1]


def _check_stream(name: str, x: Tensor, channels: int, tokens: int | None = None) -> None:
    """Raise ValueError unless x is [B, tokens, channels]; tokens None means any number."""
    expected = f"[B, {'N' if tokens is None else tokens}, {channels}]"
    if x.ndim != 3 or x.shape[2] != channels or tokens not in (None, x.shape[1]):
        raise ValueError(f"{name}: expected hidden states {expected}, found shape {tuple(x.shape)}")


class LinearProjector(nn.Linear):
    """[B, N, C] -> [B, N, H] by one linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        _check_stream("linear projector", x, self.in_features)
        return super().forward(x)  # [B, N, H]


class MLP(nn.Module):
    """`depth` linear layers on the last axis with exact GELU between them; only the first one changes the width."""

    def __init__(self, in_features: int, out_features: int, depth: int):
        super().__init__()
        hidden = (nn.Sequential(nn.GELU(), nn.Linear(out_features, out_features)) for _ in range(depth - 1))
        self.mm_projector = nn.Sequential(nn.Linear(in_features, out_features), *hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return self.mm_projector(x)


class MLPProjector(MLP):
    """[B, N, C] -> [B, N, H] by an MLP."""

    def forward(self, x: Tensor) -> Tensor:
        _check_stream("mlp projector", x, self.mm_projector[0].in_features)
        return super().forward(x)  # [B, N, H]


class LowHighMLPProjector(nn.Module):
    """[B, N_low, C_low] and [B, N_high, C_high] -> [B, N_low + N_high, H]: a linear layer each, then a common MLP."""

    def __init__(self, low_channels: int, high_channels: int, hidden_size: int, depth: int):
        super().__init__()
        self.low_up_mlp = nn.Linear(low_channels, hidden_size)
        self.high_up_mlp = nn.Linear(high_channels, hidden_size)
        layers = []
        for _ in range(depth - 1):
            layers += [nn.GELU(), nn.Linear(hidden_size, hidden_size)]
        self.mm_projector = nn.Sequential(*layers)

    def forward(self, streams: list[Tensor]) -> Tensor:
        low, high = streams
        _check_stream("low_high_mlp projector, low stream", low, self.low_up_mlp.in_features)
        _check_stream("low_high_mlp projector, high stream", high, self.high_up_mlp.in_features)
        low = self.low_up_mlp(low)  # [B, N_low, H]
        high = self.high_up_mlp(high)  # [B, N_high, H]
        return self.mm_projector(torch.cat([low, high], dim=1))  # [B, N_low + N_high, H]


class AttentionProjector(nn.Module):
    """[B, N, C] -> [B, N, H]: self-attention and a feed-forward part, each after a norm, then GELU and a linear map."""

    def __init__(self, channels: int, hidden_size: int, heads: int):
        super().__init__()
        if channels % heads:
            raise ValueError(f"mhsa projector: {heads} heads do not divide mm_hidden_size {channels}")
        self.heads = heads
        self.norm1 = nn.LayerNorm(channels)
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.out_proj = nn.Linear(channels, channels)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential()
        self.mlp.add_module("linear1", nn.Linear(channels, 4 * channels))
        self.mlp.add_module("activation", nn.GELU())
        self.mlp.add_module("linear2", nn.Linear(4 * channels, channels))
        self.out_layer = nn.Linear(channels, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        _check_stream("mhsa projector", x, self.q_proj.in_features)
        x = self.norm1(x)  # [B, N, C]
        query, key, value = (self._split(layer(x)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        x = F.scaled_dot_product_attention(query, key, value)  # [B, heads, N, C / heads]
        x = self.out_proj(x.transpose(1, 2).flatten(2))  # [B, N, C]
        x = self.mlp(self.norm2(x))  # [B, N, C]
        return self.out_layer(F.gelu(x))  # [B, N, H]

    def _split(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, heads, N, C / heads]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class MixerLayer(nn.Module):
    """[B, N, C] -> [B, N', C']: an MLP over tokens, then one over channels, each after a norm over the channels."""

    def __init__(self, in_size: tuple[int, int], out_size: tuple[int, int], mlp_depth: int):
        super().__init__()
        (tokens, channels), (out_tokens, out_channels) = in_size, out_size
        self.ln1 = nn.LayerNorm(channels)
        self.ln2 = nn.LayerNorm(channels)
        self.mlp1 = MLP(tokens, out_tokens, mlp_depth)
        self.mlp2 = MLP(channels, out_channels, mlp_depth)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mlp1(self.ln1(x).transpose(1, 2))  # [B, C, N']
        return self.mlp2(self.ln2(x.transpose(1, 2)))  # [B, N', C']


class MixerProjector(nn.Module):
    """[low, high] -> [B, N_low' + N_high', H]: a stack of mixer layers per stream.

    Args:
        low, high: ([tokens, channels] of the stream, tokens after each layer); the second has one entry per layer.
        hidden_size: H; layer i of d widens to H / 2^(d - 1 - i).
        mlp_depth: linear layers in each MLP.
    """

    def __init__(self, low: tuple, high: tuple, hidden_size: int, mlp_depth: int):
        super().__init__()
        (low_input, low_outputs), (high_input, high_outputs) = low, high
        for name, size in (("low_input_size", low_input), ("high_input_size", high_input)):
            if isinstance(size, int):
                raise ValueError(f"mixer projector: {name} must be [tokens, channels], found {size}")
        if len(low_outputs) != len(high_outputs):
            raise ValueError(
                f"mixer projector: low_output_size {list(low_outputs)} and high_output_size {list(high_outputs)} "
                "must have one entry per layer, found different lengths"
            )
        self.low_input_size, self.high_input_size = tuple(low_input), tuple(high_input)
        self.low_mixer = _mixer_stack(low_input, low_outputs, hidden_size, mlp_depth)
        self.high_mixer = _mixer_stack(high_input, high_outputs, hidden_size, mlp_depth)

    def forward(self, streams: list[Tensor]) -> Tensor:
        low, high = streams
        (low_tokens, low_channels), (high_tokens, high_channels) = self.low_input_size, self.high_input_size
        _check_stream("mixer projector, low stream", low, low_channels, low_tokens)
        _check_stream("mixer projector, high stream", high, high_channels, high_tokens)
        low = self.low_mixer(low)  # [B, N_low', H]
        high = self.high_mixer(high)  # [B, N_high', H]
        return torch.cat([low, high], dim=1)  # [B, N_low' + N_high', H]


def _mixer_stack(
    input_size: tuple[int, int], output_tokens: list[int], hidden_size: int, mlp_depth: int
) -> nn.Sequential:
    """[B, N, C] -> [B, output_tokens[-1], hidden_size], the width doubling from layer to layer."""
    depth = len(output_tokens)
    widths = [hidden_size // 2 ** (depth - 1 - layer) for layer in range(depth)]
    sizes = [tuple(input_size), *zip(output_tokens, widths, strict=True)]
    return nn.Sequential(*(MixerLayer(sizes[i], sizes[i + 1], mlp_depth) for i in range(depth)))
