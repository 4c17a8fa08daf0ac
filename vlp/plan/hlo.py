"""Reads from the text of a compiled program what it sends between devices."""

from __future__ import annotations

import dataclasses
import math
import re

# Bytes that a device sends on a ring of n devices, in units of (n − 1) / n of the operation's larger side. An
# all-reduce sends twice: to sum, and to distribute the sum.
_SHARE = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2, "all-to-all": 1}


@dataclasses.dataclass
class Traffic:
    """One kind of collective in one call of a program: how often it runs, and the bytes that a device sends."""

    count: int = 0
    sent_bytes: float = 0.0


def collectives(text: str, num_devices: int) -> dict[str, Traffic]:
    """Returns the traffic of one call of the program by kind of collective.

    The body of a loop counts as often as it runs; one whose trip count depends on data counts once. Groups of fewer
    than all devices are read from the operation.
    """
    bodies = {}
    # Split before the head of a computation only: the metadata of kernels has line breaks, too.
    for block in re.split(r"\n(?=(?:ENTRY )?%?[\w.\-]+ \()", text):
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
                # A collective that is fused with compute appears once per piece, also inside inner loops; the pieces
                # have one channel. Unfused ones may share a channel (all of a shard_map do) and count each.
                channel = re.search(r"channel_id=(\d+)", line) if fused else None
                if channel:
                    plain = re.sub(r"\{[^}]*\}", "", shapes)  # layouts differ between the pieces
                    key = (f"{channel.group(1)} {plain}", kind)
                    found[key] = min(found.get(key, (times, share)), (times, share))
                else:
                    key = (f"{name} {line.split('=')[0]}", kind)
                    before = found.get(key, (0, share))[0]  # from other calls of this computation
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
    """Returns the bytes of the whole operand or result, whichever is larger.

    Args:
        kind: of collective.
        num_bytes: in the shapes before the operation: of the result, and for a start also of the operand (except
            all-reduce).
        group: number of devices that take part.
        start: whether the operation is the start of an asynchronous one.
    """
    if kind == "all-reduce":
        return num_bytes
    if kind in ("all-gather", "reduce-scatter") and start:
        return num_bytes * group / (group + 1)
    if start:
        return num_bytes / 2
    return num_bytes * group if kind == "reduce-scatter" else num_bytes


def _group(line: str, num_devices: int) -> int:
    """Returns how many devices take part in one collective, from "{{0,1},{2,3}}" or "[2,4]<=[8]"."""
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    if iota:
        return int(iota.group(2))
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return len(listed.group(1).split(",")) if listed else num_devices
