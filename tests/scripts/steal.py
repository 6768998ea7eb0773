"""Listens where the mesh's own proxy does, and tells who came: `steal.py PORT ...`, until standard input ends.

A line on standard input, `connect HOST PORT`, connects a socket that was made at the start, before the pod was enrolled.
"""

import json
import socket
import sys
import threading

came = []


def take(listener, port):
    while True:
        conn, peer = listener.accept()
        came.append([port, peer[0]])
        conn.close()


def listen(port):
    listener = socket.socket(socket.AF_INET6)
    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind(("::", port))
        listener.listen(64)
    except OSError as error:
        return str(error)
    threading.Thread(target=take, args=(listener, port), daemon=True).start()
    return "listens"


def main():
    early = socket.socket()
    early.settimeout(15)
    early.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    early.bind(("", 61900))
    print(json.dumps({port: listen(int(port)) for port in sys.argv[1:]}), flush=True)
    for line in sys.stdin:
        words = line.split()
        if words and words[0] == "connect":
            try:
                early.connect((words[1], int(words[2])))
                data = b""
                while more := early.recv(1 << 16):
                    data += more
                print(data.decode().strip() or "null", flush=True)
            except OSError as error:
                print(json.dumps({"error": str(error)}), flush=True)
    print(json.dumps({"came": came}), flush=True)


main()
