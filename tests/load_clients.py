"""Clients that load a server: in a closed loop, at random moments, at a steady pace."""

import asyncio
import random
import time


def message(body, kind="image/jpeg"):
    head = f"POST /invocations HTTP/1.1\r\nHost: a\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Connection:
    """The least that a client can be, so that little of the two cores is the client's."""

    async def open(self, address):
        host, port = address.split(":")
        self.reader, self.writer = await asyncio.open_connection(host, int(port))
        return self

    async def ask(self, sent):
        """The status, and the seconds that it took."""
        began = time.perf_counter()
        self.writer.write(sent)
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
        await self.reader.readexactly(length)
        return int(head[9:12]), time.perf_counter() - began


async def closed_loop(address, messages, clients, count):
    """Requests a second of clients that ask again when they are answered, and the statuses and seconds."""
    connections, results = [await Connection().open(address) for _ in range(clients)], []
    todo = iter(range(count))

    async def client(connection):
        for k in todo:
            results.append(await connection.ask(messages[k % len(messages)]))

    began = time.perf_counter()
    await asyncio.gather(*(client(c) for c in connections))
    for c in connections:
        c.writer.close()
    return count / (time.perf_counter() - began), results


async def open_loop(address, messages, rate, seconds, seed=1):
    """Requests that come at random moments, `rate` a second, whether the server keeps up or not: statuses and seconds."""
    rng, free, tasks, results = random.Random(seed), [], [], []

    async def one(sent, due):
        connection = free.pop() if free else await Connection().open(address)
        status, _ = await connection.ask(sent)
        results.append((status, time.perf_counter() - due))
        free.append(connection)

    began = due = time.perf_counter()
    while due < began + seconds:
        due += rng.expovariate(rate)
        await asyncio.sleep(max(0, due - time.perf_counter()))
        tasks.append(asyncio.ensure_future(one(rng.choice(messages), due)))
    await asyncio.gather(*tasks)
    for c in free:
        c.writer.close()
    return results


async def paced_loop(address, messages, clients, rate, seconds, seed=1):
    """Requests of clients that each ask at a steady pace of their own, together `rate` a second: statuses and seconds since each was due."""
    rng, results = random.Random(seed), []

    async def client(connection):
        due = time.perf_counter() + rng.random() * clients / rate
        end = due + seconds
        while due < end:
            await asyncio.sleep(max(0, due - time.perf_counter()))
            status, _ = await connection.ask(rng.choice(messages))
            results.append((status, time.perf_counter() - due))
            due += clients / rate
        connection.writer.close()

    await asyncio.gather(*[client(await Connection().open(address)) for _ in range(clients)])
    return results
