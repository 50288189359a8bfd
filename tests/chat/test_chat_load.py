"""Two thousand requests at a concurrency of 64, against a server in a process of its own, which counts what it sees."""

import json
import subprocess
import sys
import time

import pytest

from maple_trl.chat import ChatClient, ChatOptions, ChatRequest


pytestmark = pytest.mark.slow


REQUESTS, CONCURRENCY = 2_000, 64

# HTTP by hand: it costs the core that the client runs on less than a web framework would.
SERVER = """
import asyncio, collections, json, sys

seen, answering, most, connections, open_now, most_open = collections.Counter(), 0, 0, 0, 0, 0

async def serve(reader, writer):
    global answering, most, connections, open_now, most_open
    connections, open_now = connections + 1, open_now + 1
    most_open = max(most_open, open_now)
    try:
        while True:
            head = (await reader.readuntil(b"\\r\\n\\r\\n")).lower()
            length = int(head.partition(b"content-length:")[2].partition(b"\\r\\n")[0])
            text = json.loads(await reader.readexactly(length))["messages"][-1]["content"]
            seen[text] += 1
            answering += 1
            most = max(most, answering)
            await asyncio.sleep(0.002)
            answering -= 1
            message = {"role": "assistant", "content": f"answer to {text}"}
            body = {"choices": [{"message": message, "finish_reason": "stop"}]}
            body["usage"] = {"prompt_tokens": 3, "completion_tokens": 2}
            content = json.dumps(body).encode()
            writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Type: application/json\\r\\n")
            writer.write(b"Content-Length: %d\\r\\n\\r\\n" % len(content) + content)
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        open_now -= 1
        writer.close()

async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    told = {"asked": sum(seen.values()), "different": len(seen), "most_at_once": most}
    print(json.dumps(told | {"connections": connections, "most_connections": most_open}), flush=True)

asyncio.run(main())
"""


@pytest.mark.long
def test_two_thousand_requests(record_property):
    requests = [ChatRequest([{"role": "user", "content": f"question {number}"}]) for number in range(REQUESTS)]
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
        options = ChatOptions(model="scripted", base_url=url, concurrency=CONCURRENCY, timeout=60, prompt_price=1e6)
        with ChatClient(options) as chat:
            started = time.perf_counter()
            results = chat.complete_many(requests)
            seconds = time.perf_counter() - started
            usage = chat.usage
        told = json.loads(server.communicate("", timeout=60)[0])
    finally:
        server.kill()
        server.wait()
    # Each has its own answer, in its place, and was asked once.
    assert [result.text for result in results] == [f"answer to question {number}" for number in range(REQUESTS)]
    assert told["asked"] == told["different"] == usage.sent == usage.succeeded == REQUESTS
    assert usage.retries == 0 and not usage.faults and not usage.failed
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cost) == (3 * REQUESTS, 2 * REQUESTS, 3.0 * REQUESTS)
    # The limit is kept, and used.
    assert CONCURRENCY / 2 < told["most_at_once"] <= CONCURRENCY
    assert told["most_connections"] <= CONCURRENCY and told["connections"] <= 2 * CONCURRENCY
    record_property("seconds", round(seconds, 1))
    print(f"{REQUESTS} requests: {seconds:.1f} s, {told}")
