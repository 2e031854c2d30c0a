"""The keys of a job: what their text shows, and whom they let in."""

from __future__ import annotations

import pickle

from runtime.transport.security import Security
from runtime.transport.sockets import mint


def test_keys_are_new_each_time_and_allow_their_own_owners_only() -> None:
    keys, others = mint(), mint()
    assert len({keys.public, keys.secret, others.public, others.secret}) == 4
    assert {len(key) for key in (keys.public, keys.secret)} == {32}
    assert keys.allowed == {keys.public}
    assert keys.admits(b"CURVE", keys.public)
    assert not keys.admits(b"CURVE", others.public)
    assert not keys.admits(b"CURVE", b"")
    assert not keys.admits(b"NULL", keys.public)
    assert pickle.loads(pickle.dumps(keys)) == keys


def test_no_text_shows_the_secret() -> None:
    keys = Security(b"p" * 32, b"s" * 32, frozenset([b"p" * 32]))
    for text in (repr(keys), str(keys), f"{keys}", repr([keys])):
        assert "ss" not in text
        assert (b"s" * 32).hex() not in text
        assert (b"p" * 32).hex() in text
