"""Hosts and their slots: hostfiles of DeepSpeed, Open MPI, MPICH and PBS, and DeepSpeed's filters.

Needs no torch. Source  DeepSpeed deepspeed/launcher/runner.py: `host slots=N`, and the meaning of
include and exclude; Open MPI, mpirun(1): max_slots; MPICH, the Hydra manual: `host:N`; PBS
Professional, the file that PBS_NODEFILE names: one line a slot.
"""

import ipaddress
import re
from pathlib import Path
from typing import NamedTuple

from castalia.core.errors import ConfigError, nearest

Hosts = dict[str, list[int]]
"""Host -> the slots (GPUs) in use, in the order of the file. A host may be `user@host`; an IPv6
address stands without brackets."""
# A name that begins with - would be an option of ssh and pdsh, some of which run commands.
WORD = r"[\w.][\w.\-]*"
USER = rf"(?:{WORD}@)?"
NAME = re.compile(rf"{USER}{WORD}")
ADDRESS = re.compile(rf"(?P<user>{USER})\[?(?P<address>[0-9A-Fa-f]*:[0-9A-Fa-f:.]*)\]?")
"""An IPv6 address, perhaps in brackets."""
COUNTED = re.compile(rf"(?P<host>{USER}{WORD}):(?P<slots>\d+)")
"""MPICH's `host:N`; an IPv6 address has more than one colon."""
OPTION = re.compile(r"(?P<name>slots|max[_-]slots)=(?P<count>\d+)")
SLOTS = re.compile(r"\d+(,\d+)*")


class Line(NamedTuple):
    """One host of a hostfile."""

    host: str
    slots: int | None
    """None for a bare name, which stands for one slot."""


def address(host: str) -> str:
    """The host without the user before it: what a rendezvous or a scheduler takes."""
    return host.rpartition("@")[2]


def read_hostfile(path: str | Path, bare_slots: int = 1) -> Hosts:
    """Read a hostfile; blank lines and comments after # are ignored.

    A bare name has a slot for each line on which it stands, as in PBS's files. On a single line it
    has `bare_slots`: such a file names hosts without counting their slots.
    Raises  ConfigError with the file, the line and the expected form.
    """
    hosts: Hosts = {}
    bare: set[str] = set()
    for number, text in enumerate(read_lines(path), 1):
        content = text.partition("#")[0].strip()
        if not content:
            continue
        line = parse_line(content, f"hostfile {path} line {number}")
        if line.host in hosts and (line.slots is not None or line.host not in bare):
            raise ConfigError(
                f"hostfile {path} line {number}: {line.host} is listed twice; keep one line per"
                " host"
            )
        if line.slots is None:
            bare.add(line.host)
            hosts.setdefault(line.host, []).append(len(hosts.get(line.host, [])))
        else:
            hosts[line.host] = list(range(line.slots))
    if not hosts:
        raise ConfigError(f"hostfile {path} lists no hosts; expected lines `host slots=N`")
    if all(host in bare and len(slots) == 1 for host, slots in hosts.items()):
        return {host: list(range(bare_slots)) for host in hosts}
    return hosts


def read_lines(path: str | Path) -> list[str]:
    """Lines of a text file.

    Raises  ConfigError if it cannot be read.
    """
    try:
        # utf-8-sig: editors on Windows write a byte order mark, which is no part of the first name.
        return Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ConfigError(
            f"hostfile {path} is not a text file; expected lines `host slots=N`"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"hostfile {path} cannot be read: {error.strerror}; give another with --hostfile"
        ) from None


def parse_line(line: str, where: str) -> Line:
    """Host and number of slots of one line.

    Raises  ConfigError with the expected form, or for a host without slots.
    """
    first, *rest = re.sub(r"\s*=\s*", "=", line).split()
    host = host_name(first)
    counts: dict[str, int] = {}
    if not rest and (counted := COUNTED.fullmatch(first)):
        host = counted["host"]
        counts["slots"] = int(counted["slots"])
    options = [OPTION.fullmatch(word) for word in rest]
    if first.startswith("-") or "@-" in first:
        raise ConfigError(
            f"{where}: the host {first[:80]!r} begins with -, as an option of ssh does; expected"
            " `host slots=N`"
        )
    if host is None or not all(options) or len(options) > 2:
        raise ConfigError(f"{where}: expected `host slots=N`, got {line[:80]!r}")
    for option in options:
        if option is not None:
            counts[option["name"].replace("-", "_")] = int(option["count"])
    # max_slots is the bound of oversubscription, which nothing here does.
    slots = counts.get("slots", counts.get("max_slots"))
    if slots == 0:
        raise ConfigError(
            f"{where}: {host} has slots=0, expected at least 1; to skip the host, delete the line"
        )
    return Line(host, slots)


def host_name(word: str) -> str | None:
    """The host that a word names, an IPv6 address without brackets; None if it names none."""
    if match := ADDRESS.fullmatch(word):
        try:
            ipaddress.IPv6Address(match["address"])
        except ValueError:
            return None
        return match["user"] + match["address"]
    return word if NAME.fullmatch(word) else None


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
    where = f"{option} {text!r}"
    names = {name: host for host in hosts for name in names_of(host)}
    listed: dict[str, set[int]] = {}
    for part in filter_parts(text, hosts):
        host, numbers = parse_part(part, names, where)
        slots = {int(number) for number in numbers.split(",")} if numbers else set(hosts[host])
        unknown = sorted(slots - set(hosts[host]))
        if unknown:
            raise ConfigError(
                f"{where}: {host} has slots 0 to {len(hosts[host]) - 1}, not"
                f" {', '.join(map(str, unknown))}"
            )
        # A host may be listed several times: host1:0@host1:2.
        listed[host] = listed.get(host, set()) | slots
    return listed


def names_of(host: str) -> list[str]:
    """Names that a filter may use for a host: with and without its user, with brackets."""
    bare = address(host)
    return [host, bare, f"[{bare}]"]


def filter_parts(text: str, hosts: Hosts) -> list[str]:
    """The parts of a filter between its @; one that follows the user of a host parts nothing."""
    users = {host.rpartition("@")[0] for host in hosts} - hosts.keys() - {""}
    parts: list[str] = []
    for piece in text.split("@"):
        if parts and parts[-1] in users:
            parts[-1] += f"@{piece.strip()}"
        else:
            parts.append(piece.strip())
    return parts


def parse_part(part: str, names: dict[str, str], where: str) -> tuple[str, str]:
    """The host of one part of a filter, and its slots `0,2`; no slots mean all.

    Raises  ConfigError if the part is malformed, or its host is unknown.
    """
    # The longest known name: an IPv6 address has colons of its own.
    known = [name for name in names if f"{part}:".startswith(f"{name}:")]
    name = max(known, key=len, default=part.partition(":")[0])
    numbers = part[len(name) :]
    if host_name(name) is None or (numbers and not SLOTS.fullmatch(numbers[1:])):
        raise ConfigError(f"{where}: expected host or host:0,2 joined by @, got {part!r}")
    if name not in names:
        menu = ", ".join(dict.fromkeys(names.values()))
        raise ConfigError(
            f"{where}: unknown host {name!r}; choose one of {menu}{nearest(name, names)}"
        )
    return names[name], numbers[1:]
