"""The sharding of parameters, from where this torch has it."""

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:  # its place in torch 2.5
    from torch.distributed._composable.fsdp import fully_shard

__all__ = ["fully_shard"]
