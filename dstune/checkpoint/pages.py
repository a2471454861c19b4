"""Memory in whole pages that files are read into and written from past the page cache."""

import contextlib
import mmap

PAGE_BYTES = 4096
"""What O_DIRECT wants of addresses, lengths and offsets."""
_MADV_POPULATE_WRITE = 23
"""Linux 5.14: have all pages now; Python 3.11 has no name for it."""


def whole_pages(num_bytes: int) -> int:
    """`num_bytes` rounded up to whole pages."""
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


def huge_pages(num_bytes: int) -> mmap.mmap:
    """At least `num_bytes` that lie in few pieces, where the kernel has such: a disk then takes 4 MiB as one request, not as four."""
    pages = mmap.mmap(-1, whole_pages(num_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in (mmap.MADV_HUGEPAGE, _MADV_POPULATE_WRITE):
        with contextlib.suppress(OSError):  # an older kernel gives the pages when they are first written
            pages.madvise(advice)
    return pages
