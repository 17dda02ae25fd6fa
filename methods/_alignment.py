"""Two sequences side by side in order: each entry of the shorter finds one of its own in the longer."""

from __future__ import annotations

from methods._torch import torch


def align(costs: torch.Tensor) -> list[int]:
    """The increasing columns, one for each row, with the least sum of `costs` (rows, columns); of equal ones the first.

    Raises ValueError where there are fewer columns than rows.
    """
    rows, columns = costs.shape
    if rows > columns:
        raise ValueError(f"{rows} rows cannot have a column of {columns} each")
    # least[i][j]: the least cost of the first i rows within the first j columns.
    least = [[0.0] * (columns + 1)] + [[float("inf")] * (columns + 1) for _ in range(rows)]
    for row in range(rows):
        for column in range(columns):
            taken = least[row][column] + float(costs[row, column])
            least[row + 1][column + 1] = min(least[row + 1][column], taken)
    chosen: list[int] = []
    column = columns
    for row in range(rows, 0, -1):
        while least[row][column - 1] == least[row][column]:
            column -= 1
        column -= 1
        chosen.append(column)
    return chosen[::-1]
