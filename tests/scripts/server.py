"""What runs in the pods that are talked to: one behaviour of a TCP peer on each port, IPv4 and IPv6.

The first line that a client sends to the ports that record is a token; port 8006 tells what became of it.
"""

import hashlib
import json
import os
import selectors
import socket
import struct
import sys
import threading
import time

OUTCOMES = {}
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: on, no time: close() sends RST


def line_of(conn):
    """Reads a line byte by byte, so that nothing behind it is taken."""
    line = b""
    while not line.endswith(b"\n"):
        byte = conn.recv(1)
        if not byte:
            break
        line += byte
    return line.strip().decode()


def seen(conn):
    """How this connection looks from here."""
    return {"peer": list(conn.getpeername()[:2]), "local": list(conn.getsockname()[:2])}


def until_the_end(conn, outcome):
    """Reads to the end and says which end it was."""
    digest = hashlib.sha256()
    try:
        while data := conn.recv(1 << 16):
            digest.update(data)
            outcome["bytes"] += len(data)
        outcome["end"] = "eof"
    except ConnectionResetError:
        outcome["end"] = "reset"
    except OSError as error:
        outcome["end"] = str(error)
    outcome["sha256"] = digest.hexdigest()


def echo(conn):
    while data := conn.recv(1 << 16):
        conn.sendall(data)


def speaks_first(conn):
    conn.sendall(json.dumps(seen(conn)).encode() + b"\n")
    conn.shutdown(socket.SHUT_WR)
    conn.recv(1)


def bulk(conn):
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import bulk as both

    both.exchange(conn, struct.unpack("!Q", conn.recv(8, socket.MSG_WAITALL))[0])


def after_eof(conn):
    outcome = {"bytes": 0}
    until_the_end(conn, outcome)
    conn.sendall(json.dumps(outcome).encode() + b"\n")


def closes_first(conn):
    outcome = OUTCOMES.setdefault(line_of(conn), {"bytes": 0})
    conn.sendall(b"bye\n")
    conn.shutdown(socket.SHUT_WR)
    until_the_end(conn, outcome)


def outcomes(conn):
    conn.sendall(json.dumps(OUTCOMES.get(line_of(conn))).encode() + b"\n")


def resets(conn):
    line_of(conn)
    conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


def flood(conn):
    outcome = OUTCOMES.setdefault(line_of(conn), {"bytes": 0})
    block = os.urandom(1 << 16)
    try:
        while True:
            outcome["bytes"] += conn.send(block)
    except OSError as error:
        outcome["end"] = type(error).__name__


def deaf(conn):
    OUTCOMES[line_of(conn)] = seen(conn)
    conn.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    threading.Event().wait()


def observe(conn):
    outcome = OUTCOMES.setdefault(line_of(conn), {"bytes": 0})
    outcome.update(seen(conn))
    until_the_end(conn, outcome)


def http(conn):
    request = b""
    while b"\r\n\r\n" not in request:
        data = conn.recv(1 << 16)
        if not data:
            return
        request += data
    body = json.dumps({**seen(conn), "request": request.split(b"\r\n")[0].decode()}).encode() + b"\n"
    head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    conn.sendall(head.encode() + body)
    conn.shutdown(socket.SHUT_WR)
    conn.recv(1)


def ticks(conn):
    """A line ten times a second: a live connection to be watched."""
    while True:
        conn.sendall(b"tick\n")
        time.sleep(0.1)


def who(conn):
    """Says its name and the line that was sent."""
    line = line_of(conn)
    conn.sendall(f"{socket.gethostname()} {line}\n".encode())
    conn.shutdown(socket.SHUT_WR)
    conn.recv(1)


PORTS = {
    8001: echo,
    8002: speaks_first,
    8003: bulk,
    8004: after_eof,
    8005: closes_first,
    8006: outcomes,
    8007: resets,
    8008: flood,
    8009: deaf,
    8010: observe,
    8011: http,
    8013: ticks,
    8014: who,
}
UDP_ECHO = 8012
MANY_ECHO = 8015


def serve(port, behaviour):
    listener = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)

    def one(conn):
        try:
            with conn:
                behaviour(conn)
        except OSError:
            pass

    while True:
        conn, _ = listener.accept()
        threading.Thread(target=one, args=(conn,), daemon=True).start()


def serve_many():
    """Echo for as many as there are, on one thread."""
    selector = selectors.DefaultSelector()
    listener = socket.create_server(("::", MANY_ECHO), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    selector.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            conn = key.fileobj
            if conn is listener:
                selector.register(listener.accept()[0], selectors.EVENT_READ)
                continue
            try:
                data = conn.recv(1 << 16)
                conn.sendall(data)
            except OSError:
                data = b""
            if not data:
                selector.unregister(conn)
                conn.close()


def serve_udp():
    udp = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    udp.bind(("::", UDP_ECHO))
    while True:
        data, peer = udp.recvfrom(1 << 16)
        udp.sendto(data, peer)


def main():
    threading.stack_size(256 << 10)
    for port, behaviour in PORTS.items():
        threading.Thread(target=serve, args=(port, behaviour), daemon=True).start()
    threading.Thread(target=serve_many, daemon=True).start()
    serve_udp()


main()
