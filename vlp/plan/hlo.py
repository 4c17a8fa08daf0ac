"""What a compiled program sends between devices, read from its text."""

from __future__ import annotations

import dataclasses
import math
import re

# What a device sends, in shares of the operation's larger side, on a ring of n devices: (n − 1) / n of it, and twice
# that to sum and hand back.
_SHARE = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2, "all-to-all": 1}


@dataclasses.dataclass
class Traffic:
    """Of one kind of collective: how often it runs, and the bytes that a device sends, over a whole call."""

    count: int = 0
    sent_bytes: float = 0.0


def collectives(text: str, num_devices: int) -> dict[str, Traffic]:
    """By kind, for one call of the program; bodies of loops count as often as they run.

    Groups of less than all devices are read from the operation. Data-dependent loops, of which no trip count is known,
    count once.
    """
    bodies = {}
    for block in re.split(
        r"\n(?=(?:ENTRY )?%?[\w.\-]+ \()", text
    ):  # kernels' metadata has lines of its own
        head = re.match(r"(?:ENTRY )?%?([\w.\-]+) ", block)
        if head:
            bodies[head.group(1)] = block
    found: dict[tuple[str, str], tuple[int, float]] = {}

    def size(shapes: str) -> float:
        every = re.findall(r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]", shapes)
        dims = lambda text: math.prod(int(n) for n in text.split(",") if n)
        return sum(int(bits or 8) / 8 * dims(text) for bits, text in every)

    def trips(line: str) -> int:
        known = re.search(r"known_trip_count[\"':{ ]+n[\"': ]+(\d+)", line)
        if known:
            return int(known.group(1))
        test = bodies[re.search(r"condition=%?([\w.\-]+)", line).group(1)]  # type: ignore[union-attr]
        bounds = re.findall(r"constant\((\d+)\)", test)
        return int(bounds[-1]) if bounds else 1

    def visit(name: str, times: int, fused: bool = False) -> None:
        for line in bodies[name].splitlines()[1:]:
            match = re.search(r"= (.*?) ([a-z][\w\-]*)\(", line)
            if not match:
                continue
            shapes, op = match.groups()
            kind = op.removesuffix("-start")
            if kind in _SHARE or kind == "collective-permute":
                group = _group(line, num_devices)
                share = _larger_side(kind, size(shapes), group, op.endswith("-start"))
                share *= _SHARE.get(kind, 1) * ((group - 1) / group if kind in _SHARE else 1)
                # One that is fused with compute is written once per piece, also inside of inner loops; the channel
                # tells that they are one. Others may share a channel (all of a shard_map do) and are themselves.
                channel = re.search(r"channel_id=(\d+)", line) if fused else None
                if channel:
                    plain = re.sub(r"\{[^}]*\}", "", shapes)  # layouts differ between the pieces
                    key = (f"{channel.group(1)} {plain}", kind)
                    found[key] = min(found.get(key, (times, share)), (times, share))
                else:
                    key = (f"{name} {line.split('=')[0]}", kind)
                    before = found.get(key, (0, share))[0]  # of other calls of this computation
                    found[key] = (before + times, share)
            elif op == "while":
                visit(re.search(r"body=%?([\w.\-]+)", line).group(1), times * trips(line), fused)  # type: ignore[union-attr]
            elif op in ("call", "fusion", "conditional", "async-start"):
                for inner in re.findall(r"(?:to_apply|calls)=%?([\w.\-]+)", line):
                    if inner in bodies:
                        visit(inner, times, fused or op in ("fusion", "async-start"))

    visit(re.search(r"\nENTRY %?([\w.\-]+) ", text).group(1), 1)  # type: ignore[union-attr]
    out: dict[str, Traffic] = {}
    for (_, kind), (times, share) in found.items():
        kept = out.setdefault(kind, Traffic())
        kept.count += times
        kept.sent_bytes += times * share
    return out


def _larger_side(kind: str, num_bytes: float, group: int, start: bool) -> float:
    """Bytes of the whole operand or result, whichever is larger, from those that are written before the operation:
    of the result, and in a start of the operand as well (but for all-reduce)."""
    if kind == "all-reduce":
        return num_bytes
    if kind in ("all-gather", "reduce-scatter") and start:
        return num_bytes * group / (group + 1)
    if start:
        return num_bytes / 2
    return num_bytes * group if kind == "reduce-scatter" else num_bytes


def _group(line: str, num_devices: int) -> int:
    """How many devices take part in one collective: "{{0,1},{2,3}}" or "[2,4]<=[8]"."""
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    if iota:
        return int(iota.group(2))
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return len(listed.group(1).split(",")) if listed else num_devices
