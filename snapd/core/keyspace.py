"""Which key holds what, for one cluster, in whatever store coordination stands on.

```
/snapd/NAME/cluster/id              a random id, created once; never written again
/snapd/NAME/cluster/epoch           the number of the newest group table
/snapd/NAME/cluster/groups          that table
/snapd/NAME/cluster/floors          per job the generation that the next one must be above (after a rebuild)
/snapd/NAME/cluster/planner         leased: the node that writes the four above
/snapd/NAME/cluster/members/NODE    leased: the node as it announces itself
/snapd/NAME/cluster/hosts/HOST      leased: the node of that host (not written where a host may have several)
/snapd/NAME/cluster/known/NODE      the node as it was last announced; stays when it goes
/snapd/NAME/cluster/drains/NODE     the node is to be emptied
/snapd/NAME/jobs/JOB/generations    the job's newest generations
/snapd/NAME/jobs/JOB/collector      leased: the node that collects the job's reports
/snapd/NAME/jobs/JOB/removed        all of the job's generations up to this number are gone for good
/snapd/NAME/jobs/JOB/chunk_bytes    the job's one chunk size, as the first node named it
/snapd/NAME/newest/JOB              the newest complete and protected snapshot; outside `jobs/`, so that nobody who
                                    watches a job is woken by it
/snapd/NAME/recorders/JOB           leased: the node that wrote it last. In the same transaction: the store refuses it
                                    to a collector whose lease has ended
```
"""

from __future__ import annotations

import re

from snapd.errors import ConfigError

CLUSTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
KEY = re.compile(r"/[\x21-\x7e]{1,511}")
VALUE_BYTES_MAX = 1 << 20


class Keyspace:
    """The keys of the cluster `name`.

    Raises:
        ConfigError: kind `cluster_name`.
    """

    def __init__(self, name: str) -> None:
        if CLUSTER_NAME.fullmatch(name) is None:
            raise ConfigError(
                f"bad cluster name {name[:64]!r}",
                kind="cluster_name",
                hint="use letters, digits, '.', '_' and '-', at most 64, beginning with a letter or a digit",
            )
        self.name = name
        self.root = f"/snapd/{name}/"
        self.cluster = self.root + "cluster/"
        self.id = self.cluster + "id"
        self.epoch = self.cluster + "epoch"
        self.groups = self.cluster + "groups"
        self.floors = self.cluster + "floors"
        self.planner = self.cluster + "planner"
        self.members = self.cluster + "members/"
        self.known = self.cluster + "known/"
        self.drains = self.cluster + "drains/"

    def member(self, node: str) -> str:
        return self.members + node

    def host(self, host: str) -> str:
        return f"{self.cluster}hosts/{host}"

    def known_node(self, node: str) -> str:
        return self.known + node

    def drain(self, node: str) -> str:
        return self.drains + node

    def job(self, job: str) -> str:
        return f"{self.root}jobs/{job}/"

    def generations(self, job: str) -> str:
        return self.job(job) + "generations"

    def collector(self, job: str) -> str:
        return self.job(job) + "collector"

    def chunk_bytes(self, job: str) -> str:
        return self.job(job) + "chunk_bytes"

    def tier_floors(self, job: str) -> str:
        return self.job(job) + "tier_floors"

    def removed(self, job: str) -> str:
        return self.job(job) + "removed"

    def newest(self, job: str) -> str:
        return f"{self.root}newest/{job}"

    def recorder(self, job: str) -> str:
        return f"{self.root}recorders/{job}"


def checked_key(text: str) -> str:
    """Return `text` if it can be a key, or a prefix of keys.

    Raises:
        ConfigError: kind `key`.
    """
    if KEY.fullmatch(text) is None:
        raise ConfigError(f"bad key {text[:64]!r}", kind="key")
    return text


def checked_value(value: bytes | None) -> bytes | None:
    """Return `value` if it is small enough to be stored.

    Raises:
        ConfigError: kind `value_size`.
    """
    if value is not None and len(value) > VALUE_BYTES_MAX:
        raise ConfigError(
            f"a value of {len(value)} bytes is too large to be coordinated",
            kind="value_size",
            bytes=len(value),
        )
    return value
