"""Ways out of a pod that do not go through the mesh, tried as root in the pod: `escape.py PATIENCE WAY TEXT TARGET ...`.

Every way sends TEXT to port 8001 of every target, from a source port of its own above 61000, from which no agent dials
anything outside of a pod: a packet with such a port, or with TEXT in it, that is seen there has escaped. An answer is
waited for PATIENCE seconds. What is printed is what each attempt came to, for the reader; whether it escaped is judged
outside.
"""

import ctypes
import errno
import ipaddress
import json
import os
import socket
import struct
import subprocess
import sys
import time

PORT = 8001
TCP_FASTOPEN_CONNECT = 30
TCP_FASTOPEN_NO_COOKIE = 34
TCP_REPAIR = 19
MSG_FASTOPEN = 0x20000000
IP_TRANSPARENT = 19
IPV6_TRANSPARENT = 75
IPPROTO_MPTCP = 262
SYN, ACK, PSH = 2, 16, 8
patience = 1.0


def family(target):
    return socket.AF_INET6 if ":" in target else socket.AF_INET


def stream(target, protocol=0, kind=None):
    sock = socket.socket(kind or family(target), socket.SOCK_STREAM, protocol)
    # Some never get an answer; what got out by then would have been seen.
    sock.settimeout(patience)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return sock


def talk(sock, text):
    """Sends and reads what comes back: an echo means that somebody carried it."""
    sock.sendall(text)
    sock.shutdown(socket.SHUT_WR)
    data = b""
    while more := sock.recv(1 << 16):
        data += more
    return "echo" if data == text else f"{len(data)} bytes"


def dial(target, text, port, prepare=lambda sock: None, protocol=0, kind=None, to=None):
    with stream(target, protocol, kind) as sock:
        prepare(sock)
        sock.bind(("", port))
        sock.connect((to or target, PORT))
        return talk(sock, text)


# --- with a socket of the kernel's TCP


def tcp(target, text, port):
    return dial(target, text, port)


def fast_open_by_sendto(target, text, port):
    with stream(target) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_NO_COOKIE, 1)
        sock.bind(("", port))
        sock.sendto(text, MSG_FASTOPEN, (target, PORT))
        sock.shutdown(socket.SHUT_WR)
        return f"{len(sock.recv(1 << 16))} bytes"


def fast_open_by_connect(target, text, port):
    def prepare(sock):
        sock.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
        sock.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_NO_COOKIE, 1)

    return dial(target, text, port, prepare)


def marks(target, text, port):
    found = []
    for index, mark in enumerate([0x539, 0x1539, 1, 0x10539, 0xFFFFFFFF]):
        def prepare(sock):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, struct.pack("I", mark))

        found.append(attempt(dial, target, text, port + 10 * index, prepare))
    return found


def devices(target, text, port):
    found = []
    for index, device in enumerate([b"eth0", b"lo"]):
        def prepare(sock):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device)

        found.append(attempt(dial, target, text, port + 10 * index, prepare))
    return found


def v4_mapped(target, text, port):
    if ":" in target:
        return "not for IPv6"
    return dial(target, text, port, kind=socket.AF_INET6, to=f"::ffff:{target}")


def mptcp(target, text, port):
    return dial(target, text, port, protocol=IPPROTO_MPTCP)


def user_1337(target, text, port):
    pid = os.fork()
    if pid == 0:
        os.setgid(1337)
        os.setuid(1337)
        try:
            os._exit(0 if dial(target, text, port) == "echo" else 1)
        except OSError as error:
            os._exit(error.errno or 1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return "echo" if code == 0 else errno.errorcode.get(code, str(code))


def again_after_disconnect(target, text, port):
    """connect, dissolve the association (AF_UNSPEC), connect again: the second must not run on the first's ticket."""
    libc = ctypes.CDLL(None, use_errno=True)
    with stream(target) as sock:
        sock.connect((target, PORT))
        unspec = ctypes.create_string_buffer(16)
        if libc.connect(sock.fileno(), unspec, 16) != 0:
            raise OSError(ctypes.get_errno(), "disconnect")
        sock.bind(("", port))
        sock.settimeout(2)
        sock.connect((target, PORT))
        return [list(sock.getpeername()[:2]), talk(sock, text)]


def repair(target, text, port):
    """TCP_REPAIR: a connection that is declared open without a handshake."""
    with stream(target) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
        sock.bind(("", port))
        sock.connect((target, PORT))
        sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 0)
        return talk(sock, text)


