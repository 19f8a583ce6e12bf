"""
Python imports this by itself where its folder is on PYTHONPATH: from then on the process has no network.

Only this machine can be reached; anything else fails at once, as it would with no network at all.
"""
import ipaddress
import socket

REAL = {name: getattr(socket.socket, name) for name in ('connect', 'connect_ex', 'sendto')}
real_getaddrinfo = socket.getaddrinfo


def is_local(host):
    if host in (None, '', b'', 'localhost', b'localhost', socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(host.decode() if isinstance(host, bytes) else host).is_loopback
    except ValueError:
        return False


def guard(name):
    def guarded(self, *args):
        address = args[-1]  # a path or bytes for a Unix socket, else (host, port, ...)
        if isinstance(address, tuple) and not is_local(address[0]):
            raise OSError(f'the tests run without a network: {name} to {address}')
        return REAL[name](self, *args)
    return guarded


def getaddrinfo(host, *args, **kwargs):
    if not is_local(host):
        raise socket.gaierror(socket.EAI_AGAIN, f'the tests run without a network: look-up of {host}')
    return real_getaddrinfo(host, *args, **kwargs)


for _name in REAL:
    setattr(socket.socket, _name, guard(_name))
socket.getaddrinfo = getaddrinfo
