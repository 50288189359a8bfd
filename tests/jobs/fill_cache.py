"""What the processes do that share a cache, by itself: a process that is told to call it imports nothing else."""

from maple_trl.chat.cache import ChatCache


def fill(path, worker, barrier, told):
    barrier.wait()
    cache = ChatCache(path)
    for number in range(40):
        cache.put(f"{worker}-{number}", {"text": f"{worker}-{number}"})
        cache.get(f"{worker - 1}-{number}")
    told.put(cache.errors)
    cache.close()
