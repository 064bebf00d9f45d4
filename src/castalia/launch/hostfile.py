"""Hosts and their slots: DeepSpeed's hostfile `host slots=N` and its filters `host1:0,2@host2`.

Needs no torch. Source  DeepSpeed deepspeed/launcher/runner.py (grammar and the meaning of include and exclude).
"""

import re
from pathlib import Path

from castalia.core.errors import ConfigError, nearest

Hosts = dict[str, list[int]]
"""Host -> its slots (GPUs) that are used, in the order of the file."""
LINE = re.compile(r"(?P<host>[\w.\-]+)\s+slots=(?P<slots>\d+)")
NAME = re.compile(r"[\w.\-]+")


def read_hostfile(path: str | Path) -> Hosts:
    """Read lines `host slots=N`; blank lines and what follows a # are skipped.

    Raises  ConfigError with file, line and what was expected.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(
            f"hostfile {path}: this is no text; expected lines `host slots=N`"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"hostfile {path} cannot be read: {error.strerror}; name another with --hostfile"
        ) from None
    hosts: Hosts = {}
    for count, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        host, slots = parse_line(line, f"hostfile {path} line {count}")
        if host in hosts:
            raise ConfigError(
                f"hostfile {path} line {count}: {host} stands in an earlier line, too; one line a host"
            )
        hosts[host] = list(range(slots))
    if not hosts:
        raise ConfigError(f"hostfile {path} names no host; expected lines `host slots=N`")
    return hosts


def parse_line(line: str, where: str) -> tuple[str, int]:
    """Host and slots of one line."""
    found = LINE.fullmatch(line)
    if not found:
        raise ConfigError(f"{where}: expected `host slots=N`, got {line[:80]!r}")
    slots = int(found["slots"])
    if slots < 1:
        raise ConfigError(
            f"{where}: {found['host']} has slots={slots}; expected at least 1, or delete the line"
        )
    return found["host"], slots


def choose(hosts: Hosts, include: str = "", exclude: str = "") -> Hosts:
    """Keep what `include` names, or drop what `exclude` names: `host1:0,2@host2`, slots from 0, no slots means all.

    Raises  ConfigError if both are given, a host or slot is not there, or nothing is left.
    """
    if include and exclude:
        raise ConfigError(f"include {include!r} and exclude {exclude!r} are both given; keep one")
    if not include and not exclude:
        return hosts
    named = parse_filter(include or exclude, hosts, "include" if include else "exclude")
    if include:
        left = {host: sorted(named[host]) for host in hosts if host in named}
    else:
        left = {
            host: [s for s in slots if s not in named.get(host, ())]
            for host, slots in hosts.items()
        }
    left = {host: slots for host, slots in left.items() if slots}
    if not left:
        raise ConfigError(f"exclude {exclude!r} leaves no host; have: {', '.join(hosts)}")
    return left


def parse_filter(text: str, hosts: Hosts, name: str) -> dict[str, set[int]]:
    """Host -> slots that a filter names."""
    named: dict[str, set[int]] = {}
    for part in text.split("@"):
        host, colon, wanted = part.strip().partition(":")
        if not NAME.fullmatch(host) or (colon and not re.fullmatch(r"\d+(,\d+)*", wanted)):
            raise ConfigError(
                f"{name} {text!r}: expected host or host:0,2 joined by @, got {part!r}"
            )
        if host not in hosts:
            raise ConfigError(
                f"{name} {text!r}: no host {host!r}; have: {', '.join(hosts)}{nearest(host, hosts)}"
            )
        slots = {int(slot) for slot in wanted.split(",")} if colon else set(hosts[host])
        beyond = sorted(slots - set(hosts[host]))
        if beyond:
            raise ConfigError(
                f"{name} {text!r}: {host} has slots 0 to {len(hosts[host]) - 1}, not {', '.join(map(str, beyond))}"
            )
        named[host] = named.get(host, set()) | slots
    return named
