"""What is measured on a lab's hosts with nothing but sockets: `python -m benchmarks.lab.probe WHAT …`.

echo PORT                      returns every UDP packet, and swallows what TCP connections bring
ping ADDRESS PORT COUNT        prints the round trip of each UDP packet in seconds, a line each; lost: inf
flood ADDRESS PORT BYTES       sends so much over TCP; prints the seconds until all of it was acknowledged
"""

from __future__ import annotations

import math
import select
import socket
import sys
import time

_PING_BYTES = 64
_PATIENCE_S = 1.0


def echo(port: str) -> None:
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    datagrams.bind(("0.0.0.0", int(port)))
    listener = socket.create_server(("0.0.0.0", int(port)))
    print("ready", flush=True)
    watched, buffer = [datagrams, listener], bytearray(1 << 18)
    while True:
        for ready in select.select(watched, (), ())[0]:
            if ready is datagrams:
                data, sender = datagrams.recvfrom(_PING_BYTES)
                datagrams.sendto(data, sender)
            elif ready is listener:
                watched.append(listener.accept()[0])
            elif not ready.recv_into(buffer):
                watched.remove(ready)
                ready.close()


def ping(address: str, port: str, count: str) -> None:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.connect((address, int(port)))
    sock.settimeout(_PATIENCE_S)
    for number in range(int(count)):
        began_s = time.perf_counter()
        sock.send(number.to_bytes(_PING_BYTES, "big"))
        elapsed_s = math.inf
        try:
            while elapsed_s == math.inf:
                if int.from_bytes(sock.recv(_PING_BYTES), "big") == number:
                    elapsed_s = time.perf_counter() - began_s
        except TimeoutError:
            pass
        print(elapsed_s, flush=True)


def flood(address: str, port: str, size: str) -> None:
    with socket.create_connection((address, int(port))) as sock:
        began_s, chunk, left = time.perf_counter(), bytes(1 << 16), int(size)
        while left:
            left -= sock.send(chunk[:left])
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(1):  # the other end closes when it has all
            pass
        print(time.perf_counter() - began_s, flush=True)


if __name__ == "__main__":
    {"echo": echo, "ping": ping, "flood": flood}[sys.argv[1]](*sys.argv[2:])
