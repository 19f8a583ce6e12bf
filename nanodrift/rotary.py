"""
Rotary positions (RoFormer: Su et al., arXiv 2104.09864), which `rotating`, `diffusion` and `drifting` have: pairs of
coordinates of q and k are rotated in proportion to the position, so that their product depends on the distance alone.
"""
import torch
import torch.nn as nn

from nanodrift.kernels import rotate


def rotary_rates(config):
    """By how much a step of one position rotates the i-th pair of coordinates, (H, D/2): the same for every head."""
    D = config.n_embd // config.n_head
    return (10000.0 ** (-torch.arange(0, D, 2, device='cpu') / D)).repeat(config.n_head, 1)


def plain_rotate(x, angles):
    """What kernels.rotate computes: pairs of coordinates of x (B, H, T, D) rotated by angles (H, T, D/2, 2), cosines and
    sines."""
    (even, odd), (cos, sin) = x.float().unflatten(-1, (-1, 2)).unbind(-1), angles.unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


class RotaryEmbedding(nn.Module):
    """Rotates the i-th pair of coordinates of head h by position * rates[h, i]; learned where these are a parameter."""

    def __init__(self, rates, block_size, persistent=False, use_norm=False):
        super().__init__()
        learned = isinstance(rates, nn.Parameter)
        if learned:
            self.frequencies = rates
        else:
            self.register_buffer('frequencies', rates, persistent=persistent)
        self.layer_norm = nn.LayerNorm(rates.size(1)) if use_norm else None
        table = None if learned or use_norm else self.angles(torch.arange(block_size, device=rates.device))
        self.register_buffer('table', table, persistent=False)
        self.register_load_state_dict_post_hook(RotaryEmbedding._refresh)

    def _refresh(self, keys):
        """Rates that came out of a checkpoint may be others."""
        if self.table is not None:
            self.table = self.angles(torch.arange(self.table.size(-3), device=self.table.device))

    def angles(self, positions):
        """Cosines and sines for positions (..., T) -> (..., H, T, D/2, 2)."""
        rates = self.frequencies if self.layer_norm is None else self.layer_norm(self.frequencies)
        angle = positions[..., None, :, None] * rates[:, None].float()
        return torch.stack((angle.cos(), angle.sin()), dim=-1)

    def forward(self, q, k, positions=None):
        """q, k (B, H, T, D); positions (1 or B, T), None for 0 to T-1."""
        T = q.size(2)
        if self.table is None:
            angles = self.angles(torch.arange(T, device=q.device) if positions is None else positions)
        elif positions is None:
            angles = self.table[:, :T].contiguous()
        else:
            angles = self.table[:, positions].movedim(0, 1)  # (1 or B, H, T, D/2, 2)
        if angles.dim() == 5 and len(angles) == 1:
            angles = angles[0]
        angles = angles.contiguous()
        turn = rotate if q.device.type == 'cpu' else plain_rotate  # which compilers of GPUs fuse
        return turn(q, angles), turn(k, angles)


def local_attention_biases(rates, strength):
    """Biases of q and k (2, H, D), for rates (H, D/2), which rotary positions turn into a preference for a distance: the
    heads look one position back, one ahead, two back, and so on."""
    head = torch.arange(len(rates), device=rates.device)[:, None]
    angle = (1 + head // 2) * (head % 2 * 2 - 1) * rates
    near = strength * (rates > 0.05)  # slower pairs tell no neighbours apart
    q, k = (near, torch.zeros_like(near)), (near * angle.cos(), -near * angle.sin())
    return torch.stack([torch.stack(pair, dim=-1).flatten(1) for pair in (q, k)])
