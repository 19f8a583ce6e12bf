"""
What differs between systems: replacing files, counting the cores that this process may use, and printing.
"""
import contextlib
import io
import math
import os
import sys
import time

CGROUP = '/sys/fs/cgroup'  # where a container finds its limits
WAITS = [0.1] * 600  # seconds; a minute together


def move(source, target):
    """os.replace. On Windows it fails while somebody reads the target, a virus scanner say, and is tried for a minute."""
    for wait in WAITS if os.name == 'nt' else []:
        try:
            return os.replace(source, target)
        except PermissionError:
            time.sleep(wait)
    os.replace(source, target)


def write_atomically(path, data):
    """Writes bytes to a temporary file and renames it: a reader never sees half of it. Raises OSError if it cannot; an
    existing file is then unchanged."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f'{path}.{os.getpid()}.tmp'
    try:
        with open(temporary, 'wb') as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        move(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def flush_folder(path):
    """Puts the names in a folder on the disk, where the system can: a new name must outlive a power cut too."""
    if os.name == 'posix':
        folder = os.open(path, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # some network shares (SMB) cannot
                os.fsync(folder)
        finally:
            os.close(folder)


def print_utf8(newline=None):
    """Makes stdout take any text, whatever the locale. A notebook's stdout is another object, which takes any already."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding='utf-8', errors='replace', newline=newline)


def cores():
    """How many CPU cores this process may use: in a container fewer than the machine has."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return min(there, max(1, math.ceil(quota() or there)))


def quota():
    """The CPU seconds per second that a container may use; None where there is no limit."""
    with contextlib.suppress(OSError, ValueError):
        with open(f'{CGROUP}/cpu.max', encoding='ascii') as f:
            most, period = f.read().split()
        return None if most == 'max' else int(most) / int(period)
    with contextlib.suppress(OSError, ValueError):  # the first version of cgroups, where -1 is no limit
        numbers = []
        for name in ('quota', 'period'):
            with open(f'{CGROUP}/cpu/cpu.cfs_{name}_us', encoding='ascii') as f:
                numbers.append(int(f.read()))
        return numbers[0] / numbers[1] if numbers[0] > 0 else None
    return None
