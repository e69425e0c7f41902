"""Holds back every packet of NFQUEUE 1 for so many seconds: `delay.py SECONDS`, until SIGTERM.

A poll loop and a deque: the queue is emptied as fast as it fills, and only headers are copied to us.
"""

from __future__ import annotations

import collections
import os
import select
import signal
import sys
import time

from netfilterqueue import COPY_META, NetfilterQueue

PACKETS_MAX = 65535
BUFFER_BYTES = 32 << 20


def main() -> None:
    seconds = float(sys.argv[1])
    waiting: collections.deque = collections.deque()
    held = 0
    is_over = False

    def take(packet: object) -> None:
        nonlocal held
        held += 1
        waiting.append((time.monotonic() + seconds, packet))

    def end(*_: object) -> None:
        nonlocal is_over
        is_over = True

    signal.signal(signal.SIGTERM, end)
    queue = NetfilterQueue()
    queue.bind(1, take, max_len=PACKETS_MAX, mode=COPY_META, sock_len=BUFFER_BYTES)
    descriptor = queue.get_fd()
    os.set_blocking(descriptor, False)
    print("ready", flush=True)
    while not is_over:
        left_s = max(0.0, waiting[0][0] - time.monotonic()) if waiting else 0.2
        if select.select([descriptor], [], [], left_s)[0]:
            queue.run(block=False)
        while waiting and waiting[0][0] <= time.monotonic():
            waiting.popleft()[1].accept()
    for _, packet in waiting:
        packet.accept()
    print("held", held, flush=True)


if __name__ == "__main__":
    main()
