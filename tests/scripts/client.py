"""What runs in the pods that talk: `client.py WHAT HOST PORT ...` does one thing and prints what it saw as JSON."""

import errno
import json
import os
import socket
import struct
import sys
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
RESET = struct.pack("ii", 1, 0)
TIMEOUT = 20


def dial(host, port, timeout=TIMEOUT, source_port=0):
    conn = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    conn.settimeout(timeout)
    if source_port:
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        conn.bind(("", source_port))
    conn.connect((host, int(port)))
    return conn


def name_of(error):
    if isinstance(error, TimeoutError):
        return "ETIMEDOUT"
    return errno.errorcode.get(getattr(error, "errno", None) or 0, str(error))


def rest(conn):
    """Everything to the end, and which end it was."""
    data = b""
    try:
        while more := conn.recv(1 << 16):
            data += more
        return data, "eof"
    except OSError as error:
        return data, name_of(error)


def seen(conn):
    return {"peer": list(conn.getpeername()[:2]), "local": list(conn.getsockname()[:2])}


def echo(host, port, text="hello", count="1"):
    with dial(host, port) as conn:
        payload = text.encode() * int(count)
        thread = threading.Thread(target=lambda: (conn.sendall(payload), conn.shutdown(socket.SHUT_WR)), daemon=True)
        truth = seen(conn)
        thread.start()
        data, end = rest(conn)
        return {**truth, "same": data == payload, "end": end}


def speaks_first(host, port):
    with dial(host, port) as conn:
        truth = seen(conn)
        data, end = rest(conn)
        return {**truth, "server": json.loads(data) if data else None, "end": end}


def bulk(host, port, size):
    import bulk as both

    with dial(host, port, 60) as conn:
        conn.sendall(struct.pack("!Q", int(size)))
        return both.exchange(conn, int(size))


def short(host, port, total, parallel):
    """Short connections, each with a payload of its own that must come back."""
    lock, failures, done = threading.Lock(), {}, [0]
    per_thread = int(total) // int(parallel)

    def some():
        for _ in range(per_thread):
            payload = os.urandom(24)
            try:
                with dial(host, port) as conn:
                    conn.sendall(payload)
                    conn.shutdown(socket.SHUT_WR)
                    data, end = rest(conn)
                outcome = None if data == payload and end == "eof" else f"{len(data)} bytes, {end}"
            except OSError as error:
                outcome = name_of(error)
            with lock:
                done[0] += outcome is None
                if outcome:
                    failures[outcome] = failures.get(outcome, 0) + 1

    threads = [threading.Thread(target=some) for _ in range(int(parallel))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"done": done[0], "failures": failures}


def one_byte(host, port, count):
    with dial(host, port) as conn:
        conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        payload = os.urandom(int(count))

        def write():
            for byte in payload:
                conn.sendall(bytes([byte]))
            conn.shutdown(socket.SHUT_WR)

        threading.Thread(target=write, daemon=True).start()
        data, end = rest(conn)
        return {"same": data == payload, "bytes": len(data), "end": end}


def half_close(host, port, size):
    """We end first; the answer comes after."""
    with dial(host, port) as conn:
        conn.sendall(b"x" * int(size))
        conn.shutdown(socket.SHUT_WR)
        data, end = rest(conn)
        return {"answer": json.loads(data) if data else None, "end": end}


def server_closes_first(host, port, token, size):
    """The server ends first; what we send afterwards still arrives (port 8006 tells)."""
    with dial(host, port) as conn:
        conn.sendall(token.encode() + b"\n")
        said, end = rest(conn)
        conn.sendall(b"y" * int(size))
        return {"said": said.decode(), "end": end}


def outcome(host, port, token):
    with dial(host, port) as conn:
        conn.sendall(token.encode() + b"\n")
        data, _ = rest(conn)
        return json.loads(data) if data else None


def reset_us(host, port):
    """The server resets."""
    with dial(host, port) as conn:
        conn.sendall(b"now\n")
        data, end = rest(conn)
        return {"bytes": len(data), "end": end}


def reset_it(host, port, token):
    """We reset."""
    conn = dial(host, port)
    conn.sendall(token.encode() + b"\nabc")
    wait_for(host, token)
    conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    conn.close()
    return {}


