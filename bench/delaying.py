"""A relay on loopback that adds a delay to whatever passes, as a line to a far server does.

    python bench/delaying.py PORT SERVER_PORT SECONDS        (each way)

The bytes of a second pass in a second: only the way is long, not narrow. A connection costs a round, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time

PIECE_BYTES = 256 << 10
PIECES_MAX = 256  # on the way of one direction


async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, delay_s: float) -> None:
    """Until the source ends, or the sink is gone."""
    on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(PIECES_MAX)

    async def arrive() -> None:
        while True:
            at_s, data = await on_the_way.get()
            await asyncio.sleep(max(0.0, at_s - time.monotonic()))
            if not data:
                sink.write_eof()
                return
            sink.write(data)
            await sink.drain()

    arriving = asyncio.create_task(arrive())
    with contextlib.suppress(OSError):
        while not arriving.done():
            data = await source.read(PIECE_BYTES)
            await on_the_way.put((time.monotonic() + delay_s, data))
            if not data:
                break
    with contextlib.suppress(OSError):
        await arriving


async def serve(port: int, server_port: int, delay_s: float) -> None:
    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(2 * delay_s)
        there, back = await asyncio.open_connection("127.0.0.1", server_port)
        await asyncio.gather(pump(reader, back, delay_s), pump(there, writer, delay_s))
        back.close()
        writer.close()

    server = await asyncio.start_server(relay, "127.0.0.1", port)
    print(f"relaying to {server_port}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
