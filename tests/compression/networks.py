"""Small networks whose channels depend on each other in every way, and what they must be given."""

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """A stem, two blocks with a depthwise layer on one stream of channels, and a head behind a flatten."""

    def __init__(self, width: int = 12, hidden: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, hidden, 1),
                nn.BatchNorm2d(hidden),
                nn.ReLU6(),
                nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden),
                nn.BatchNorm2d(hidden),
                nn.PReLU(hidden),
                nn.Conv2d(hidden, width, 1, bias=False),
                nn.BatchNorm2d(width),
            )
            for _ in range(2)
        )
        self.head = nn.Linear(width * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


class Branches(nn.Module):
    """Two branches side by side, one of them behind a sigmoid, a grouped convolution, and a product of halves."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 12, 1)
        self.grouped = nn.Conv2d(20, 16, 3, padding=1, groups=4)
        self.norm, self.last = nn.BatchNorm2d(16), nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([torch.relu(self.left(x)), torch.sigmoid(self.right(x))], 1)
        gate, value = self.norm(self.grouped(x)).chunk(2, 1)
        return self.head(nn.functional.softplus(self.last(gate * value)).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, dim // heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        x = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.proj(x.reshape(*x.shape[:2], self.num_heads * self.head_dim))


class Transformer(nn.Module):
    """Two blocks of attention and perceptron with layer norms, over tokens."""

    def __init__(self, dim: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(6, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(4))
        self.attention = nn.ModuleList(Attention(dim, heads) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(dim, 24) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(24, dim) for _ in range(2))
        self.head = nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for i in range(2):
            x = x + self.attention[i](self.norms[2 * i](x))
            x = x + self.down[i](nn.functional.gelu(self.up[i](self.norms[2 * i + 1](x))))
        return self.head(x.mean(1))


IMAGES, TOKENS = (2, 3, 8, 8), (2, 7, 6)
NETWORKS = {"residual": (Residual, IMAGES), "branches": (Branches, IMAGES), "transformer": (Transformer, TOKENS)}


def build(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A network in float64 and evaluation mode with statistics that are not trivial, and a batch for it."""
    kind, shape = NETWORKS[name]
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    network = kind().double().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5)
            for tensor in (module.bias, module.running_mean):
                tensor.data.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) / 3)
    return network, torch.randn(shape, generator=generator, dtype=torch.float64)


def draw_kept(groups, seed: int = 0) -> list[Tensor]:
    """Random halves of all groups, none of them empty."""
    generator = torch.Generator().manual_seed(seed)
    kept = [torch.rand(group.size, generator=generator) > 0.5 for group in groups]
    for keep in kept:
        keep[int(torch.randint(len(keep), (), generator=generator))] = True
    return kept
