"""Tables that name experts, as the hash routers of DeepSeek-V4 have them: for every token the experts it is sent to."""

from __future__ import annotations

from methods._torch import torch


def without_removed(table: torch.Tensor, kept: torch.Tensor, router: torch.Tensor) -> torch.Tensor:
    """`table` (rows, k) of expert numbers, once only the experts `kept` (ascending) are left, by their new numbers.

    One that is gone is replaced by the kept expert whose row of `router` (experts, in), which gates it, has the
    smallest angle to its own, of those that the row of the table does not name yet; of equal ones the earlier.
    """
    number = torch.full((len(router),), -1, dtype=torch.long)
    number[kept] = torch.arange(len(kept))
    rows = torch.nn.functional.normalize(router.double(), dim=1)
    nearest = torch.argsort(rows @ rows[kept].T, dim=1, descending=True, stable=True)
    old = table.long()
    new = number[old]
    for place in range(table.shape[1]):
        for rank in range(table.shape[1]):
            candidate = nearest[old[:, place], rank]
            free = (new[:, place] < 0) & (new != candidate[:, None]).all(1)
            new[:, place] = torch.where(free, candidate, new[:, place])
    return new.to(table.dtype)
