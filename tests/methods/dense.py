"""Fisher matrices and gradients written out, as a second way to everything that is kept in factors."""

import torch


def gradients(suffix, prefix, groups, bias):
    """[n, width] of positions [n, s, g·i] and [n, s, g·o]: the weight row-major, then the bias."""
    rows = []
    for a, b in zip(suffix, prefix, strict=True):
        blocks = [
            sum(torch.outer(y, x) for x, y in zip(own_a, own_b, strict=True))
            for own_a, own_b in zip(a.chunk(groups, 1), b.chunk(groups, 1), strict=True)
        ]
        rows.append(torch.cat([torch.cat(blocks).flatten(), *([b.sum(0)] if bias else [])]))
    return torch.stack(rows)


def coordinates(groups, outputs, inputs, bias):
    """(group, output, input) of each place in a laid-out gradient; the bias is the last input."""
    places = [(g, o, i) for g in range(groups) for o in range(outputs) for i in range(inputs)]
    return places + ([(g, o, inputs) for g in range(groups) for o in range(outputs)] if bias else [])


def kronecker(outputs, inputs, places):
    """The matrix of A ⊗ S, [width, width], from the matrices of each group, zero between groups."""
    width = len(places)
    matrix = torch.zeros(width, width, dtype=torch.float64)
    for row, (g, o, i) in enumerate(places):
        for column, (h, p, j) in enumerate(places):
            if g == h:
                matrix[row, column] = outputs[g][o, p] * inputs[g][i, j]
    return matrix


def inverse_product(matrix, damping, vector):
    """(M + damping)⁻¹ v."""
    return torch.linalg.solve(matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype), vector)
