"""Where a fleet's workers disagree on what a model is: told to whoever looks, for as long as it is so."""

from collections.abc import Callable, Iterable, Iterator

from app.metrics import Gauge
from planes.probes import edition_of
from planes.wire.messages import Registration

_NAMED = 8
"""Workers of one kind that a sentence names."""


def splits_of(workers: Iterable[Registration]) -> dict[str, str]:
    """A sentence for each model whose workers have several cards, or several KV layouts, by what is split."""
    return dict(_splits(list(workers)))


def split_gauges(workers: Iterable[Registration]) -> Iterator[Gauge]:
    """For the metrics: 1 is a fleet that agrees."""
    found = list(workers)
    for model in _by(found, lambda worker: worker.model):
        own = [worker for worker in found if worker.model == model]
        label = (("model", model),)
        cards = len(_by(own, lambda worker: worker.card_digest))
        yield Gauge("model_cards", "Different model cards under one name.", cards, label)
        layouts = len(_by(_handing_over(own), lambda worker: f"{worker.card_digest} {worker.layout}"))
        yield Gauge("model_layouts", "Groups of workers that hand over among themselves alone.", layouts, label)


def _splits(workers: list[Registration]) -> Iterator[tuple[str, str]]:
    for model, own in _by(workers, lambda worker: worker.model).items():
        cards = _by(own, lambda worker: worker.card_digest)
        if len(cards) > 1:
            reason = (
                f"model {model!r} has {len(cards)} different cards, and one of them serves: {_told(cards)}; an upgrade "
                "ends with one, else give each its own --served-model-name"
            )
            yield f"cards of {model}", reason
        for card, same in cards.items():
            known = [worker for worker in same if worker.rendering]
            for edition, told in _by(known, lambda worker: edition_of(worker.rendering)).items():
                renderings = _by(told, lambda worker: worker.rendering.partition(":")[2])
                if len(renderings) > 1:
                    reason = (
                        f"workers of model {model!r} make {len(renderings)} different prompts of the same probes: "
                        f"{_told(renderings)}; a gateway refuses those that differ from its own; install one version"
                    )
                    yield f"renderings {edition} of {model}, card {card}", reason
            layouts = _by(_handing_over(same), lambda worker: worker.layout)
            if len(layouts) > 1:
                reason = (
                    f"model {model!r} has {len(layouts)} KV cache layouts, which cannot hand over to each other: "
                    f"{_told(layouts)}; start its workers with one engine version, dtype and block size"
                )
                yield f"layouts of {model}, card {card}", reason


def _handing_over(workers: list[Registration]) -> list[Registration]:
    return [worker for worker in workers if worker.handover is not None and worker.layout]


def _by(workers: list[Registration], told: Callable[[Registration], str]) -> dict[str, list[Registration]]:
    groups: dict[str, list[Registration]] = {}
    for worker in workers:
        groups.setdefault(told(worker), []).append(worker)
    return groups


def _told(groups: dict[str, list[Registration]]) -> str:
    """`1f00aa12 (w1, w2), 77ab0c3d (w3)`."""
    return ", ".join(f"{value[:8]} ({_names(group)})" for value, group in sorted(groups.items()))


def _names(workers: list[Registration]) -> str:
    names = sorted(worker.worker for worker in workers)
    more = [f"{len(names) - _NAMED} more"] if len(names) > _NAMED else []
    return ", ".join([*names[:_NAMED], *more])
