"""The uninterrupted run that rounds are held against: the ranks are forked from one process, so that torch is
imported once. The computation is that of the trainer under torchrun, to the bit; a round checks that, too: its own
steps are compared with these.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import trainer


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def child(rank: int, world_size: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK="0",
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
    )
    code = 1
    try:
        code = trainer.main()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def main() -> int:
    world_size = int(os.environ["WORLD_SIZE"])
    port = free_port()
    pids = []
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            child(rank, world_size, port)
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return max(map(abs, codes))


if __name__ == "__main__":
    sys.exit(main())
