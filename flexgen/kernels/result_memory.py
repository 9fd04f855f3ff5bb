"""Memory of freed results that later results use again.

For a new mapping, the system clears each page when it is first written. In a prefill of 128 tokens with 1B
parameters, this takes 5% of the time. The C library can keep freed memory too, but its heap then has unused gaps,
which memory plans do not count.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterator

import torch

from flexgen.units import MIB

HUGE_PAGE = 2 * MIB
"""Bytes of a huge page of most processors."""
_HUGE_PAGES = HUGE_PAGE // mmap.PAGESIZE
"""Pages of a huge page."""
_SUPPORTED = hasattr(mmap, "MADV_DONTNEED")


class ResultMemory:
    """Memory for results, kept between them while calls run.

    When a result has got its memory, no more bytes are resident than results had together at some time since the
    first of these calls began. A result in a huge page may add the rest of this page until the next one gets its
    memory.

    Threads share it, but do not wait for each other: the garbage collector may run the end of another call while a
    thread is in here. So a result may get no memory, and the last thread that leaves does what others could not.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all calls and all memory. Present results keep theirs."""
        self._lock = threading.Lock()
        self._calls: set[Hashable] = set()
        self._mappings: list[_Mapping] = []  # the one that was used least recently comes first
        self._freed: deque[tuple[_Mapping, int]] = deque()
        self._most = 0  # pages that results have had together
        self._here = threading.local()

    @property
    def keeps(self) -> bool:
        """Whether the results of this thread should use it now. Never on systems without `madvise`."""
        return _SUPPORTED and bool(self._calls) and not getattr(self._here, "suspended", 0)

    def begin(self, call: Hashable) -> None:
        """Keep memory until `end`. May be called again before it."""
        self._calls.add(call)

    def end(self, call: Hashable) -> None:
        """Return all memory that no result uses, unless other calls run. Does nothing for a call that has not
        begun."""
        self._calls.discard(call)
        self._forget_after_last()

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """The results of this thread do not use it within the context. Returns unused memory first."""
        self.return_unused()
        self._here.suspended = getattr(self._here, "suspended", 0) + 1
        try:
            yield
        finally:
            self._here.suspended -= 1

    def take(self, nbytes: int) -> memoryview | None:
        """`nbytes` of memory with undefined contents. They are free again when nothing refers to the view any more.

        None if another thread is in here. Raises OSError if the system cannot allocate them.
        """
        with self._try_lock() as locked:
            if not locked:
                return None
            self._collect()
            mapping, place = self._find(nbytes)
            view = mapping.use(place, nbytes, self._freed.append)
            self._mappings.append(mapping)
            self._most = max(self._most, sum(each.used.bit_count() for each in self._mappings))
            self._return_above(self._most)
            mapping.touch(place)
        self._forget_after_last()
        return view

    def return_unused(self) -> None:
        """Return the memory that no result uses to the system, before others allocate large temporaries."""
        if not self._mappings:
            return
        with self._try_lock() as locked:
            if locked:
                self._collect()
                self._return_above(0)
        self._forget_after_last()

    @property
    def resident(self) -> int:
        """Bytes that may be resident."""
        return mmap.PAGESIZE * sum(mapping.touched.bit_count() for mapping in self._mappings)

    @contextlib.contextmanager
    def _try_lock(self) -> Iterator[bool]:
        locked = self._lock.acquire(blocking=False)
        try:
            yield locked
        finally:
            if locked:
                self._lock.release()

    def _find(self, nbytes: int) -> tuple[_Mapping, int]:
        """A mapping and its first page for a result. The mapping is no longer in the list."""
        if found := self._fitting(_pages(nbytes)):
            self._mappings.remove(found[0])
            return found
        try:
            return _Mapping(nbytes), 0
        except OSError:  # address space may be limited
            self._return_above(0)
            return _Mapping(nbytes), 0

    def _fitting(self, pages: int) -> tuple[_Mapping, int] | None:
        """The smallest mapping with `pages` consecutive free pages, and the first of them."""
        for mapping in sorted(self._mappings, key=lambda each: each.pages):
            if (place := mapping.place(pages)) is not None:
                return mapping, place
        return None

    def _collect(self) -> None:
        # A view can be freed at any time, even while this thread is in here, so that only notes it.
        while self._freed:
            mapping, place = self._freed.popleft()
            mapping.free(place)

    def _return_above(self, most: int) -> None:
        """Return unused memory to the system until at most `most` pages are resident."""
        excess = sum(mapping.touched.bit_count() for mapping in self._mappings) - most
        kept = []
        for mapping in self._mappings:
            if excess > 0:
                excess -= mapping.return_unused()
                if not mapping.used:
                    continue
            kept.append(mapping)
        self._mappings = kept

    def _forget_after_last(self) -> None:
        """Forget all memory if no call runs. A thread that is in here does it when it leaves."""
        while not self._calls and (self._mappings or self._most):
            with self._try_lock() as locked:
                if not locked:
                    return
                if not self._calls:
                    self._collect()
                    self._return_above(0)
                    for mapping in self._mappings:
                        mapping.forget()
                    self._mappings = []
                    self._freed.clear()
                    self._most = 0


class _Mapping:
    """A mapping that has several results at a time. It begins with a huge page if it has at least two of them.

    used, touched: integers with a bit for each page: whether a result has it, and whether it may be resident.
    _huge: the number of huge pages. They are at its beginning.
    """

    def __init__(self, nbytes: int) -> None:
        self.pages = _pages(nbytes)
        self.used = self.touched = self._begin = self._huge = 0
        self._views: dict[int, tuple[weakref.ref[memoryview], int]] = {}  # with its bits, by place
        flags, size = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, self.pages * mmap.PAGESIZE
        if nbytes < 2 * HUGE_PAGE:
            self._memory = mmap.mmap(-1, size, flags=flags)
            return
        self._memory = mmap.mmap(-1, size + HUGE_PAGE, flags=flags)
        self._begin = -torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr() % HUGE_PAGE
        # The rest after the last whole huge page keeps small pages, so that it takes no more memory.
        with contextlib.suppress(AttributeError, OSError):  # some systems have no huge pages
            self._memory.madvise(mmap.MADV_HUGEPAGE, self._begin, size // HUGE_PAGE * HUGE_PAGE)
            self._huge = self.pages // _HUGE_PAGES

    def place(self, pages: int) -> int | None:
        """The first of the first `pages` consecutive pages that no result has, or None."""
        found, length = ~self.used & ((1 << self.pages) - 1), 1  # a bit where `length` free pages begin
        while length < pages and found:
            step = min(length, pages - length)
            found &= found >> step
            length += step
        return (found & -found).bit_length() - 1 if found else None

    def use(self, place: int, nbytes: int, freed: Callable[[tuple[_Mapping, int]], object]) -> memoryview:
        """The memory from page `place` on. `freed` is called when nothing refers to the view any more."""
        bits = ((1 << _pages(nbytes)) - 1) << place
        self.used |= bits
        self.touched |= bits
        begin = self._begin + place * mmap.PAGESIZE
        view = memoryview(self._memory)[begin : begin + nbytes]
        self._views[place] = weakref.ref(view, lambda _: freed((self, place))), bits
        return view

    def touch(self, place: int) -> None:
        """The result at page `place` will be written, which makes the whole huge pages of its pages resident."""
        _, bits = self._views[place]
        first, end = place // _HUGE_PAGES, -(-bits.bit_length() // _HUGE_PAGES)
        if first < self._huge:
            end = min(end, self._huge)
            bits |= ((1 << (end - first) * _HUGE_PAGES) - 1) << first * _HUGE_PAGES
        self.touched |= bits

    def free(self, place: int) -> None:
        _, bits = self._views.pop(place, (None, 0))
        self.used &= ~bits

    def return_unused(self) -> int:
        """Return the memory that no result uses to the system, if a result uses another part. Otherwise, the caller
        drops the mapping. Returns the pages that are no longer resident then."""
        unused, place = self.touched & ~self.used, 0
        with contextlib.suppress(OSError):  # a process may lock its pages in memory
            while self.used and unused >> place:
                rest = unused >> place
                place += (rest & -rest).bit_length() - 1
                run = unused >> place
                length = (~run & (run + 1)).bit_length() - 1
                begin = self._begin + place * mmap.PAGESIZE
                self._memory.madvise(mmap.MADV_DONTNEED, begin, length * mmap.PAGESIZE)
                place += length
            self.touched &= self.used
            return unused.bit_count()
        return 0

    def forget(self) -> None:
        """Leave the mapping to the present results alone."""
        self._views.clear()


def _pages(nbytes: int) -> int:
    return -(-nbytes // mmap.PAGESIZE)


RESULT_MEMORY = ResultMemory()
"""That of this process."""
if hasattr(os, "register_at_fork"):  # the child has the memory of a thread that it does not have
    os.register_at_fork(after_in_child=RESULT_MEMORY.reset)
