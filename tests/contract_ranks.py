"""Processes that play the ranks of a Lightning training."""

import os

BOUNDS = {2: [0, 3, 8], 3: [0, 1, 5, 8]}  # which of the 8 rows of a batch each rank gets


def act_as_rank(rank: int, world_size: int) -> None:
    """Make Lightning take this process for one that a launcher started."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), NODE_RANK="0")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # unused: the group is there already
