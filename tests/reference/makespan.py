"""The best that any assignment of jobs of two sizes to equal machines can do."""


def fits(span, machines, large, small):
    """Whether all jobs fit, given as (size, count): how many small ones fit beside the large."""
    beside = [(span - n * large[0]) // small[0] for n in range(span // large[0] + 1)]
    most = [0] + [-1] * large[1]  # small jobs placed at most, by large jobs placed; -1: impossible
    for _ in range(machines):
        following = [-1] * (large[1] + 1)
        for placed, others in enumerate(most):
            if others >= 0:
                for here, more in enumerate(beside):
                    total = min(large[1], placed + here)
                    following[total] = max(following[total], others + more)
        most = following
    return most[large[1]] >= small[1]


def smallest_makespan(machines, large, small):
    """The least load of the busiest machine, over all assignments."""
    loads = {a * large[0] + b * small[0] for a in range(large[1] + 1) for b in range(small[1] + 1)}
    candidates = sorted(loads)
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        if fits(candidates[middle], machines, large, small):
            high = middle
        else:
            low = middle + 1
    return candidates[low]
