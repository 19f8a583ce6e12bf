"""
The machine a script runs on: device, number type, compiler, and the ranks that train together.
"""
import os
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from nanodrift.options import UserError, one_of
from nanodrift.system import cores

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
ROLL_CALL = 5  # seconds in which a rank that is well answers
# signals that end a run with a checkpoint; each system has some of them
STOPPING = [getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1', 'SIGBREAK')
            if hasattr(signal, name)]


@dataclass
class Ranks:
    """Where this process stands among those that train together."""
    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device('cpu')
    store: object = None  # where ranks meet

    @property
    def first(self):
        return self.rank == 0

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        """Says goodbye after success alone: while other ranks may be inside a collective, one that fails must end. Where a
        collective failed, one line names the ranks that are gone or hang."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        if error is None:
            dist.destroy_process_group()
        elif isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and 'gloo' in str(error):
            absent = self._call_roll()
            who = f'rank {", ".join(map(str, absent))} did not answer' if absent else 'an exchange between ranks failed'
            print(f'{os.path.basename(sys.argv[0])}: rank {self.rank}: {who}, start all ranks again '
                  f'({str(error).splitlines()[0]})', file=sys.stderr, flush=True)
            sys.exit(1)

    def _call_roll(self):
        """The ranks that do not answer within ROLL_CALL seconds. Each answers for itself, here, when a collective failed."""
        try:
            self.store.set(f'here/{self.rank}', '')
            until = time.monotonic() + ROLL_CALL
            while True:
                absent = [rank for rank in range(self.world_size) if not self.store.check([f'here/{rank}'])]
                if not absent or time.monotonic() > until:
                    return absent
                time.sleep(0.1)
        except dist.DistError:  # the store is with rank 0, or with the torchrun that started it
            return [0]

    def sum(self, tensor):
        """The sum of `tensor` over all ranks, on every rank."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, tensor):
        """The elementwise maximum of `tensor` over all ranks, on every rank."""
        if self.world_size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def mean(self, tensor):
        """The mean of `tensor` over all ranks, on every rank."""
        return self.sum(tensor) / self.world_size

    def concatenate(self, tensor, dim):
        """The tensors of all ranks, which have one shape, one behind the other in the order of the ranks, on every rank."""
        if self.world_size == 1:
            return tensor
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts, dim)

    def gather(self, value):
        """The values of all ranks, on every rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values


def pick_device(name, float64=False):
    """torch.device of 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'. With `float64`, auto leaves out mps, which has no float64.
    Raises UserError if this machine does not have the device."""
    if name == 'auto':
        mps = torch.backends.mps.is_available() and not float64
        name = 'cuda' if torch.cuda.is_available() else 'mps' if mps else 'cpu'
    kind, _, index = name.partition(':')
    one_of('device', kind, ('cpu', 'cuda', 'mps'))
    there = {'cpu': 1, 'cuda': torch.cuda.device_count(), 'mps': int(torch.backends.mps.is_available())}[kind]
    if index and not index.isdecimal() or int(index or 0) >= there:
        raise UserError(f'device={name}: this machine or this build of PyTorch has {there} of {kind}; use --device=cpu')
    # torch.cuda.set_device refuses a device without a number
    return torch.device(kind, int(index or 0)) if kind == 'cuda' else torch.device(name)


def threads():
    """How many threads this process may compute with. PyTorch counts the cores of the machine, also those that a container
    may not use."""
    return torch.get_num_threads() if 'OMP_NUM_THREADS' in os.environ else min(torch.get_num_threads(), cores())


def limit_threads():
    if threads() < torch.get_num_threads():
        torch.set_num_threads(threads())


def read_later(values):
    """A function that returns the numbers of a tensor (n,) as a list. On a GPU it waits until they are computed, and not for
    the work that was started after this call."""
    if values.device.type != 'cuda':
        return values.tolist
    copied, done = values.to('cpu', non_blocking=True), torch.cuda.Event()
    done.record(torch.cuda.current_stream(values.device))

    def read():
        done.synchronize()
        return copied.tolist()
    return read


def cpu_multiplies_bfloat16():
    """Whether the processor has instructions for bfloat16 products; without, they are many times slower than float32."""
    checks = ('_is_amx_tile_supported', '_is_avx512_bf16_supported')
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def pick_dtype(name, device):
    """Name of the type that matrix products run in; 'auto' is the fastest safe one of the device."""
    if name != 'auto':
        return name
    if device.type == 'cuda':
        return 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
    return 'bfloat16' if device.type == 'cpu' and cpu_multiplies_bfloat16() else 'float32'


def autocast(device, dtype):
    return nullcontext() if dtype == 'float32' else torch.autocast(device.type, DTYPES[dtype])


@contextmanager
def exact(device):
    """float32 products as they are: without autocast, without TF32."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def compute_dtype(tensor):
    """The type that matrix products of this tensor run in: autocast's, or its own."""
    if torch.is_autocast_enabled(tensor.device.type):
        return torch.get_autocast_dtype(tensor.device.type)
    return tensor.dtype


def compiler_works(device):
    """Whether torch.compile can build code for the device here; if not, says so once."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
        return True
    except Exception as e:
        if os.environ.get('RANK', '0') == '0':
            reason = str(e).strip().splitlines() or [repr(e)]
            print(f'warning: torch.compile does not work here, going on without it ({reason[0]})', file=sys.stderr)
        return False


def setup_ranks(device, backend, timeout):
    """Joins the process group when torchrun started this process. Raises UserError on a device that is not there."""
    device = pick_device(device)
    if device.type == 'cuda':
        torch.set_float32_matmul_precision('high')  # TF32, where there is no bfloat16
    limit_threads()
    if 'RANK' not in os.environ:
        if device.type == 'cuda':
            torch.cuda.set_device(device)
        return Ranks(device=device)
    if device.type == 'mps':
        raise UserError('no backend joins ranks on mps: start one process, without torchrun, or use --device=cpu')
    rank = int(os.environ['RANK'])
    # launchers of pods may set RANK alone
    local_rank = int(os.environ.get('LOCAL_RANK', rank % max(1, torch.cuda.device_count())))
    if device.type == 'cuda':
        device = pick_device(f'cuda:{local_rank}')
        torch.cuda.set_device(device)
    if backend == 'auto':
        backend = 'nccl' if device.type == 'cuda' and dist.is_nccl_available() else 'gloo'
    wait = timedelta(seconds=timeout)
    try:
        store, rank, world_size = next(dist.rendezvous('env://', timeout=wait))
        if os.environ.get('LOCAL_WORLD_SIZE') == str(world_size):
            # torchrun keeps its store when it starts the ranks again: they would read the addresses of those that are gone
            store = dist.PrefixStore(f'start {os.environ.get("TORCHELASTIC_RESTART_COUNT")}', store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=wait)
    except ValueError as e:  # RANK is set, but not what torchrun sets with it
        raise UserError(f'{e}: set MASTER_ADDR, MASTER_PORT and WORLD_SIZE too, or unset RANK') from None
    except RuntimeError as e:
        reason, number = str(e).splitlines()[0], os.environ.get('WORLD_SIZE')
        raise UserError(f'the ranks did not meet ({reason}): start all {number} within {timeout} seconds, with a --backend '
                        'that this machine has') from None
    return Ranks(rank, world_size, device, store)
