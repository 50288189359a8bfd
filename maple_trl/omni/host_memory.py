"""
The memory that a process keeps on its host, in one budget.

Caches share it: whatever comes in, the entry that was used longest ago goes, be it another cache's. What cannot go, such as
the prompts of a rollout or completions stored for replay, is counted, and caches have what it leaves. So the sum of the caches and of
what is counted stays within the budget, unless what is counted alone is more; a warning says so.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from itertools import count
from typing import Any, Generic, TypeVar

from maple_trl.omni.machine_memory import children_of, resident_bytes


logger = logging.getLogger(__name__)

Key = TypeVar("Key")
Value = TypeVar("Value")
Size = Callable[[Any, Any], int]

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}ib": 1 << 10 * (i + 1) for i, letter in enumerate("kmgt")}
_UNITS |= {f"{letter}b": 1000 ** (i + 1) for i, letter in enumerate("kmgt")}


class HostCache(MutableMapping[Key, Value], Generic[Key, Value]):
    """
    A part of the budget whose entries may go: those used longest ago first, as in [`cachetools.LRUCache`].

    A value for which there is no room is not kept. Thread-safe.

    Attributes:
        part (`str`): its name in the log; caches may share one.
        maxsize (`int`): bytes that it may have, whatever the budget leaves.
        currsize (`int`): bytes that it has.
    """

    def __init__(self, memory: HostMemory, part: str, maxsize: int, size: Size):
        self.part, self.maxsize, self.currsize = part, maxsize, 0
        self._memory, self._size = memory, size
        # Value, bytes, and when it was last used.
        self._entries: OrderedDict[Key, tuple[Value, int, int]] = OrderedDict()

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    def __getitem__(self, key: Key) -> Value:
        with self._memory.lock:
            value, size, _ = self._entries[key]
            self._entries[key] = value, size, self._memory.now()
            self._entries.move_to_end(key)
            return value

    def __setitem__(self, key: Key, value: Value) -> None:
        size = self._size(key, value)
        with self._memory.lock:
            if key in self._entries:
                del self[key]
            if self._memory.make_room(self, size):
                self._entries[key] = value, size, self._memory.now()
                self.currsize += size

    def __delitem__(self, key: Key) -> None:
        with self._memory.lock:
            self.currsize -= self._entries.pop(key)[1]

    def clear(self) -> None:
        """Let go all entries."""
        with self._memory.lock:
            self._entries.clear()
            self.currsize = 0

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Key]:
        with self._memory.lock:
            return iter(list(self._entries))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy what it is, and nothing that is in it: another process has a budget of its own."""
        return _empty_cache, (self.part, self.maxsize, self._size)

    @property
    def oldest(self) -> int | None:
        """When the entry was used that was not for longest; `None` where there is none."""
        return next(iter(self._entries.values()))[2] if self._entries else None

    def evict(self) -> None:
        """Let go the entry that was used longest ago."""
        with self._memory.lock:
            _, (_, size, _) = self._entries.popitem(last=False)
            self.currsize -= size


