"""Throughput of `prepare` in the log."""

from __future__ import annotations

import logging
import time

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = 5.0


class Progress:
    """Megabytes and tokens a second, every `PROGRESS_SECONDS` and at the end."""

    def __init__(self, total_bytes: int) -> None:
        self.num_documents = self._bytes = self._tokens = 0
        self._total_bytes = total_bytes
        self._started = self._last = time.monotonic()

    def add(self, num_bytes: int, num_tokens: int) -> None:
        """Count one document."""
        self.num_documents += 1
        self._bytes += num_bytes
        self._tokens += num_tokens

    def report(self, *, is_final: bool = False) -> None:
        """Log a line if one is due."""
        now = time.monotonic()
        if not is_final and now - self._last < PROGRESS_SECONDS:
            return
        self._last = now
        seconds = max(now - self._started, 1e-9)
        logger.info(
            "%s %d documents, %.1f MB of text (source %.1f MB), %d tokens: %.2f MB/s, %d tokens/s",
            "encoded" if is_final else "encoding",
            self.num_documents,
            self._bytes / 1e6,
            self._total_bytes / 1e6,
            self._tokens,
            self._bytes / 1e6 / seconds,
            round(self._tokens / seconds),
        )
