"""What is measured on a lab's hosts with nothing but sockets: `python -m benchmarks.lab.probe WHAT …`.

echo PORT                returns every UDP packet, and swallows what TCP connections bring
ping ADDRESS PORT COUNT  prints the round trip of each UDP packet in seconds, a line each; lost: inf
flood ADDRESS PORT BYTES
                         sends so much over TCP; prints the seconds until all of it was acknowledged
relay ADDRESS PORT BYTES
                         takes TCP messages of that length at PORT, sends each on to ADDRESS, same port
ring ADDRESS PORT BYTES COUNT
                         sends such messages, one at a time, and waits for each to come back to PORT
                         through relays; prints the seconds of each trip, a line each
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


def relay(address: str, port: str, size: str) -> None:
    with _listener(port) as listener, listener.accept()[0] as before, _connected(address, port) as after:
        while message := before.recv(int(size), socket.MSG_WAITALL):
            after.sendall(message)


def ring(address: str, port: str, size: str, count: str) -> None:
    with _listener(port) as listener, _connected(address, port) as after, listener.accept()[0] as before:
        for _ in range(int(count)):
            began_s = time.perf_counter()
            after.sendall(bytes(int(size)))
            before.recv(int(size), socket.MSG_WAITALL)
            print(time.perf_counter() - began_s, flush=True)


def _listener(port: str) -> socket.socket:
    listener = socket.create_server(("0.0.0.0", int(port)))
    print("ready", flush=True)
    return listener


def _connected(address: str, port: str) -> socket.socket:
    connected = socket.create_connection((address, int(port)))
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connected


if __name__ == "__main__":
    {"echo": echo, "ping": ping, "flood": flood, "relay": relay, "ring": ring}[sys.argv[1]](*sys.argv[2:])