def foreign_source(target, text, port):
    foreign = "fd00:bad::1" if ":" in target else "192.0.2.7"
    level, option = (socket.IPPROTO_IPV6, IPV6_TRANSPARENT) if ":" in target else (socket.IPPROTO_IP, IP_TRANSPARENT)
    with stream(target) as sock:
        sock.settimeout(0.4)
        sock.setsockopt(level, option, 1)
        sock.bind((foreign, port))
        sock.connect((target, PORT))
        return talk(sock, text)


def added_address(target, text, port):
    added = "fd00:10:244:1::7777" if ":" in target else "10.244.1.177"
    run("ip", "addr", "add", added, "dev", "eth0", *(["nodad"] if ":" in target else []))
    try:
        with stream(target) as sock:
            sock.settimeout(0.4)
            sock.bind((added, port))
            sock.connect((target, PORT))
            return talk(sock, text)
    finally:
        run("ip", "addr", "del", added, "dev", "eth0")


def nat_in_the_pod(target, text, port):
    """A connection to the pod itself, which the hooks have no reason to touch, turned outward by the pod's own NAT."""
    own = own_address(target)
    version = "ip6" if ":" in target else "ip"
    to = f"[{target}]:{PORT}" if ":" in target else f"{target}:{PORT}"
    rules = (
        f"table {version} escape {{\nchain out {{\ntype nat hook output priority -100\n"
        f"{version} daddr {own} tcp dport 9999 dnat to {to}\n}}\n}}\n"
    )
    done = subprocess.run(["nft", "-f", "-"], input=rules.encode(), check=False, capture_output=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.decode())
    try:
        with stream(target) as sock:
            sock.settimeout(0.4)
            sock.bind(("", port))
            sock.connect((own, 9999))
            return talk(sock, text)
    finally:
        run("nft", "delete", "table", version, "escape")


def io_uring(target, text, port):
    """connect() and send() by the kernel's own worker (IORING_OP_CONNECT, IORING_OP_SEND)."""
    ring = Ring()
    with stream(target) as sock:
        sock.settimeout(None)
        sock.bind(("", port))
        if ":" in target:
            address = struct.pack("=H", socket.AF_INET6) + struct.pack("!HI", PORT, 0)
            address += socket.inet_pton(socket.AF_INET6, target) + struct.pack("I", 0)
        else:
            address = struct.pack("=H", socket.AF_INET) + struct.pack("!H", PORT)
            address += socket.inet_aton(target) + bytes(8)
        ring.run(16, sock.fileno(), address, off=len(address), length=0)
        ring.run(26, sock.fileno(), text, off=0, length=len(text))
        sock.settimeout(patience)
        sock.shutdown(socket.SHUT_WR)
        data = b""
        while more := sock.recv(1 << 16):
            data += more
        return "echo" if data == text else f"{len(data)} bytes"


class Ring:
    """The least of io_uring: one entry at a time. Offsets as io_uring_setup(2) hands them out."""

    def __init__(self):
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.mmap.restype = ctypes.c_void_p
        self.libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
        params = ctypes.create_string_buffer(120)
        self.fd = self.libc.syscall(425, 4, params)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "io_uring_setup")
        self.sq = struct.unpack_from("8I", params, 40)
        self.cq = struct.unpack_from("8I", params, 80)
        self.ring, self.cring = self.map(0), self.map(0x8000000)
        self.sqes = self.map(0x10000000)

    def map(self, offset):
        address = self.libc.mmap(None, 4096, 3, 0x8001, self.fd, offset)
        if address == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), "mmap")
        return address

    def word(self, base, offset):
        return ctypes.c_uint32.from_address(base + offset)

    def run(self, opcode, fd, data, off, length):
        buffer = ctypes.create_string_buffer(data, len(data))
        head, tail, mask, _, _, _, array = self.sq[:7]
        at = self.word(self.ring, tail).value
        index = at & self.word(self.ring, mask).value
        entry = struct.pack("=BBHiQQI", opcode, 0, 0, fd, off, ctypes.addressof(buffer), length).ljust(64, b"\0")
        ctypes.memmove(self.sqes + 64 * index, entry, 64)
        self.word(self.ring, array + 4 * index).value = index
        self.word(self.ring, tail).value = at + 1
        if self.libc.syscall(426, self.fd, 1, 1, 1, None, 0) < 0:
            raise OSError(ctypes.get_errno(), "io_uring_enter")
        head, _, mask, _, _, cqes = self.cq[:6]
        at = self.word(self.cring, head).value
        entry = self.cring + cqes + 16 * (at & self.word(self.cring, mask).value)
        result = ctypes.c_int32.from_address(entry + 8).value
        self.word(self.cring, head).value = at + 1
        if result < 0:
            raise OSError(-result, "io_uring")


