"""When the layers and the copies of a step run, of many plans at once.

Layers run one after another, and so do copies, beside them. A layer's copies to the host begin when its first
tensors are saved, and are over when the layer is, or later. A layer begins when no more of them are under way
than the plan lets be. Behind the head everything is out.

The copy back of the last layer that is offloaded begins with the backward of a layer behind it, that of any
other one with the backward of the offloaded layer behind it. A layer's backward begins when what it wants
first is there, and waits once more where the rest is late.

Of layers whose 4-bit weights wait in host memory SLOTS are on the device. The next one's begin to come when
the one that has its place has been expanded for the last time, in a forward against the copies that leave and
in a backward before what is still to come back. The last ones of a forward are there for its backward, and
the first ones of a backward for the next forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Shares of a layer: of its forward, before its first tensors are saved; of its backward, that still follows
# when the last of what it wants has come.
SAVED_AFTER, REST = 0.25, 0.35
# Of a forward, until its weights have been expanded for the last time: that is before down_proj's matmul.
EXPANDED_AFTER = 0.75
# Places on the device for weights that come from the host: of the layer that runs, and of the next one.
SLOTS = 2
# What a link gives each way while both are in use: 46 to 50 of 55 GB/s were measured.
BOTH_WAYS = 0.85


@dataclass(frozen=True)
class Lanes:
    """Seconds of a layer's forward and backward and of what lies between them; bytes a second each way; and
    of each option the bytes that leave, the share of them that the backward wants first, and seconds of what
    it makes again (float64 tensors)."""

    forward_s: float
    backward_s: float
    between_s: float
    to_host: float
    from_host: float
    host: Any
    first: Any
    again_s: Any
    weights: tuple[bool, ...] = ()
    """Whether each layer's weights come from the host; empty for none."""
    weight_bytes: int = 0
    """Of one of these."""


def simulated(lanes: Lanes, codes: Any, in_flight: Any, lead: Any) -> Any:
    """Seconds from the first layer's forward to the end of its backward, float64 (plans,).

    codes: (plans, layers), which option each layer takes; in_flight: of how many layers the copies may be
    under way when it begins; lead: (plans,), how many layers behind the last one that is offloaded its copy
    back begins.
    """
    import torch

    plans, layers = codes.shape
    away = lanes.host[codes] > 0
    # Of each layer, what precedes it among those that are offloaded.
    newest = torch.where(away, torch.arange(layers), -1).cummax(1).values
    before = torch.cat([torch.full_like(newest[:, :1], -1), newest[:, :-1]], 1)
    last, none = newest[:, -1], before.t() < 0
    earlier = codes.gather(1, before.clamp(min=0)).t()
    behind = codes.gather(1, last.clamp(min=0).unsqueeze(1))[:, 0]
    starts = torch.where(last < 0, -1, (last + lead).clamp(max=layers - 1))
    # A layer's are read together, so from here on all are (layers, plans).
    codes, away = codes.t().contiguous(), away.t().contiguous()
    leaves, again = lanes.host[codes] / lanes.to_host, lanes.again_s[codes]
    number = away.long().cumsum(0) - away.long()  # of layers before it that are offloaded
    waits = (number - in_flight.t()).clamp(min=0)
    now, link = (torch.zeros(plans, dtype=torch.float64) for _ in range(2))
    out = torch.zeros(layers + 1, plans, dtype=torch.float64)  # when so many copies to the host are over
    streamed = [i for i, comes in enumerate(lanes.weights) if comes]
    rank = {i: n for n, i in enumerate(streamed)}
    inward = torch.zeros(plans, dtype=torch.float64)
    left: list[Any] = []  # when each of them has been expanded for the last time
    a_copy = lanes.weight_bytes / lanes.from_host
    for i in range(layers):
        now = now.maximum(out.gather(0, waits[i : i + 1])[0])
        if i in rank:
            if rank[i] >= SLOTS:
                inward = inward.maximum(left[rank[i] - SLOTS]) + a_copy / BOTH_WAYS
                now = now.maximum(inward)
            left.append(now + EXPANDED_AFTER * lanes.forward_s)
        end = link.maximum(now + SAVED_AFTER * lanes.forward_s) + leaves[i]
        now = now + lanes.forward_s
        link = torch.where(away[i], end.maximum(now), link)
        out.scatter_(0, number[i : i + 1] + 1, link.unsqueeze(0))
    now = now.maximum(link) + lanes.between_s

    # When what comes next has come as far as its layer's backward wants it first, and when all of it has.
    front, back = (torch.zeros(plans, dtype=torch.float64) for _ in range(2))
    share, all_of_it = lanes.first * lanes.host / lanes.from_host, lanes.host / lanes.from_host
    early, late = (torch.where(none, 0.0, x[earlier]) for x in (share, all_of_it))
    first_ones = set(starts.tolist())
    arrived: dict[int, Any] = {}
    inward = torch.zeros(plans, dtype=torch.float64)
    for i in reversed(range(layers)):
        if i in first_ones:
            begin, new = link.maximum(now), starts == i
            front = torch.where(new, begin + share[behind], front)
            back = torch.where(new, begin + all_of_it[behind], back)
            link = torch.where(new, back, link)
        here, begin = away[i], link.maximum(now)
        now = torch.where(here, now.maximum(front), now)
        if i in arrived:
            now = now.maximum(arrived[i])
        run = lanes.backward_s + again[i]
        now = now + run
        now = torch.where(here, now.maximum(back + REST * run), now)
        front, back = torch.where(here, begin + early[i], front), torch.where(here, begin + late[i], back)
        link = torch.where(here, back, link)
        if rank.get(i, 0) >= SLOTS:  # before what is still to come of tensors, which comes in portions
            inward = arrived[streamed[rank[i] - SLOTS]] = inward.maximum(now) + a_copy
            link = link.maximum(now) + a_copy
            front, back = (torch.where(times > now, times + a_copy, times) for times in (front, back))
    return now
