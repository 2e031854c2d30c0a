"""One series of checkpoints in one folder: what is written in which order, what counts, what is deleted.

A commit, under the folder's lock: first the digest file, then the checkpoint's own name. So a
checkpoint that can be seen is whole and has its digest; a digest without a checkpoint is a leftover.
Where a step is saved again, its digest file allows both contents until the new one has its place.
A file without a digest was put there by hand: it loads, and it is never deleted but by `delete`.

Ranks do not wait for each other. Each writes and expires its own files; a rank whose bytes are rank 0's
has no file of its own, whichever of the two came first. All calls block.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from runtime.checkpoint.compress import expand, pieces
from runtime.checkpoint.layout import DIGEST_SUFFIX, Piece, digest_text, parse, read_digests
from runtime.checkpoint.store import Folder, Staged
from runtime.errors import CheckpointCorrupt, CheckpointError, ConfigError

log = logging.getLogger(__name__)


class Committed(NamedTuple):
    """What a commit did: bytes stored (0 where rank 0 had the same), steps that it let go."""

    stored_bytes: int
    expired: list[int]


class Series:
    """The checkpoints `checkpoint-<step>…` of one folder, as one rank sees them.

    `keep_last_n`: how many commits stay; None: all. Errors: `CheckpointError` with step and file for what
    the file system says, `CheckpointCorrupt`, `FileNotFoundError` naming the newest step there is.
    """

    def __init__(
        self,
        folder: Folder,
        *,
        rank: int = 0,
        compression: str | None = None,
        keep_last_n: int | None = None,
    ) -> None:
        self._folder = folder
        self._rank = rank
        self._compression = compression
        self._keep_last_n = keep_last_n

    def steps(self) -> list[int]:
        """The steps that `fetch` can load, ascending."""
        with self._telling("list", None):
            return sorted({piece.step for piece in self._pieces() if self._is_seen(piece)})

    def commit(self, step: int, data: memoryview) -> Committed:
        """Make `data` the content of `step`. When this returns it is durable; when it raises, the
        steps before are as they were, and a new step is not there."""
        piece = Piece(step, self._rank, self._compression)
        with self._telling("save", piece):
            self._folder.create()
            if self._is_rank_zeros(piece, data):
                with self._folder.locked():
                    self._remove_own(step)
                    return Committed(0, self._tidy(step))
            with (
                self._folder.staged(piece.name, pieces(data, self._compression)) as staged,
                self._folder.locked(),
            ):
                stored = self._publish(piece, staged)
                return Committed(stored, self._tidy(step))

    def fetch(self, step: int) -> bytes:
        """The bytes of `step`: this rank's own, else rank 0's."""
        with self._telling("load", Piece(step, self._rank)):
            piece = self._newest_piece(step)
        with self._telling("load", piece):
            try:
                stored = self._checked(piece)
            except FileNotFoundError:  # another process deleted it since it was listed
                raise self._missing(step) from None
            return _expanded(piece, stored)

    def verify(self, step: int) -> bool:
        """Read every file of `step`, of all ranks: True when each is what was written, False when
        one was put there by hand, so that there is nothing to compare it with."""
        with self._telling("verify", Piece(step, self._rank)):
            found = self._pieces_of(step)
            if not found:
                raise self._missing(step)
            for piece in found:
                _expanded(piece, self._checked(piece))
            return all(self._digests(piece) for piece in found)

    def delete(self, step: int) -> None:
        """Remove `step`: rank 0 for all ranks, another rank its own file."""
        with self._telling("delete", Piece(step, self._rank)):
            if not self._pieces_of(step):
                raise self._missing(step)
            with self._folder.locked():
                for piece in self._pieces_of(step):
                    if self._rank in (0, piece.rank):
                        self._remove(piece)
                self._folder.sync()

    # What is there

    def _pieces(self) -> list[Piece]:
        return [piece for name in self._folder.names() if (piece := parse(name)) is not None]

    def _pieces_of(self, step: int) -> list[Piece]:
        return [piece for piece in self._pieces() if piece.step == step]

    def _is_seen(self, piece: Piece) -> bool:
        return piece.rank in (0, self._rank)

    def _newest_piece(self, step: int) -> Piece:
        """Where a step was saved with several compressions, the last one counts."""
        found = [piece for piece in self._pieces_of(step) if self._is_seen(piece)]
        if not found:
            raise self._missing(step)
        return max(found, key=lambda piece: (piece.rank, self._committed_at(piece)))

    def _missing(self, step: int) -> FileNotFoundError:
        steps = self.steps()
        newest = f"the newest is step {steps[-1]}" if steps else "there is no checkpoint at all"
        return FileNotFoundError(f"no checkpoint of step {step} in {self._folder.path}: {newest}")

    def _committed_at(self, piece: Piece) -> int:
        try:
            return self._folder.stat(piece.name).st_mtime_ns
        except FileNotFoundError:
            return 0  # deleted by another process since it was listed

    def _digests(self, piece: Piece) -> tuple[str, ...]:
        """The contents that count as right; none for a file that was put there by hand."""
        try:
            return read_digests(piece.name, self._folder.read(piece.digest_name))
        except FileNotFoundError:
            return ()

    def _checked(self, piece: Piece) -> bytes:
        """The file's bytes, once they agree with its digest."""
        stored = self._folder.read(piece.name)
        if self._agrees(piece, stored):
            return stored
        # Another process may have replaced the file between our two reads: under the lock none can.
        with self._folder.locked():
            stored = self._folder.read(piece.name)
            if self._agrees(piece, stored):
                return stored
        raise CheckpointCorrupt(
            f"step {piece.step}: {self._folder.path}/{piece.name} is damaged: its {len(stored)} bytes "
            f"are not those that {piece.digest_name} was written for",
            step=piece.step,
            piece=piece.name,
        )

    def _agrees(self, piece: Piece, stored: bytes) -> bool:
        digests = self._digests(piece)
        return not digests or hashlib.sha256(stored).hexdigest() in digests

    # Changing it; the caller holds the folder's lock

    def _publish(self, piece: Piece, staged: Staged) -> int:
        """The bytes that were stored: none where rank 0 has committed the same in the meantime."""
        if self._equals_rank_zero(piece, staged.digest):
            self._remove_own(piece.step)
            return 0
        before = self._content_before(piece)
        self._folder.put(piece.digest_name, digest_text(piece.name, (staged.digest, *before)))
        try:
            self._folder.publish(staged, piece.name)
        except OSError:
            if not before:
                # Perhaps it has its name, but not durably: a save that failed is not to be seen.
                with suppress(OSError):
                    self._remove(piece)
            raise
        with self._only_tidying():
            if before:
                self._folder.put(piece.digest_name, digest_text(piece.name, (staged.digest,)))
            self._collapse_into(piece, staged.digest)
        return staged.size

    def _content_before(self, piece: Piece) -> tuple[str, ...]:
        """Digests of what the name holds now, so that a crash before the rename leaves it valid."""
        if piece not in self._pieces():
            return ()
        known = self._digests(piece)
        return known or (hashlib.sha256(self._folder.read(piece.name)).hexdigest(),)

    def _collapse_into(self, piece: Piece, digest: str) -> None:
        """Remove what `piece` stands for now: the same rank and step in another compression, and, for
        rank 0, files of other ranks with the same bytes."""
        for other in self._pieces_of(piece.step):
            if other == piece or not (known := self._digests(other)):
                continue
            if other.rank == piece.rank or (piece.rank == 0 and known == (digest,)):
                self._remove(other)

    def _is_rank_zeros(self, piece: Piece, data: memoryview) -> bool:
        """Whether rank 0 has these bytes already: found out before anything is written."""
        if piece.rank == 0 or not self._digests(piece._replace(rank=0)):
            return False
        digest = hashlib.sha256()
        for part in pieces(data, self._compression):
            digest.update(part)
        return self._equals_rank_zero(piece, digest.hexdigest())

    def _equals_rank_zero(self, piece: Piece, digest: str) -> bool:
        rank_zero = piece._replace(rank=0)
        return (
            piece.rank != 0
            and rank_zero in self._pieces()
            and self._digests(rank_zero) == (digest,)
        )

    def _remove_own(self, step: int) -> None:
        for piece in self._pieces_of(step):
            if piece.rank == self._rank:
                self._remove(piece)

    def _remove(self, piece: Piece) -> None:
        """The checkpoint first: a digest alone is nothing, a checkpoint alone would go unchecked."""
        self._folder.remove(piece.name)
        self._folder.remove(piece.digest_name)

    def _tidy(self, step: int) -> list[int]:
        """After a commit of `step`: expire old steps, clear away leftovers. Failing at that fails no save."""
        expired: list[int] = []
        with self._only_tidying():
            expired = self._expire(step)
            names = set(self._folder.names())
            for name in names:
                checkpoint = name.removesuffix(DIGEST_SUFFIX)
                if checkpoint != name and checkpoint not in names and parse(checkpoint):
                    self._folder.remove(name)
            self._folder.sweep()
        return expired

    def _expire(self, step: int) -> list[int]:
        """The newest step there is and the one just committed stay in any case."""
        if self._keep_last_n is None:
            return []
        seen = [piece for piece in self._pieces() if self._is_seen(piece)]
        committed: dict[int, int] = {}
        for piece in seen:
            if self._digests(piece):
                at = max(committed.get(piece.step, 0), self._committed_at(piece))
                committed[piece.step] = at
        in_order = sorted(committed, key=lambda known: (committed[known], known))
        stay = {step, *in_order[-self._keep_last_n :]}
        stay.add(max(committed, default=step))
        expired = [piece for piece in seen if piece.rank == self._rank and piece.step not in stay]
        for piece in expired:
            if piece.step in committed:
                self._remove(piece)
        return sorted({piece.step for piece in expired if piece.step in committed})

    # Errors

    @contextmanager
    def _telling(self, verb: str, piece: Piece | None) -> Iterator[None]:
        """What the file system says, as an error that names the step and the file."""
        try:
            yield
        except FileNotFoundError as error:
            if error.errno is None:
                raise  # ours: no such step
            raise self._failure(verb, piece, error) from error
        except OSError as error:
            raise self._failure(verb, piece, error) from error

    def _failure(self, verb: str, piece: Piece | None, error: OSError) -> CheckpointError:
        if piece is None:
            return CheckpointError(f"cannot {verb} checkpoints in {self._folder.path}: {error}")
        return CheckpointError(
            f"cannot {verb} step {piece.step} as {self._folder.path}/{piece.name}: "
            f"{error.strerror or error}",
            step=piece.step,
            piece=piece.name,
        )

    @contextmanager
    def _only_tidying(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            log.warning("%s: cannot clear away what is not needed: %s", self._folder.path, error)


def _expanded(piece: Piece, stored: bytes) -> bytes:
    try:
        return expand(stored, piece.compression)
    except ConfigError:
        raise  # the package is missing: nothing is known about the bytes
    except ValueError as error:
        raise CheckpointCorrupt(
            f"step {piece.step}: {piece.name} cannot be expanded: {error}",
            step=piece.step,
            piece=piece.name,
        ) from error