class HostMemory:
    """
    A budget of bytes, the caches that share it, and what else counts against it.

    Attributes:
        limit (`int`, *optional*): the budget; `None`: each cache has its own bound alone.
        evictions (`int`): entries that caches have let go for want of room.
    """

    def __init__(self, limit: int | None = None):
        self.lock = threading.RLock()
        self.limit = limit
        self.evictions = 0
        self._caches: weakref.WeakSet[HostCache] = weakref.WeakSet()
        # Single operations on it, which need no lock: what is collected takes itself out at any time, in any thread.
        self._held: dict[int, tuple[str, int]] = {}
        self._uses = count()
        self._told: set[str] = set()

    def now(self) -> int:
        """Count a use of an entry."""
        return next(self._uses)

    def set_limit(self, limit: int | None) -> None:
        """Begin with another budget; caches let go what is beyond it."""
        gc.collect()  # what a former trainer held, which is in cycles, does not count against the next
        with self.lock:
            self.limit = limit
            self._told.clear()
            self._shrink(0)

    def cache(self, part: str, maxsize: int, size: Size | None = None) -> HostCache:
        """
        Make a cache that shares the budget, for as long as it is used.

        Args:
            part: what the log calls it.
            maxsize: bytes that it may have, whatever the budget leaves.
            size: bytes of an entry, of its key and its value; by default of text and other values of JSON.
        """
        cache: HostCache = HostCache(self, part, maxsize, size or _deep_size)
        with self.lock:
            self._caches.add(cache)
        return cache

    # What cannot go

    def hold(self, part: str, owner: Any, size: int) -> None:
        """Count bytes against the budget until `owner` is no more; called again, those take the place of the former."""
        key = id(owner)
        if key not in self._held:
            weakref.finalize(owner, self._held.pop, key, None).atexit = False
        self._count(key, part, size)

    @contextmanager
    def reserved(self, part: str, size: int) -> Iterator[None]:
        """Count bytes against the budget until the context is left."""
        owner = object()
        self._count(id(owner), part, size)
        try:
            yield
        finally:
            self._held.pop(id(owner), None)

    def _count(self, key: int, part: str, size: int) -> None:
        with self.lock:
            if self.limit is not None:
                others = {owner: entry for owner, entry in self._held.copy().items() if owner != key}
                self._shrink(size + sum(held for _, held in others.values()), held=0)
            self._held[key] = part, size
        held = self.held
        if self.limit is not None and held > self.limit and "held" not in self._told:
            gc.collect()  # no warning of what nobody uses any more
            held = self.held
        if self.limit is not None and held > self.limit:
            self._tell(
                "held",
                f"what cannot be let go takes {readable(held)} ({_listed(self._held_parts())}), more than the "
                f"{readable(self.limit)} that this process may keep on its host: nothing is cached any more. Raise "
                "host_memory_bytes, or lower what takes most",
            )

    @property
    def held(self) -> int:
        """Bytes of what cannot go."""
        return sum(size for _, size in list(self._held.values()))

    @property
    def cached(self) -> int:
        """Bytes of the caches."""
        with self.lock:
            return sum(cache.currsize for cache in self._caches)

    # Room

    def make_room(self, cache: HostCache, size: int) -> bool:
        """Make room in a cache for an entry; return whether there is any."""
        with self.lock:
            room = cache.maxsize if self.limit is None else min(cache.maxsize, self.limit - self.held)
            if size > room:
                if self.limit is not None and cache.maxsize:
                    self._tell(
                        cache.part,
                        f"an entry of {readable(size)} does not fit into the {readable(max(room, 0))} that "
                        f"{cache.part!r} may have, and is made anew whenever it is asked for ({self._said(cache)})",
                    )
                return False
            while cache.currsize + size > cache.maxsize:
                self._evict(cache)
            self._shrink(size)
            return True

    def _shrink(self, wanted: int, held: int | None = None) -> None:
        """Let entries go until so many bytes are free, those used longest ago first, whatever cache they are in."""
        if self.limit is None:
            return
        room = self.limit - wanted - (self.held if held is None else held)
        caches = list(self._caches)
        while sum(cache.currsize for cache in caches) > room:
            filled = [(cache.oldest, cache) for cache in caches if cache.oldest is not None]
            if not filled:
                return
            self._evict(min(filled, key=lambda pair: pair[0])[1])

    def _evict(self, cache: HostCache) -> None:
        cache.evict()
        self.evictions += 1

    def _said(self, cache: HostCache) -> str:
        taken = f", of which {readable(self.held)} are taken" if self.held else ""
        return f"host memory of this process: {readable(self.limit or 0)}{taken}; bound of the part: {readable(cache.maxsize)}"

    def _tell(self, what: str, text: str) -> None:
        if what not in self._told:  # once, however often it happens
            self._told.add(what)
            logger.warning("Host memory: %s.", text)

    # What is told

    def _held_parts(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for part, size in list(self._held.values()):
            found[part] = found.get(part, 0) + size
        return found

    def parts(self) -> dict[str, int]:
        """Return the bytes of each part, by name."""
        with self.lock:
            found = self._held_parts()
            for cache in self._caches:
                found[cache.part] = found.get(cache.part, 0) + cache.currsize
        return dict(sorted(found.items()))

    def metrics(self) -> dict[str, float]:
        """Return what the log is told: bytes by part and in sum, the budget, evictions, and what the system counts."""
        parts = self.parts()
        found = {f"memory/host_bytes/{part}": float(size) for part, size in parts.items()}
        found |= {"memory/host_bytes": float(sum(parts.values())), "memory/host_evictions": float(self.evictions)}
        if self.limit is not None:
            found["memory/host_budget"] = float(self.limit)
        own = resident_bytes(os.getpid())
        if own is not None:
            children = [resident_bytes(child) or 0 for child in children_of(os.getpid())]
            found |= {"memory/host_rss": float(own), "memory/host_rss_children": float(sum(children))}
        return found


_memory = HostMemory()


def host_memory() -> HostMemory:
    """Return the budget of this process; the trainer or evaluation that was made last has set its limit."""
    return _memory


def _empty_cache(part: str, maxsize: int, size: Size) -> HostCache:
    return host_memory().cache(part, maxsize, size)


Prompt = TypeVar("Prompt")


def hold_prompt(prompt: Prompt) -> Prompt:
    """Count what an encoded prompt holds against the budget for as long as it is used, and return it."""
    host_memory().hold("prompts", prompt, content_bytes(prompt))
    return prompt


def _after_fork() -> None:
    """Let go, in a fork, of a lock that no thread will give back."""
    _memory.lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# Sizes


def deep_bytes(value: Any) -> int:
    """Return the bytes of a value of JSON's types, or of a dataclass of such, with all that is in it."""
    size = sys.getsizeof(value)
    if isinstance(value, Mapping):
        return size + sum(deep_bytes(key) + deep_bytes(item) for key, item in value.items())
    if isinstance(value, tuple | list | set | frozenset):
        return size + sum(map(deep_bytes, value))
    if is_dataclass(value):
        return size + sum(deep_bytes(item) for item in vars(value).values())
    return size


def _deep_size(key: Any, value: Any) -> int:
    return deep_bytes(key) + deep_bytes(value)


def content_bytes(owner: Any) -> int:
    """Return the bytes of what an object has as attributes: tensors on the host, also in mappings, and lists of texts."""
    items = owner.values() if isinstance(owner, Mapping) else getattr(owner, "__dict__", {}).values()
    found = 0
    for item in items:
        if isinstance(item, Mapping):
            found += content_bytes(item)
        elif isinstance(item, list):  # messages for a server, with pictures in their texts
            found += deep_bytes(item)
        elif getattr(getattr(item, "device", None), "type", "cpu") == "cpu":
            found += getattr(item, "nbytes", 0)
    return found


def read_bytes(value: int | str, name: str) -> int:
    """
    Read a size such as `8GiB`, `500 MB` or a number of bytes.

    Raises:
        ValueError: for something else, naming the option, or for a size that is not above 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(value).lower())
    if isinstance(value, bool) or match is None or match[2] not in _UNITS:
        raise ValueError(f"{name} must be a size such as 8GiB or 500MB, or a number of bytes; got {value!r}")
    size = int(float(match[1]) * _UNITS[match[2]]) if match[2] or "." in match[1] else int(match[1])
    if size <= 0:
        raise ValueError(f"{name} must be above 0, got {value!r}")
    return size


def readable(size: float) -> str:
    """Return a number of bytes as people read it, e.g. `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _listed(parts: dict[str, int]) -> str:
    return ", ".join(
        f"{part} {readable(size)}" for part, size in sorted(parts.items(), key=lambda pair: pair[1], reverse=True)
    )