# --- with packets made by hand


def checksum(data):
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def segment(source, target, port, text, flags):
    head = struct.pack("!HHIIBBHHH", port, PORT, 1000, 2000, 5 << 4, flags, 65535, 0, 0)
    pack = ipaddress.ip_address
    pseudo = pack(source).packed + pack(target).packed + struct.pack("!II", len(head) + len(text), socket.IPPROTO_TCP)
    total = checksum(pseudo + head + text)
    return head[:16] + struct.pack("!H", total) + head[18:] + text


def packet(source, target, payload, protocol=socket.IPPROTO_TCP, fragment=0):
    if ":" in target:
        head = struct.pack("!IHBB", 6 << 28, len(payload), protocol, 64)
        return head + ipaddress.ip_address(source).packed + ipaddress.ip_address(target).packed + payload
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 4711, fragment, 64, protocol, 0)
    head += socket.inet_aton(source) + socket.inet_aton(target)
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + payload


def own_address(target):
    with socket.socket(family(target), socket.SOCK_DGRAM) as sock:
        sock.connect((target, 9))
        return sock.getsockname()[0]


def all_flags(target, text, port):
    """A SYN, a middle and an answer of a connection, each with data."""
    own = own_address(target)
    return [segment(own, target, port + index, text, flags) for index, flags in enumerate([SYN, ACK | PSH, SYN | ACK])]


