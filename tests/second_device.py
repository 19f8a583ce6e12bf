"""
A second device without a GPU.

`second` is a device of its own for PyTorch, whose tensors hold their numbers in a tensor of the CPU. As on a GPU, an
operation may not mix its tensors with those of the CPU, and draws from a generator of its own device alone. Here an index
may not be on the CPU either, which a GPU allows and then waits for. A device cannot be unregistered, so use it in a fork.
"""
from collections import Counter

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
MOVES = (aten._to_copy.default, aten.copy_.default)  # from one device to the other
SECOND = 'second'


class Mixed(Exception):
    """An operation on tensors, or a generator, of two devices."""


class Numbers(torch.Tensor):
    """A tensor on the second device; `held` is on the CPU."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, strides=held.stride(), dtype=held.dtype,
                                                   storage_offset=held.storage_offset(), device=f'{SECOND}:0')

    def __init__(self, held):
        self.held = held

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, *_):
        raise AssertionError('the second device is not switched on')


class Generator(torch.Generator):
    """A generator of the device that it is made for."""
    of = {}  # the address of each -> its device; operations see another object at the same address

    def __new__(cls, device='cpu'):
        made = super().__new__(cls)
        cls.of[made._cdata] = torch.device(device).type
        return made


class SecondDevice(TorchDispatchMode):
    """While it is on: counts operations and their bytes, views not among them, the bytes `copied` to the device, the `waits`
    of the CPU for it, and the copies to it that are `awaited`, since they are not told to be non_blocking."""

    def __init__(self):
        super().__init__()
        self.clear()

    def clear(self):
        self.operations, self.bytes, self.copied, self.waits, self.awaited = 0, 0, 0, Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        ours = {id(t.held): t for t in tensors if isinstance(t, Numbers)}
        theirs = [t for t in tensors if not isinstance(t, Numbers) and t.dim()]  # numbers alone go anywhere
        if ours and theirs and func not in MOVES:
            raise Mixed(f'{func} of tensors on two devices, {[tuple(t.shape) for t in theirs]} on the CPU')
        wanted = kwargs.get('device')
        device = torch.device(wanted).type if wanted is not None else SECOND if ours else 'cpu'
        generator = kwargs.get('generator')
        if generator is not None and Generator.of[generator._cdata] != device:
            raise Mixed(f'{func} on {device} draws from a generator of another device')
        if wanted is not None and device != 'meta':  # what is made on meta stays there
            kwargs['device'] = torch.device('cpu')
        out = func(*tree_map_only(Numbers, lambda t: t.held, args), **tree_map_only(Numbers, lambda t: t.held, kwargs))
        if ours and (func in (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default)
                     or func in MOVES and device == 'cpu' or self._counts_a_mask(func, args)):
            self.waits[str(func)] += 1
        if func in MOVES and device == SECOND and any(not isinstance(t, Numbers) for t in tensors):
            self.awaited += not (kwargs.get('non_blocking') or func is aten.copy_.default and args[2:] == (True,))
        if device == SECOND and not func.is_view:
            self.operations += 1
            self.bytes += sum(t.numel() * t.itemsize for t in (*tensors, *tree_leaves(out)) if isinstance(t, torch.Tensor))
            self.copied += sum(t.numel() * t.itemsize for t in theirs)
        if func is aten.copy_.default:
            return args[0]
        if device != SECOND:
            return out
        return tree_map_only(torch.Tensor, lambda x: ours[id(x)] if id(x) in ours else Numbers(x), out)

    @staticmethod
    def _counts_a_mask(func, args):
        """Whether an index is a mask, the number of whose positions the CPU asks for."""
        return func in (aten.index.Tensor, aten.index_put_.default) and any(
            t is not None and t.dtype == torch.bool for t in args[1])


class Module(backend_registration._DummyBackendModule):
    @staticmethod
    def get_amp_supported_dtype():
        return [torch.bfloat16, torch.float16]

    @staticmethod
    def get_rng_state(device=None):
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state, device=None):
        torch.set_rng_state(state)


def register():
    """-> the second device."""
    backend_registration._setup_privateuseone_for_python_backend(SECOND, Module())
    torch.Generator = Generator
    torch.__future__.set_swap_module_params_on_conversion(True)  # tied parameters stay one, as on a GPU
    torch.inference_mode = torch.no_grad  # views of such tensors have no place for numbers held elsewhere
    make = torch.tensor  # which switches all modes off while it copies
    torch.tensor = lambda data, device=None, **options: make(data, **options).to(device)
    return torch.device(SECOND, 0)
