"""Many connections of one pod, on one thread: `crowd.py HOST PORT [FIRST_SOURCE_PORT]`, told what to do by lines.

`add N` opens N more and has each answered once; `say` has every one that lives answered again; `drop N` closes the N that
are the oldest. Each is answered by a line of JSON: how many live, how many were answered, and how others failed.
"""

import errno
import json
import os
import selectors
import socket
import struct
import sys

AT_ONCE = 128
TIMEOUT = 30


class Crowd:
    def __init__(self, host, port, source_port):
        self.address, self.source_port = (host, int(port)), int(source_port)
        self.family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.live = []

    def dial(self):
        conn = socket.socket(self.family, socket.SOCK_STREAM)
        conn.setblocking(False)
        if self.source_port:
            conn.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            conn.bind(("", self.source_port))
            self.source_port += 1
        error = conn.connect_ex(self.address)
        if error not in (0, errno.EINPROGRESS):
            conn.close()
            raise OSError(error, os.strerror(error))
        return conn

    def exchange(self, conns):
        """Says something of its own on each, and reads the same back; those that answered, and how the others failed."""
        selector, good, failures = selectors.DefaultSelector(), [], {}
        waiting = list(reversed(conns))
        open_ones = 0

        def begin():
            nonlocal open_ones
            try:
                conn = waiting.pop() or self.dial()
            except OSError as error:
                return fail(None, error)
            selector.register(conn, selectors.EVENT_WRITE, [os.urandom(64), b""])
            open_ones += 1

        def fail(conn, error):
            name = "ETIMEDOUT" if isinstance(error, TimeoutError) else errno.errorcode.get(error.errno or 0, str(error))
            failures[name] = failures.get(name, 0) + 1
            if conn:
                conn.close()

        def step(key):
            """Whether that connection is done with."""
            conn, (said, heard) = key.fileobj, key.data
            if key.events & selectors.EVENT_WRITE:
                error = conn.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if error:
                    raise OSError(error, os.strerror(error))
                conn.sendall(said)
                selector.modify(conn, selectors.EVENT_READ, key.data)
                return False
            more = conn.recv(64)
            if not more:
                raise OSError(errno.ECONNRESET, "ended")
            key.data[1] = heard + more
            if len(key.data[1]) < len(said):
                return False
            if key.data[1] != said:
                raise OSError(errno.EBADMSG, "another answer")
            return True

        while waiting or open_ones:
            while waiting and open_ones < AT_ONCE:
                begin()
            ready = selector.select(TIMEOUT)
            if not ready and open_ones:
                for key in list(selector.get_map().values()):
                    fail(key.fileobj, TimeoutError())
                open_ones = 0
                selector.close()
                selector = selectors.DefaultSelector()
            for key, _ in ready:
                try:
                    if not step(key):
                        continue
                    good.append(key.fileobj)
                    selector.unregister(key.fileobj)
                except OSError as error:
                    selector.unregister(key.fileobj)
                    fail(key.fileobj, error)
                open_ones -= 1
        selector.close()
        return good, failures

    def add(self, count):
        good, failures = self.exchange([None] * count)
        self.live += good
        return {"answered": len(good), "failures": failures}

    def say(self):
        self.live, failures = self.exchange(self.live)
        return {"answered": len(self.live), "failures": failures}

    def drop(self, count):
        for conn in self.live[:count]:
            # By a reset, so that no port is kept for a minute (TIME_WAIT).
            conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            conn.close()
        self.live = self.live[count:]
        return {}


def main():
    crowd = Crowd(sys.argv[1], sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else 0)
    for line in sys.stdin:
        what, *count = line.split()
        result = getattr(crowd, what)(*map(int, count))
        print(json.dumps({**result, "live": len(crowd.live)}), flush=True)


main()
