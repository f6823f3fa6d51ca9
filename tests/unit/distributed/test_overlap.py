"""Buckets follow each other at the distance of one collective."""

from hf_muon.distributed.exchange import run_overlapped


def rounds(collectives, count):
    """What happens, in order: (stage, number); a stage ends where a collective is launched."""
    events = []

    def step(number):
        for stage in range(collectives):
            events.append((stage, number))
            yield
        events.append((collectives, number))

    run_overlapped(step(number) for number in range(count))
    return events


def test_the_next_is_gathered_before_one_is_computed_and_scattered_before_the_last_is_awaited():
    assert rounds(2, 4) == [
        (0, 0),
        (0, 1), (1, 0),
        (0, 2), (1, 1), (2, 0),
        (0, 3), (1, 2), (2, 1),
        (1, 3), (2, 2),
        (2, 3),
    ]  # fmt: skip


def test_no_more_are_in_flight_than_collectives_and_one():
    for collectives in range(4):
        begun, most = set(), 0
        for stage, number in rounds(collectives, 9):
            begun.add(number)
            most = max(most, len(begun))
            if stage == collectives:
                begun.remove(number)
        assert most == collectives + 1


def test_steps_of_different_lengths_all_end():
    ended = []

    def step(length):
        for _ in range(length):
            yield
        ended.append(length)

    run_overlapped(step(length) for length in (3, 0, 2, 1))
    assert sorted(ended) == [0, 1, 2, 3]


def test_a_step_is_made_only_when_it_starts():
    """Its buffers exist from then on."""
    made = []

    def steps():
        for number in range(3):
            made.append(number)
            yield one(number)

    def one(number):
        assert made[-1] == number
        yield

    run_overlapped(steps())
    assert made == [0, 1, 2]
