"""Connections all the while: `load.py MARKER THREADS` dials the targets that its standard input names, until that ends.

A line of standard input is a JSON list of `[name, address]`: from then on these. Each connection sends the marker to port
8014 and is told who answers. One line of JSON for each: when it was begun and over (CLOCK_MONOTONIC, milliseconds), the
target's name, who answered or null, how it failed or null, and the address that it came from. And one, an object, for each
line of standard input: what is begun from then on is to its targets.
"""

import errno
import json
import random
import socket
import sys
import threading
import time

PORT = 8014
TIMEOUT = 15
targets = []
finished = threading.Event()
output = threading.Lock()


def say(value):
    with output:
        # In one piece: lines of several threads must not mix.
        sys.stdout.write(json.dumps(value) + "\n")
        sys.stdout.flush()


def now():
    return int(time.monotonic() * 1000)


def name_of(error):
    if isinstance(error, TimeoutError):
        return "ETIMEDOUT"
    return errno.errorcode.get(getattr(error, "errno", None) or 0, str(error))


def attempt(address, marker, out):
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as conn:
        conn.settimeout(TIMEOUT)
        try:
            conn.connect((address, PORT))
        finally:
            out["source"] = list(conn.getsockname()[:2])
        conn.sendall(marker.encode() + b"\n")
        conn.shutdown(socket.SHUT_WR)
        answer = b""
        while more := conn.recv(4096):
            answer += more
    name, _, echoed = answer.decode().strip().partition(" ")
    if echoed != marker:
        raise OSError(f"the answer was {answer!r}")
    return name


def dial(marker):
    while not finished.is_set():
        begun, known = now(), targets
        if not known:
            time.sleep(0.01)
            continue
        name, address = random.choice(known)
        out, answered, failed = {}, None, None
        try:
            answered = attempt(address, marker, out)
        except OSError as error:
            failed = name_of(error)
        say([begun, now(), name, answered, failed, out.get("source")])
        time.sleep(0.005)


def main():
    global targets
    marker, count = sys.argv[1], int(sys.argv[2])
    threads = [threading.Thread(target=dial, args=(marker,)) for _ in range(count)]
    for thread in threads:
        thread.start()
    for line in sys.stdin:
        targets = json.loads(line)
        say({"targets": len(targets)})
    finished.set()
    for thread in threads:
        thread.join()
    say({"finished": True})


main()
