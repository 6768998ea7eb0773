"""Both ways at once, compared by hash: each side sends SIZE bytes that nobody can guess and their digest after them,
reads as many, and says whether what came is what was sent."""

import hashlib
import os
import socket
import threading

CHUNK = 1 << 20


def send(conn, size):
    base = os.urandom(CHUNK * 2)
    digest = hashlib.blake2b(digest_size=32)
    left, number = size, 0
    while left > 0:
        # Every chunk another window of the noise: a chunk lost, doubled or swapped changes the hash.
        chunk = memoryview(base)[number % CHUNK : number % CHUNK + min(CHUNK, left)]
        digest.update(chunk)
        conn.sendall(chunk)
        left -= len(chunk)
        number += 4099
    conn.sendall(digest.digest())


def receive(conn, size):
    digest = hashlib.blake2b(digest_size=32)
    buffer = memoryview(bytearray(CHUNK))
    left = size
    while left > 0:
        count = conn.recv_into(buffer[: min(CHUNK, left)])
        if count == 0:
            return {"whole": False, "missing": left}
        digest.update(buffer[:count])
        left -= count
    sent = conn.recv(32, socket.MSG_WAITALL)
    return {"whole": sent == digest.digest(), "missing": 0}


def exchange(conn, size):
    """Returns what came in, and whether the peer is content too."""
    sender = threading.Thread(target=send, args=(conn, size), daemon=True)
    sender.start()
    result = receive(conn, size)
    sender.join()
    conn.sendall(b"Y" if result["whole"] else b"N")
    result["peer_whole"] = conn.recv(1) == b"Y"
    return result
