"""
One model over many GPUs (--sharding=fsdp): each rank keeps its share of the parameters, gradients and optimizer states, and
gathers a block just before it is used, by torch's own fully_shard. The number of ranks divides 16 bytes per parameter; DDP
repeats them on every rank.

A checkpoint is the one file that a single process writes: the ranks gather each tensor in turn, and the first one keeps it
on the CPU. torch.distributed.checkpoint would write a folder with a file of each rank, which is faster for tens of billions
of parameters, but sampling, evaluation, export and a run without sharding could not read it. The price is 12 bytes per
parameter of the first rank's memory on the CPU, 18 GB for 1.5 billion.

fully_shard takes half as long to import as all the rest of a run, so only a run that is shared out imports it; its tensors
are told by their method full_tensor.
"""
import torch
from torch.utils._pytree import tree_map


def blocks_of(model):
    return (model.generator if model.config.outputs_embeddings else model.transformer).h


def shard(model, device, world_size):
    """Shares out the parameters of a model on the CPU. Blocks move to the device one by one, so that no device ever holds
    the whole model. What is left, embeddings and head above all, stays gathered when a forward method returns, because
    losses and metrics use it outside."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (world_size,))
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    if model.encoder is not None:
        model.encoder.to(device)
    for name in ('trunk', 'embeddings'):  # which metrics and targets call as they call forward
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)


def compile_blocks(model):
    """`GPT.compile_blocks` would compile the gathering as well."""
    for block in blocks_of(model):
        block.forward = torch.compile(block.forward, dynamic=False)
    model.compile_head()
    if model.encoder is not None:  # whole on every rank
        model.encoder.compile_blocks()


def is_shared(value):
    return hasattr(value, 'full_tensor')


def local(tensor):
    """A rank's share of a tensor, in the same memory; all of a tensor that is not shared out."""
    return tensor.to_local() if is_shared(tensor) else tensor


def whole(value):
    """A tensor that is shared out as a whole, on every rank; others as they are."""
    return value.full_tensor() if is_shared(value) else value


def gathered(state, keep):
    """State dicts whose tensors are whole and on the CPU. Every rank takes part; those without `keep` get no tensors."""
    done = {}  # tied weights are gathered once, and stay one tensor

    def gather(tensor):
        if not is_shared(tensor):
            return tensor
        if id(tensor) not in done:
            full = tensor.detach().full_tensor()
            done[id(tensor)] = full.cpu() if keep else None
        return done[id(tensor)]
    return tree_map(gather, state)


def share(tensor, like):
    """What this rank has of a whole tensor, where `like` is shared out; otherwise the tensor."""
    if not is_shared(like) or not tensor.dim():
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def share_weights(weights, model):
    """`share` for a state dict of a model."""
    own = model.state_dict()
    return {name: share(tensor, own.get(name)) for name, tensor in weights.items()}


def share_optimizer(state, optimizer):
    """`share` for the state dict of an optimizer; its parameters are numbered in the order of the groups."""
    params = [p for group in optimizer.param_groups for p in group['params']]
    return state | {'state': {i: {name: share(value, params[i]) if torch.is_tensor(value) else value
                                  for name, value in values.items()} for i, values in state['state'].items()}}