def wait_for(host, token):
    """Until the server has taken note of the token."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        if outcome(host, 8006, token) is not None:
            return
        time.sleep(0.01)
    raise TimeoutError("the server did not note the token")


def connect(host, port, timeout="10", source_port="0"):
    """Only connects, and says how that went; and whether the connection lived on when it did."""
    with dial(host, port, float(timeout), int(source_port)) as conn:
        return seen(conn)


def refused(host, port, timeout="10"):
    """How an attempt fails: in connect, or by an end right after it."""
    try:
        with dial(host, port, float(timeout)) as conn:
            try:
                conn.sendall(b"hello\n")
                data, end = rest(conn)
            except OSError as error:
                data, end = b"", name_of(error)
            return {"connected": True, "bytes": len(data), "end": end}
    except OSError as error:
        return {"connected": False, "end": name_of(error)}


def hold(host, port, token=""):
    """Connects, says so, and then never reads; ends when its standard input does."""
    conn = dial(host, port)
    if token:
        conn.sendall(token.encode() + b"\n")
    print(json.dumps(seen(conn)), flush=True)
    sys.stdin.read()
    return {}


def stuff(host, port, token):
    """Sends to a peer that never reads, until nothing more is taken for a second; then holds on as `hold`."""
    conn = dial(host, port)
    conn.sendall(token.encode() + b"\n")
    conn.settimeout(1)
    sent, block = 0, b"z" * (1 << 16)
    try:
        while sent < 4 << 30:
            sent += conn.send(block)
    except TimeoutError:
        pass
    print(json.dumps({"sent": sent}), flush=True)
    sys.stdin.read()
    return {}


def watch(host, port):
    """Reads to the end, and says which end it was, after saying that it began."""
    conn = dial(host, port, 60)
    first = conn.recv(5)
    print(json.dumps({"first": first.decode()}), flush=True)
    data, end = rest(conn)
    return {"end": end}


def talk(host, port):
    """One connection, a line at a time, until standard input ends; then to its orderly end. Tells how many lines came
    back as they were."""
    finished = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), finished.set()), daemon=True).start()
    lines = 0
    with dial(host, port, 20) as conn:
        print("{}", flush=True)
        while not finished.is_set():
            line = f"line {lines}\n".encode()
            conn.sendall(line)
            got = b""
            while len(got) < len(line):
                more = conn.recv(len(line) - len(got))
                if not more:
                    return {"lines": lines, "end": "cut off"}
                got += more
            if got != line:
                return {"lines": lines, "end": "other bytes"}
            lines += 1
            time.sleep(0.01)
        conn.shutdown(socket.SHUT_WR)
        data, end = rest(conn)
        return {"lines": lines, "end": end, "left": len(data)}


def storm(host, port, seconds, marker, patience=10):
    """New connections one after the other, each with the marker, until standard input ends or time is over. Tells when
    connections succeeded, as CLOCK_MONOTONIC milliseconds, and how the others failed."""
    finished = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), finished.set()), daemon=True).start()
    deadline = time.monotonic() + float(seconds)
    good, failures = [], {}
    print("{}", flush=True)
    while time.monotonic() < deadline and not finished.is_set():
        try:
            with dial(host, port, float(patience)) as conn:
                conn.sendall(marker.encode())
                conn.shutdown(socket.SHUT_WR)
                data, end = rest(conn)
            if data == marker.encode():
                good.append(int(time.monotonic() * 1000))
                continue
            why = end
        except OSError as error:
            why = name_of(error)
        failures[why] = failures.get(why, 0) + 1
        time.sleep(0.002)
    return {"good": good, "failures": failures}


def udp(host, port, text="ping"):
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(1)
        try:
            sock.connect((host, int(port)))
            sock.send(text.encode())
            data = sock.recv(1 << 16)
            return {"answered": data == text.encode()}
        except OSError as error:
            return {"answered": False, "end": name_of(error)}


def main():
    what, arguments = sys.argv[1], sys.argv[2:]
    try:
        print(json.dumps(globals()[what.replace("-", "_")](*arguments)), flush=True)
    except OSError as error:
        print(json.dumps({"error": name_of(error)}), flush=True)


main()
