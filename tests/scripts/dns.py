"""DNS from inside a pod. `dns.py serve`: a name server that sends each query back as its answer, so that whoever asked sees
whether it came through untouched. `dns.py ask PATTERN SERVER[,SERVER] NAME TYPE`: asks as one of the resolvers does, and
prints what it saw as JSON."""

import json
import os
import random
import socket
import struct
import sys
import threading

TYPES = {"A": 1, "PTR": 12, "TXT": 16, "AAAA": 28, "SRV": 33, "HTTPS": 65}
QR, TC = 0x80, 0x02
TIMEOUT = 10


def query(name, kind):
    """With mixed case, and EDNS with an option that nobody knows."""
    mixed = "".join(random.choice([c.lower(), c.upper()]) for c in name.rstrip("."))
    labels = b"".join(bytes([len(label)]) + label.encode() for label in mixed.split("."))
    option = struct.pack(">HH", 65001, 4) + b"abcd"
    opt = b"\0" + struct.pack(">HHIH", 41, 1232, 0x8000, len(option)) + option
    return os.urandom(2) + b"\1\0\0\1\0\0\0\0\0\1" + labels + b"\0" + struct.pack(">HH", TYPES[kind], 1) + opt


def family(server):
    return socket.AF_INET6 if ":" in server else socket.AF_INET


def serve():
    """Names that begin with `slow` are not answered, those that begin with `big` are cut short over UDP."""
    for host in ("0.0.0.0", "::"):
        kind = family(host)
        datagrams, listener = socket.socket(kind, socket.SOCK_DGRAM), socket.socket(kind)
        for one in (datagrams, listener):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if kind == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.bind((host, 53))
        listener.listen(64)
        threading.Thread(target=datagrams_of, args=(datagrams,), daemon=True).start()
        threading.Thread(target=connections_of, args=(listener,), daemon=True).start()
    print(json.dumps("ready"), flush=True)
    # Whoever started it ends it so.
    sys.stdin.read()


def answer(asked, client, flags=0):
    reply = bytearray(asked)
    reply[2] |= QR | flags
    return bytes(reply) + client.encode()


def datagrams_of(sock):
    while True:
        asked, client = sock.recvfrom(65535)
        name = asked[13:].lower()
        if not name.startswith(b"slow"):
            sock.sendto(answer(asked, client[0], TC if name.startswith(b"big") else 0), client)


def connections_of(listener):
    while True:
        conn, client = listener.accept()
        threading.Thread(target=connection, args=(conn, client), daemon=True).start()


def exactly(conn, length):
    data = b""
    while len(data) < length:
        more = conn.recv(length - len(data))
        if not more:
            raise EOFError
        data += more
    return data


def connection(conn, client):
    try:
        while True:
            asked = exactly(conn, *struct.unpack(">H", exactly(conn, 2)))
            reply = answer(asked, client[0])
            conn.sendall(struct.pack(">H", len(reply)) + reply)
    except (EOFError, OSError):
        conn.close()


def skip_name(data, at):
    while data[at]:
        if data[at] & 0xC0:
            return at + 2
        at += 1 + data[at]
    return at + 1


def addresses(data):
    count, at = struct.unpack(">H", data[6:8])[0], skip_name(data, 12) + 4
    found = []
    for _ in range(count):
        at = skip_name(data, at)
        kind, _, _, length = struct.unpack(">HHIH", data[at : at + 10])
        at += 10
        value = data[at : at + length]
        at += length
        if kind in (1, 28):
            found.append(socket.inet_ntop(socket.AF_INET if kind == 1 else socket.AF_INET6, value))
    return sorted(found)


def says(asked, data, source):
    echoed = data[: len(asked)]
    same = len(data) >= len(asked) and echoed[:2] == asked[:2] and echoed[3:] == asked[3:]
    seen = {"from": source, "rcode": data[3] & 15, "truncated": bool(data[2] & TC), "untouched": same, "id": data[:2] == asked[:2]}
    if same:
        seen["asked_by"] = data[len(asked) :].decode()
    else:
        seen["addresses"] = addresses(data)
    return seen


def ask(pattern, servers, name, kind):
    servers, asked = servers.split(","), query(name, kind)
    if pattern == "tcp":
        with socket.create_connection((servers[0], 53), TIMEOUT) as conn:
            source = conn.getpeername()[:2]
            conn.sendall(struct.pack(">H", len(asked)) + asked)
            return says(asked, exactly(conn, *struct.unpack(">H", exactly(conn, 2))), list(source))
    mapped = pattern == "mapped"
    sock = socket.socket(socket.AF_INET6 if mapped else family(servers[0]), socket.SOCK_DGRAM)
    sock.settimeout(TIMEOUT)
    if pattern == "go":
        # Connected; it never names an address again.
        sock.connect((servers[0], 53))
        sock.send(asked)
        data = sock.recv(65535)
        return {**says(asked, data, list(sock.getpeername()[:2])), "local": sock.getsockname()[0]}
    if pattern == "glibc":
        # Connected, and looks at who answers all the same; several queries on one socket.
        sock.connect((servers[0], 53))
        second = query(name, kind)
        sock.send(asked)
        sock.send(second)
        answers = [sock.recvfrom(65535) for _ in range(2)]
        data, source = next((data, source) for data, source in answers if data[:2] == asked[:2])
        return says(asked, data, list(source[:2]))
    # Not connected, as musl: asks all servers at once and takes the first answer that comes from one of them.
    ends = [("::ffff:" + server if mapped else server, 53) for server in servers]
    for end in ends:
        sock.sendto(asked, end)
    while True:
        data, source = sock.recvfrom(65535)
        if tuple(source[:2]) in ends:
            return says(asked, data, list(source[:2]))


def storm(server, name):
    """One query after the other, each from a socket of its own, until standard input ends; one that is not answered is asked
    once, and not again as resolvers do. Tells how many were answered, and how the others failed."""
    finished = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), finished.set()), daemon=True).start()
    answered, failures = 0, {}
    print("{}", flush=True)
    while not finished.is_set():
        with socket.socket(family(server), socket.SOCK_DGRAM) as sock:
            # Longer than any answer takes on a busy machine, and short enough to be told of.
            sock.settimeout(15)
            try:
                sock.connect((server, 53))
                sock.send(query(name, "A"))
                data = sock.recv(65535)
                why = None if data[3] & 15 == 0 else f"rcode {data[3] & 15}"
            except OSError as error:
                why = type(error).__name__
        if why:
            failures[why] = failures.get(why, 0) + 1
        else:
            answered += 1
    return {"answered": answered, "failures": failures}


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    elif sys.argv[1] == "storm":
        print(json.dumps(storm(*sys.argv[2:])), flush=True)
    else:
        try:
            print(json.dumps(ask(*sys.argv[2:])))
        except OSError as error:
            print(json.dumps({"error": str(error)}))
