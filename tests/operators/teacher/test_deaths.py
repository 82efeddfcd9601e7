"""What happens to the calls of an engine that died: in small examples, and simulated with realistic sizes."""

import pytest

from operators.teacher.deaths import CRASHES, DEADLY_AFTER, MAX_DEADLY, PARTS, Deaths


def keys(count: int) -> list[str]:
    return [f"call {number}" for number in range(count)]


def test_the_calls_of_a_dead_engine_go_on_in_quarters_and_none_is_lost() -> None:
    verdict = Deaths().died(keys(282))
    assert [len(group) for group in verdict.groups] == [71, 71, 71, 69]
    assert sorted(key for group in verdict.groups for key in group) == sorted(keys(282))
    assert (verdict.deadly, verdict.closed) == (frozenset(), "")


def test_a_call_that_was_alone_at_two_deaths_is_given_up() -> None:
    deaths = Deaths()
    deaths.survived()
    assert deaths.died(["a"]).groups == (("a",),)
    assert deaths.died(["a"]).deadly == {"a"}


def test_deaths_of_two_disjoint_groups_before_any_answer_blame_the_engine() -> None:
    deaths = Deaths()
    first, second, *_ = deaths.died(keys(8)).groups
    assert deaths.died(list(first)).closed == ""
    assert deaths.died(list(second)).closed == CRASHES


def test_an_answer_clears_the_engine() -> None:
    deaths = Deaths()
    first, second, *_ = deaths.died(keys(8)).groups
    deaths.died(list(first))
    deaths.survived()
    assert deaths.died(list(second)).closed == ""


def test_too_many_deadly_calls_in_a_row_blame_the_engine() -> None:
    deaths = Deaths()
    deaths.survived()
    for key in keys(MAX_DEADLY):
        assert [deaths.died([key]).deadly for _ in range(DEADLY_AFTER)][-1] == {key}
    deaths.died(["one more"])
    assert deaths.died(["one more"]).closed == CRASHES


REPLY_S, START_S = 20.0, 180.0  # of a 70B model


def simulate(num_calls: int, deadly: set[str], *, preempted: bool = False) -> tuple[int, float, int, set[str]]:
    """Simulate an engine that gets all calls at once; return deaths, seconds, smallest group, and calls given up."""
    deaths = Deaths()
    groups: list[tuple[str, ...]] = [tuple(keys(num_calls))]
    seconds, fewest, given_up, answered = 0.0, num_calls, set(), set()
    while groups:
        group = groups.pop(0)
        fewest = min(fewest, len(group))
        seconds += REPLY_S
        if preempted or deadly & set(group):
            preempted = False
            verdict = deaths.died(list(group))
            assert not verdict.closed
            groups += verdict.groups
            given_up |= verdict.deadly
            seconds += START_S
        else:
            deaths.survived()
            answered |= set(group)
    assert answered | given_up == set(keys(num_calls))
    return deaths.count, seconds, fewest, given_up


def test_a_machine_that_was_taken_away_costs_four_rounds_at_a_quarter_of_the_concurrency() -> None:
    deaths, seconds, fewest, given_up = simulate(282, set(), preempted=True)
    assert (deaths, fewest, given_up) == (1, 69, set())
    assert seconds == START_S + (1 + PARTS) * REPLY_S
    one_by_one = START_S + (1 + 282) * REPLY_S  # the earlier way: the returned batch was answered call by call
    assert one_by_one / seconds > 20


@pytest.mark.parametrize("place", [0, 100, 281])
def test_a_deadly_call_among_many_is_found_in_a_few_starts(place: int) -> None:
    deaths, seconds, _, given_up = simulate(282, {f"call {place}"})
    assert given_up == {f"call {place}"}
    assert deaths <= 7
    assert seconds < 0.5 * 282 * REPLY_S


def test_two_deadly_calls_are_both_found() -> None:
    _, _, _, given_up = simulate(64, {"call 3", "call 40"})
    assert given_up == {"call 3", "call 40"}
