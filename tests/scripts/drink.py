"""Reads as much as it is given: `drink.py HOST PORT CONNECTIONS` asks each for what it has (port 8008 has no end), throws it
away, and says how many bytes came when its standard input ends."""

import json
import socket
import sys
import threading

host, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
total = [0] * count


def drink(index):
    conn = socket.create_connection((host, port), 15)
    conn.sendall(b"drink-%d\n" % index)
    buffer = bytearray(1 << 20)
    while got := conn.recv_into(buffer):
        total[index] += got


for index in range(count):
    threading.Thread(target=drink, args=(index,), daemon=True).start()
sys.stdin.read()
print(json.dumps({"bytes": sum(total)}), flush=True)
