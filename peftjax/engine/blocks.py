"""Which axes of a reshaped array are made of which axes it had."""


def reshape_blocks(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[range, range]] | None:
    """The finest pairing of old axes with new axes of equal product; None for empty arrays."""
    if 0 in old:
        return None
    blocks = []
    i = j = 0
    while i < len(old) or j < len(new):
        start_i, start_j = i, j
        if i < len(old) and old[i] == 1 and (j == len(new) or new[j] != 1):
            i += 1
        elif j < len(new) and new[j] == 1 and (i == len(old) or old[i] != 1):
            j += 1
        else:
            left, right = old[i], new[j]
            i, j = i + 1, j + 1
            while left != right:
                if left < right:
                    left, i = left * old[i], i + 1
                else:
                    right, j = right * new[j], j + 1
        blocks.append((range(start_i, i), range(start_j, j)))
    return blocks
