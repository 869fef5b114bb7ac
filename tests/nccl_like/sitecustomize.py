"""A backend that, like NCCL, refuses tensors that are not on the run's device, for scripts on several processes.

Python imports this module at its start, because tests/scripts.py puts its folder on PYTHONPATH. A CPU has no second
device: a tensor counts as on the run's device if `utils.to_group_device` has moved it, into memory of its own.
"""

import os

if "LOCAL_RANK" in os.environ:
    import torch
    import torch.distributed as dist

    import utils

    class NCCLLike:
        """torch.distributed with the tensors of its collectives checked."""

        def __getattr__(self, name):
            return getattr(dist, name)

        def all_reduce(self, tensor, *args):
            """Refuse, or do as torch.distributed."""
            check(tensor)
            return dist.all_reduce(tensor, *args)

        def broadcast(self, tensor, **options):
            """Refuse, or do as torch.distributed."""
            check(tensor)
            return dist.broadcast(tensor, **options)

        def all_gather(self, parts, tensor):
            """Refuse, or do as torch.distributed."""
            check(tensor)
            return dist.all_gather(parts, tensor)

    def check(tensor):
        """Raise the error that NCCL's process group raises for a tensor of the CPU."""
        if not getattr(tensor, "on_run_device", False):
            raise RuntimeError("No backend type associated with device type cpu")

    def to_group_device(tensor):
        """Copy a tensor, as moving it to a GPU does."""
        moved = tensor.clone(memory_format=torch.contiguous_format)
        moved.on_run_device = True
        return moved

    utils.dist, utils.to_group_device = NCCLLike(), to_group_device
