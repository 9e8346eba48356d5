"""Networks that FSDP2 shards are made whole in place, and can be sharded again."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_plugins.compression.networks.sharded import is_group, is_sharded, make_whole, whole_copy
from tests._processes import run_on_ranks


class Net(nn.Module):
    """With tied weights, running statistics, and a weight that stands in the outermost module."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.ones(4))
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.first.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.second(self.first(self.body(x * self.scale)))
        return made

    def shard(self) -> None:
        mesh = init_device_mesh("cpu", (2,))
        fully_shard(self.body[0], mesh=mesh)
        fully_shard(self.body, mesh=mesh, reshard_after_forward=False)


def step(net: Net) -> dict[str, Tensor]:
    """One of gradient descent."""
    net.zero_grad()
    net(torch.arange(20.0).reshape(5, 4).sin()).square().sum().backward()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad
    return whole_copy(net).state_dict()


def change(rank: int) -> dict[str, Any]:
    net, seen = Net(), list[str]()
    net.shard()
    found: dict[str, Any] = {"sharded": [step(net)], "placed": [type(p.data).__name__ for p in net.parameters()]}
    net.body.register_forward_hook(lambda *_: seen.append("body"))
    handle = net.body[2].register_forward_pre_hook(lambda *_: seen.append("last"))
    groups = [weakref.ref(module) for module in net.modules() if is_group(module)]
    state = {name: value.clone() for name, value in whole_copy(net).state_dict().items()}
    with torch.no_grad():
        net.eval()(torch.zeros(2, 4))  # after which parameters stay gathered
    assert is_sharded(net.train())
    seen.clear()
    wholes = make_whole(net)
    gc.collect()
    found["left"] = [one() is not None for one in groups], is_sharded(net), [type(m).__name__ for m in net.modules()]
    torch.testing.assert_close(net.state_dict(), state, rtol=0, atol=0)
    assert net.first.weight is net.second.weight
    assert set(wholes.values()) == set(net.parameters())
    assert [type(old.data).__name__ for old in wholes] == found["placed"]
    assert not net.first.bias.requires_grad
    found["whole"] = step(net)
    net.shard()
    found["sharded"].append(step(net))
    found["again"] = sum(is_group(module) for module in net.modules())
    handle.remove()
    step(net)
    return {**found, "seen": seen}


@pytest.mark.distributed
def test_a_network_is_made_whole_and_sharded_again(tmp_path):
    plain = Net()
    expected = [step(plain) for _ in range(3)]
    for found in run_on_ranks(change, 2, tmp_path):
        states = [found["sharded"][0], found["whole"], found["sharded"][1]]
        torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-6)
        assert found["left"] == ([False, False], False, [type(m).__name__ for m in plain.modules()])
        assert found["again"] == 2
        assert found["seen"] == ["last", "body", "last", "body", "body"]  # the hooks of others are still there