def raw_ip(target, text, port):
    own, sent = own_address(target), []
    with socket.socket(family(target), socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
        for part in all_flags(target, text, port):
            sent.append(attempt(sock.sendto, packet(own, target, part), (target, 0)))
    return sent


def raw_tcp(target, text, port):
    sent = []
    with socket.socket(family(target), socket.SOCK_RAW, socket.IPPROTO_TCP) as sock:
        for part in all_flags(target, text, port):
            sent.append(attempt(sock.sendto, part, (target, 0)))
    return sent


def fragments(target, text, port):
    """The TCP header in one fragment, or cut in two, and the data in the others."""
    own, sent = own_address(target), []
    whole = segment(own, target, port, text[: len(text) // 8 * 8], SYN)
    with socket.socket(family(target), socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
        for cut in [8, 24]:
            for offset, part, more in [(0, whole[:cut], True), (cut, whole[cut:], False)]:
                if ":" in target:
                    head = struct.pack("!BBHI", socket.IPPROTO_TCP, 0, offset | more, 4711 + cut)
                    data = packet(own, target, head + part, protocol=44)
                else:
                    data = packet(own, target, part, fragment=(0x2000 if more else 0) | offset // 8)
                sent.append(attempt(sock.sendto, data, (target, 0)))
    return sent


def encapsulated(target, text, port):
    """TCP inside of IP inside of IP, and with headers between."""
    own, sent = own_address(target), []
    inner = packet(own, target, segment(own, target, port, text, SYN))
    with socket.socket(family(target), socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
        protocols = [41, 47] if ":" in target else [4, 47]
        for protocol in protocols:
            data = struct.pack("!HH", 0, 0x86DD if ":" in target else 0x0800) + inner if protocol == 47 else inner
            sent.append(attempt(sock.sendto, packet(own, target, data, protocol=protocol), (target, 0)))
        if ":" in target:
            tcp_segment = segment(own, target, port + 1, text, SYN)
            for count in [1, 12]:
                options = b"".join(
                    struct.pack("!BBHI", 60 if left > 1 else 6, 0, 0x0104, 0) for left in range(count, 0, -1)
                )
                data = packet(own, target, options + tcp_segment, protocol=60)
                sent.append(attempt(sock.sendto, data, (target, 0)))
    return sent


def gateway(target):
    """The link-layer address of the node's end."""
    with socket.socket(family(target), socket.SOCK_DGRAM) as sock:
        sock.sendto(b"hello", (target, 9))
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        for line in run("ip", "-6" if ":" in target else "-4", "neigh", "show", "dev", "eth0").splitlines():
            words = line.split()
            if "lladdr" in words:
                return bytes.fromhex(words[words.index("lladdr") + 1].replace(":", ""))
        time.sleep(0.01)
    raise TimeoutError("no neighbour")


def link_layer(target, text, port, tags=b""):
    own, peer, sent = own_address(target), gateway(target), []
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.bind(("eth0", 0))
        mine = sock.getsockname()[4]
        kind = struct.pack("!H", 0x86DD if ":" in target else 0x0800)
        for part in all_flags(target, text, port):
            for to in [peer, b"\xff" * 6]:
                sent.append(attempt(sock.send, to + mine + tags + kind + packet(own, target, part)))
    return sent


def packet_socket(target, text, port):
    return link_layer(target, text, port)


def packet_socket_with_vlan(target, text, port):
    tagged = [struct.pack("!HH", 0x8100, 0), struct.pack("!HH", 0x8100, 7), struct.pack("!HHHH", 0x88A8, 0, 0x8100, 0)]
    return [link_layer(target, text, port + 10 * index, tags) for index, tags in enumerate(tagged)]


def packet_socket_with_odd_type(target, text, port):
    """Not IP by its Ethernet type: MPLS, PPPoE, experimental."""
    tagged = [bytes.fromhex(kind) for kind in ["8847000000ff", "886411000001000a0021", "88b5"]]
    return [link_layer(target, text, port + 10 * index, tags) for index, tags in enumerate(tagged)]


def other_pods_address(target, text, port):
    """By hand and as if from a pod that is not in the mesh."""
    source, peer, sent = ("fd00:10:244:1::99" if ":" in target else "10.244.1.199"), gateway(target), []
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.bind(("eth0", 0))
        mine = sock.getsockname()[4]
        kind = struct.pack("!H", 0x86DD if ":" in target else 0x0800)
        part = segment(source, target, port, text, SYN)
        sent.append(attempt(sock.send, peer + mine + kind + packet(source, target, part)))
    return sent


def nested_namespace(target, text, port):
    """A namespace inside the pod, bridged to its link, with the pod's own address: its sockets are in no known network."""
    own, sent = own_address(target), []
    child = subprocess.Popen(["unshare", "--user", "--map-root-user", "--net", "sleep", "30"])
    try:
        deadline = time.monotonic() + 5
        while os.readlink(f"/proc/{child.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
            if child.poll() is not None or time.monotonic() > deadline:
                return "unshare is not permitted"
            time.sleep(0.01)
        inside = ["nsenter", "--preserve-credentials", "-U", "-n", "-t", str(child.pid)]
        run("ip", "link", "add", "nest0", "type", "veth", "peer", "name", "eth0", "netns", str(child.pid))
        run("ip", "link", "add", "nestbr", "type", "bridge")
        for link in ["nest0", "eth0"]:
            run("ip", "link", "set", link, "master", "nestbr")
        for link in ["nest0", "nestbr"]:
            run("ip", "link", "set", link, "up")
        run(*inside, "ip", "link", "set", "eth0", "up")
        via = "fe80::1" if ":" in target else "169.254.1.1"
        run(*inside, "ip", "addr", "add", own, "dev", "eth0", *(["nodad"] if ":" in target else []))
        if ":" not in target:
            run(*inside, "ip", "route", "add", via, "dev", "eth0")
        run(*inside, "ip", "route", "add", "default", "via", via, "dev", "eth0")
        for way in ["tcp", "raw_ip", "packet_socket"]:
            arguments = [sys.executable, __file__, str(patience), way, text[: len(text) // 20].decode(), target]
            done = subprocess.run([*inside, *arguments], capture_output=True, timeout=20)
            sent.append([way, done.stdout.decode().strip() or done.stderr.decode()[-200:]])
        return sent
    finally:
        child.kill()
        child.wait()
        # The node has learnt the nested link's address; asking for the node's anew tells it the pod's own again.
        for line in [["link", "set", "eth0", "nomaster"], ["link", "del", "nestbr"], ["neigh", "flush", "dev", "eth0"]]:
            subprocess.run(["ip", *line], capture_output=True)


def run(*words):
    done = subprocess.run(words, capture_output=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.decode().strip()}")
    return done.stdout.decode()


def attempt(work, *arguments):
    try:
        return work(*arguments)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    except (RuntimeError, subprocess.SubprocessError) as error:
        return str(error)


def main():
    global patience
    patience, way, text, targets = float(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:]
    base = 61000 + 64 * (sum(way.encode()) % 15)
    results = {target: attempt(globals()[way], target, text.encode() * 20, base + 5 * index) for index, target in enumerate(targets)}
    print(json.dumps(results), flush=True)


main()
