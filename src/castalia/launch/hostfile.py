"""Hosts and their slots: DeepSpeed's hostfile `host slots=N` and its filters `host1:0,2@host2`.

Needs no torch. Source  DeepSpeed deepspeed/launcher/runner.py: the grammar, and the meaning of
include and exclude.
"""

import re
from pathlib import Path

from castalia.core.errors import ConfigError, nearest

Hosts = dict[str, list[int]]
"""Host -> the slots (GPUs) in use, in the order of the file."""
LINE = re.compile(r"(?P<host>[\w.\-]+)\s+slots=(?P<slots>\d+)")
NAME = re.compile(r"[\w.\-]+")
SLOTS = re.compile(r"\d+(,\d+)*")


def read_hostfile(path: str | Path) -> Hosts:
    """Read lines `host slots=N`; blank lines and comments after # are ignored.

    Raises  ConfigError with the file, the line and the expected form.
    """
    hosts: Hosts = {}
    for number, line in enumerate(read_lines(path), 1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        host, slots = parse_line(content, f"hostfile {path} line {number}")
        if host in hosts:
            raise ConfigError(
                f"hostfile {path} line {number}: {host} is listed twice; keep one line per host"
            )
        hosts[host] = list(range(slots))
    if not hosts:
        raise ConfigError(f"hostfile {path} lists no hosts; expected lines `host slots=N`")
    return hosts


def read_lines(path: str | Path) -> list[str]:
    """Lines of a text file.

    Raises  ConfigError if it cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ConfigError(
            f"hostfile {path} is not a text file; expected lines `host slots=N`"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"hostfile {path} cannot be read: {error.strerror}; give another with --hostfile"
        ) from None


def parse_line(line: str, where: str) -> tuple[str, int]:
    """Host and number of slots of one line."""
    match = LINE.fullmatch(line)
    if not match:
        raise ConfigError(f"{where}: expected `host slots=N`, got {line[:80]!r}")
    slots = int(match["slots"])
    if slots < 1:
        raise ConfigError(
            f"{where}: {match['host']} has slots={slots}, expected at least 1; to skip the host,"
            " delete the line"
        )
    return match["host"], slots


def choose(hosts: Hosts, include: str = "", exclude: str = "") -> Hosts:
    """Keep only the hosts and slots in `include`, or drop those in `exclude`.

    Filters read `host1:0,2@host2`: slots count from 0, and a host without slots means all of them.
    Raises  ConfigError if both filters are given, a host or slot is unknown, or nothing is left.
    """
    if include and exclude:
        raise ConfigError(f"include {include!r} and exclude {exclude!r} are both set; keep one")
    if include:
        wanted = parse_filter(include, hosts, "include")
        # In the order of the file, whatever the order of the filter: the first host is the master.
        return {host: sorted(wanted[host]) for host in hosts if host in wanted}
    if not exclude:
        return hosts
    dropped = parse_filter(exclude, hosts, "exclude")
    left: Hosts = {}
    for host, slots in hosts.items():
        kept = [slot for slot in slots if slot not in dropped.get(host, ())]
        if kept:
            left[host] = kept
    if not left:
        raise ConfigError(f"exclude {exclude!r} leaves no host of {', '.join(hosts)}")
    return left


def parse_filter(text: str, hosts: Hosts, option: str) -> dict[str, set[int]]:
    """Host -> slots that a filter lists."""
    listed: dict[str, set[int]] = {}
    for part in text.split("@"):
        host, colon, numbers = part.strip().partition(":")
        if not NAME.fullmatch(host) or (colon and not SLOTS.fullmatch(numbers)):
            raise ConfigError(
                f"{option} {text!r}: expected host or host:0,2 joined by @, got {part!r}"
            )
        if host not in hosts:
            raise ConfigError(
                f"{option} {text!r}: unknown host {host!r}; choose one of {', '.join(hosts)}"
                f"{nearest(host, hosts)}"
            )
        slots = set(hosts[host])
        if colon:
            slots = {int(number) for number in numbers.split(",")}
        unknown = sorted(slots - set(hosts[host]))
        if unknown:
            raise ConfigError(
                f"{option} {text!r}: {host} has slots 0 to {len(hosts[host]) - 1}, not"
                f" {', '.join(map(str, unknown))}"
            )
        # A host may be listed several times: host1:0@host1:2.
        listed[host] = listed.get(host, set()) | slots
    return listed
