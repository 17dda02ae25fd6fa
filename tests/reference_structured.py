"""Structured pruning as the papers state it, unit by unit and in float64: slow, and meant to be read."""

from __future__ import annotations

import math

import torch


def score(name: str, consumer: torch.Tensor, producers: list[torch.Tensor], x: torch.Tensor, width: int) -> list[float]:
    """A number per unit. consumer (out, units * width); producers (units, rows, hidden); x (tokens, units * width)."""
    consumer, x = consumer.double(), x.double()
    producers = [producer.double() for producer in producers]
    scores = []
    for unit in range(consumer.shape[1] // width):
        inputs = range(unit * width, (unit + 1) * width)
        rule = {"magnitude": _magnitude, "wanda": _wanda, "flap": _flap, "cfsp": _cfsp}[name]
        scores.append(rule(consumer, producers, x, unit, inputs))
    return scores


def _magnitude(
    consumer: torch.Tensor, producers: list[torch.Tensor], x: torch.Tensor, unit: int, inputs: range
) -> float:
    mine = [consumer[i, j] for j in inputs for i in range(len(consumer))]
    mine += [value for producer in producers for value in producer[unit].flatten()]
    return sum(float(value) ** 2 for value in mine)


def _wanda(consumer: torch.Tensor, producers: list[torch.Tensor], x: torch.Tensor, unit: int, inputs: range) -> float:
    return sum(abs(float(consumer[i, j])) * float(x[:, j].norm()) for j in inputs for i in range(len(consumer)))


def _flap(consumer: torch.Tensor, producers: list[torch.Tensor], x: torch.Tensor, unit: int, inputs: range) -> float:
    each = [float(x[:, j].var(unbiased=False)) * float(consumer[:, j].norm()) ** 2 for j in inputs]
    return sum(each) / len(each)


def _cfsp(consumer: torch.Tensor, producers: list[torch.Tensor], x: torch.Tensor, unit: int, inputs: range) -> float:
    """A head's score is the sum over its inputs; what makes it counts once for the whole head, spread over them."""
    norms = [float(x[:, j].norm()) for j in range(x.shape[1])]
    out, total = len(consumer), 0.0
    for j in inputs:
        for i in range(out):
            row = sum(abs(float(consumer[i, k])) * norms[k] for k in range(x.shape[1]))
            total += abs(float(consumer[i, j])) * norms[j] / row / out * norms[j]
        for producer in producers:
            hidden = producer.shape[2]
            for h in range(hidden):
                mine = sum(abs(float(value)) for value in producer[unit, :, h])
                column = sum(abs(float(value)) for value in producer[:, :, h].flatten())
                total += mine / column / hidden / len(inputs) * norms[j]
    return total


def error_without(gone: list[int], x: torch.Tensor, target: torch.Tensor) -> float:
    """The squared error of the best linear layer from the inputs that are left to `target`."""
    left = [j for j in range(x.shape[1]) if j not in gone]
    x, target = x.double()[:, left], target.double()
    solution = torch.linalg.lstsq(x, target, driver="gelsd").solution
    return float((target - x @ solution).square().sum())


def cfsp_shares(importance: list[float]) -> list[float]:
    """Sigmoid of the importance in standard deviations from the blocks' mean."""
    mean = sum(importance) / len(importance)
    spread = math.sqrt(sum((value - mean) ** 2 for value in importance) / len(importance))
    return [1 / (1 + math.exp(-(value - mean) / spread)) for value in importance]
